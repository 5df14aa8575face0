from __future__ import annotations

import io
import itertools
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from relrep_onnx.data import DataOptions, Preprocessing, Samples, halves, load_samples, split_holdout
from relrep_onnx.types import Array, CalibrationError, ConfigError, RelRepError, TensorInfo

VECTOR = TensorInfo("x", "tensor(float)", ("batch", 3))
FIXED = TensorInfo("x", "tensor(float)", (4, 3))
IMAGE = TensorInfo("x", "tensor(float)", ("batch", 3, 8, 6))
OPEN_IMAGE = TensorInfo("x", "tensor(float)", ("batch", 3, "height", "width"))
NHWC = TensorInfo("x", "tensor(float)", ("batch", 8, 6, 3))
IDS = TensorInfo("ids", "tensor(int64)", ("batch", "length"))
MASK = TensorInfo("mask", "tensor(bool)", ("batch", 2))
SCALAR = TensorInfo("t", "tensor(float)", ())
PAIR = [VECTOR, TensorInfo("y", "tensor(float)", ("batch", 2))]
RAW = Preprocessing(scale=1.0)


def floats(*shape: int, start: int = 0) -> Array:
    return (np.arange(np.prod(shape)) + start).astype(np.float32).reshape(shape)


def pixels(*shape: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def load(source: object, *inputs: TensorInfo, **options: Any) -> Samples:
    return load_samples(source, inputs or [VECTOR], DataOptions(**options))


def joined(samples: Samples, batch_size: int = 5, name: str = "x") -> Array:
    return np.concatenate([feeds[name] for feeds in samples.batches(batch_size)])


def lengths(samples: Samples, batch_size: int) -> list[int]:
    return [len(feeds["x"]) for feeds in samples.batches(batch_size)]


def write_tensor(path: Path, array: Array, name: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array, name).SerializeToString())


class Reader:
    """As ONNX Runtime's CalibrationDataReader."""

    def __init__(self, feeds: list[dict[str, Array]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self.feeds, None)


# Batches


@settings(deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_batches_give_back_the_data(count: int, batch_size: int) -> None:
    array = floats(count, 3)
    samples = load(array)
    batches = [feeds["x"] for feeds in samples.batches(batch_size)]
    np.testing.assert_array_equal(np.concatenate(batches), array)
    assert len(samples) == count
    assert samples.batch_count(batch_size) == len(batches)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


@settings(deadline=None)
@given(count=st.integers(1, 40), first=st.integers(0, 45), batch_size=st.integers(1, 9))
def test_split_parts_the_data(count: int, first: int, batch_size: int) -> None:
    array = floats(count, 3)
    head, tail = load(array).split(first)
    assert (len(head), len(tail)) == (min(first, count), max(count - first, 0))
    parts = [feeds["x"] for part in (head, tail) for feeds in part.batches(batch_size)]
    np.testing.assert_array_equal(np.concatenate(parts), array)


@pytest.mark.parametrize(("first", "head"), [(0, 0), (1, 4), (4, 4), (5, 8), (99, 12)])
def test_split_keeps_fixed_batches_whole(first: int, head: int) -> None:
    parts = load(floats(14, 3), FIXED).split(first)
    assert [len(part) for part in parts] == [head, 12 - head]


def test_fixed_batches_are_filled_across_feeds() -> None:
    samples = load([{"x": floats(3, 3, start=9 * i)} for i in range(3)], FIXED)
    assert lengths(samples, 32) == [4, 4]
    np.testing.assert_array_equal(joined(samples), floats(8, 3))


def test_batches_can_be_read_again() -> None:
    samples = load(floats(7, 3))
    np.testing.assert_array_equal(joined(samples), joined(samples))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one(batch_size: int) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        load(floats(7, 3)).batches(batch_size)


@pytest.mark.parametrize(("rows", "usable"), [(4, 4), (11, 8), (12, 12)])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_fixed_batch(rows: int, usable: int, batch_size: int) -> None:
    samples = load(floats(rows, 3), FIXED)
    assert len(samples) == usable
    assert lengths(samples, batch_size) == [4] * (usable // 4)
    assert samples.batch_count(batch_size) == usable // 4
    np.testing.assert_array_equal(joined(samples), floats(rows, 3)[:usable])


def test_batch_fixed_at_one() -> None:
    assert lengths(load(floats(3, 3), TensorInfo("x", "tensor(float)", (1, 3))), 32) == [1, 1, 1]


def test_one_more_axis_makes_each_entry_a_feed() -> None:
    array = floats(5, 2, 3)
    samples = load(array)
    assert len(samples) == 5
    assert [feeds["x"].shape for feeds in samples.batches(32)] == [(2, 3)] * 5
    np.testing.assert_array_equal(joined(samples), array.reshape(10, 3))


def test_feeds_of_inputs_without_a_batch_axis_run_whole() -> None:
    feeds = [{"x": floats(2, 3, start=i), "t": np.float32(i)} for i in range(4)]
    samples = load(feeds, VECTOR, SCALAR)
    assert len(samples) == 4
    for index, got in enumerate(samples.batches(32)):
        assert got["x"].shape == (2, 3)
        assert isinstance(got["t"], np.ndarray)
        assert got["t"].shape == ()
        assert got["t"] == index


def test_scalars_listed() -> None:
    assert [float(feeds["t"]) for feeds in load(floats(3), SCALAR).batches(8)] == [0.0, 1.0, 2.0]


def test_unknown_rank_batches_along_axis_0() -> None:
    assert [feeds["t"].shape for feeds in load(floats(5, 2, 2), SCALAR).batches(3)] == [(3, 2, 2), (2, 2, 2)]


def test_inputs_that_disagree_on_axis_0_are_one_sample() -> None:
    samples = load({"x": floats(5, 3), "y": floats(2, 2)}, *PAIR)
    assert len(samples) == 1
    (feeds,) = samples.batches(1)
    assert (feeds["x"].shape, feeds["y"].shape) == ((5, 3), (2, 2))


def test_two_fixed_first_dimensions_make_whole_feeds() -> None:
    inputs = [TensorInfo("x", "tensor(float)", (2, 3)), TensorInfo("y", "tensor(float)", (5, 2))]
    samples = load({"x": floats(4, 2, 3), "y": floats(4, 5, 2)}, *inputs)
    assert len(samples) == 4
    assert [feeds["y"].shape for feeds in samples.batches(9)] == [(5, 2)] * 4


def test_shapes_are_batched_apart_and_equal_neighbours_together() -> None:
    feeds = [{"ids": np.zeros((1, length), np.int64)} for length in (4, 4, 4, 7, 4)]
    got = [batch["ids"].shape for batch in load(feeds, IDS).batches(2)]
    assert got == [(2, 4), (1, 4), (1, 7), (1, 4)]


@pytest.mark.parametrize("num_samples", [1, 3, 4, 5, 9, 20])
def test_num_samples_takes_the_first(num_samples: int) -> None:
    feeds = [{"x": floats(3, 3, start=9 * i)} for i in range(3)]
    np.testing.assert_array_equal(joined(load(feeds, num_samples=num_samples)), floats(9, 3)[:num_samples])


def test_num_samples_reads_no_further() -> None:
    endless = ({"x": floats(2, 3, start=i)} for i in itertools.count())
    assert len(load(endless, num_samples=5)) == 5


# Sources


def save_npz(folder: Path) -> Path:
    np.savez(folder / "d.npz", x=floats(6, 3), other=floats(2))
    return folder / "d.npz"


def save_npy(folder: Path) -> Path:
    np.save(folder / "d.npy", floats(6, 3))
    return folder / "d.npy"


def save_folder(folder: Path) -> Path:
    np.savez_compressed(folder / "b.npz", whatever=floats(4, 3, start=6))
    np.save(folder / "a.npy", floats(2, 3))
    (folder / "notes.txt").write_text("not data")
    (folder / "._a.npy").write_text("what macOS leaves behind")
    return folder


def save_test_sets(folder: Path) -> Path:
    for index in range(2):
        write_tensor(folder / f"test_data_set_{index}" / "input_0.pb", floats(3, 3, start=9 * index))
        write_tensor(folder / f"test_data_set_{index}" / "output_0.pb", floats(1))
    return folder


def save_test_set(folder: Path) -> Path:
    write_tensor(folder / "test_data_set_0" / "input_0.pb", floats(6, 3))
    return folder / "test_data_set_0"


@pytest.mark.parametrize("save", [save_npz, save_npy, save_folder, save_test_sets, save_test_set])
@pytest.mark.parametrize("kind", [str, Path])
def test_paths(tmp_path: Path, save: Callable[[Path], Path], kind: type[str] | type[Path]) -> None:
    source = kind(save(tmp_path))
    samples = load(source)
    np.testing.assert_array_equal(joined(samples), floats(6, 3))
    assert lengths(samples, 6) == [6]
    assert (samples.source, samples.random) == (str(source), False)


@pytest.mark.parametrize(
    "source",
    [
        floats(6, 3),
        {"x": floats(6, 3), "extra": floats(1)},
        {"other": floats(6, 3)},
        {"x": floats(6, 3).tolist()},
        [{"x": floats(2, 3)}, {"x": floats(4, 3, start=6)}],
        [floats(2, 3), floats(4, 3, start=6)],
        ({"x": floats(6, 3)[i : i + 1]} for i in range(6)),
        Reader([{"x": floats(6, 3)[i : i + 1]} for i in range(6)]),
    ],
    ids=["array", "mapping", "only array", "lists", "feeds", "arrays", "generator", "reader"],
)
def test_python_sources(source: object) -> None:
    samples = load(source)
    np.testing.assert_array_equal(joined(samples), floats(6, 3))
    assert (samples.source, samples.random, len(samples)) == ("python", False, 6)


def test_reader_is_read_once_and_in_order() -> None:
    samples = load(Reader([{"x": floats(1, 3, start=i), "y": floats(1, 2)} for i in range(5)]), *PAIR)
    assert [float(feeds["x"][0, 0]) for feeds in samples.batches(1)] == [0, 1, 2, 3, 4]


def test_key_picks_an_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", a=floats(2, 3), b=floats(4, 3))
    assert len(load(tmp_path / "d.npz", key="b")) == 4
    assert len(load(tmp_path, key="a")) == 2
    assert len(load({"x": floats(1, 3), "b": floats(4, 3)}, key="b")) == 4


def test_many_inputs_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", y=floats(5, 2), x=floats(5, 3), z=floats(9))
    (feeds,) = load(tmp_path / "d.npz", *PAIR).batches(8)
    assert list(feeds) == ["x", "y"]
    np.testing.assert_array_equal(feeds["y"], floats(5, 2))


def test_test_data_order_is_numeric(tmp_path: Path) -> None:
    inputs = [TensorInfo(f"i{n}", "tensor(float)", ("batch",)) for n in range(12)]
    for index in range(12):
        write_tensor(tmp_path / "test_data_set_0" / f"input_{index}.pb", floats(1, start=index))
    (feeds,) = load(tmp_path, *inputs).batches(1)
    assert [float(feeds[f"i{n}"][0]) for n in range(12)] == list(range(12))


def test_test_data_names_win_over_order(tmp_path: Path) -> None:
    write_tensor(tmp_path / "test_data_set_0" / "input_0.pb", floats(1, 2), "y")
    write_tensor(tmp_path / "test_data_set_0" / "input_1.pb", floats(1, 3), "x")
    (feeds,) = load(tmp_path, *PAIR).batches(1)
    assert (feeds["x"].shape, feeds["y"].shape) == ((1, 3), (1, 2))


def test_a_file_named_random_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("random").random
    with pytest.raises(CalibrationError, match="no such file"):
        load(Path("random"))


# Types


@pytest.mark.parametrize(
    ("came", "wanted"),
    [
        ("float64", "float"), ("float16", "float"), (">f4", "float"), ("float32", "double"), ("float32", "float16"),
        ("int32", "int64"), ("int64", "int32"), ("uint8", "int32"), ("int64", "uint8"), ("uint8", "uint8"), ("bool", "bool"),
    ],
)  # fmt: skip
def test_types_are_cast_where_values_fit(came: str, wanted: str) -> None:
    info = TensorInfo("x", f"tensor({wanted})", ("batch", 3))
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(came)
    got = joined(load(array, info))
    assert got.dtype == info.dtype
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize(
    ("came", "wanted"),
    [("int64", "float"), ("bool", "float"), ("float32", "int64"), ("int64", "bool"), ("bool", "int64"), ("complex64", "float"),
     ("S3", "float"), ("datetime64[s]", "float")],
)  # fmt: skip
def test_types_that_do_not_fit(came: str, wanted: str) -> None:
    with pytest.raises(CalibrationError, match=r"the given data: input 'x' expects .*: got "):
        load(np.zeros((4, 3), came), TensorInfo("x", f"tensor({wanted})", ("batch", 3)))


@pytest.mark.parametrize(("value", "wanted"), [(300, "uint8"), (-1, "uint64"), (2**40, "int32"), (-129, "int8")])
def test_integers_that_do_not_fit(value: int, wanted: str) -> None:
    with pytest.raises(CalibrationError, match=f"cannot hold the values from .*{value}"):
        load(np.full((4, 3), value), TensorInfo("x", f"tensor({wanted})", ("batch", 3)))


@pytest.mark.parametrize("kind", ["tensor(string)", "seq(tensor(float))", "tensor(bfloat16)"])
def test_inputs_no_data_can_serve(kind: str) -> None:
    with pytest.raises(CalibrationError, match="only float, integer and bool"):
        load(floats(2, 3), TensorInfo("x", kind, ("batch", 3)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_and_inf_are_named(value: float, dtype: str) -> None:
    array = floats(6, 3).astype(dtype)
    array[4, 1] = value
    with pytest.raises(CalibrationError, match=r"input 'x'.*sample 4 holds NaN or Inf"):
        load(array)


def test_overflow_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"sample 0 holds NaN or Inf \(as float16\)"):
        load(np.full((2, 3), 1e6, np.float32), TensorInfo("x", "tensor(float16)", ("batch", 3)))


# Bad sources

BAD_DATA: dict[str, tuple[object, list[TensorInfo], list[str]]] = {
    "rank": (floats(3), [VECTOR], ["the given data", "'x'", "float32[batch, 3]", "samples of []"]),
    "too many axes": (floats(1, 2, 2, 3), [VECTOR], ["float32[batch, 3]", "[2, 2, 3]"]),
    "fixed dimension": (floats(5, 4), [VECTOR], ["'x'", "float32[batch, 3]", "[4]"]),
    "fixed dimension of a whole feed": (floats(2, 3, 3), [FIXED], ["float32[4, 3]", "[3, 3]"]),
    "unknown dimension": (floats(5, 4), [TensorInfo("x", "tensor(float)", (None, 3))], ["float32[?, 3]"]),
    "empty array": (floats(0, 3), [VECTOR], ["the given data", "'x'", "no samples"]),
    "empty list": ([], [VECTOR], ["the given data: too few samples"]),
    "empty mapping": ({}, [VECTOR], ["holds nothing", "'x'"]),
    "empty reader": (Reader([]), [VECTOR], ["too few samples"]),
    "less than a batch": (floats(3, 3), [FIXED], ["the given data", "too few samples; give 4 or more"]),
    "missing name": ({"x": floats(2, 3), "z": floats(2, 2)}, PAIR, ["holds 'x', 'z'", "'y' expects float32[batch, 2]"]),
    "which array": ({"a": floats(2, 3), "b": floats(2, 3)}, [VECTOR], ["'a', 'b'", "input 'x'", "--calib-key"]),
    "one array, two inputs": (floats(2, 3), PAIR, ["(unnamed)", "'x' expects", "'y' expects", "name the arrays"]),
    "objects": ({"x": np.array([[{}, None, 1]], object)}, [VECTOR], ["'x'", "object"]),
    "ragged": ({"x": [[1.0], [1.0, 2.0]]}, [VECTOR], ["the given data", "'x' expects float32[batch, 3]", "cannot be read"]),
    "no mapping": ([{"x": floats(1, 3)}, (floats(1, 3), 1)], [VECTOR], ["feed 1", "mapping", "tuple"]),
    "no source": (3, [VECTOR], ["int", "give a path"]),
    "feed names itself": ([{"x": floats(1, 3)}, {"x": floats(1, 4)}], [VECTOR], ["feed 1", "[4]"]),
    "some with one more axis": ({"x": floats(2, 1, 3), "y": floats(2, 2)}, PAIR, ["'x' expects float32[batch, 3]", "[1, 3]"]),
    "numbers of feeds": ({"x": floats(2, 1, 3), "y": floats(3, 1, 2)}, PAIR, ["'x' expects", "feeds of [2, 1, 3]"]),
    "no inputs": (floats(2, 3), [], ["no inputs"]),
    "channels": (pixels(2, 8, 6, 4), [IMAGE], ["[batch, 3, 8, 6]", "samples of [4, 8, 6]"]),
    "gray for colour": (pixels(2, 8, 6), [IMAGE], ["samples of [1, 8, 6]"]),
    "image size": (pixels(2, 9, 9, 3), [IMAGE], ["samples of [3, 9, 9]", "--image-size 8,6"]),
    "pixels for a vector": (pixels(2, 3), [VECTOR], ["uint8[2, 3]", "as images", "cast it to float32"]),
    "flat pixels for images": (pixels(2, 99), [IMAGE], ["uint8[2, 99]", "as images"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case: str) -> None:
    source, inputs, fragments = BAD_DATA[case]
    with pytest.raises(CalibrationError) as caught:
        load_samples(source, inputs, DataOptions())
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


def save_pickled(path: Path) -> None:
    np.save(path, np.array([{}, {}], object), allow_pickle=True)


def save_pickled_npz(path: Path) -> None:
    np.savez(path, x=np.array([{}, {}], object))


def save_truncated(path: Path) -> None:
    np.savez(path, x=floats(100, 3))
    path.write_bytes(path.read_bytes()[:-400])


def save_damaged(path: Path) -> None:
    np.savez(path, x=floats(100, 3))
    raw = bytearray(path.read_bytes())
    raw[400:420] = bytes(20)
    path.write_bytes(raw)


def save_short(path: Path) -> None:
    np.save(path, floats(100, 3))
    path.write_bytes(path.read_bytes()[:-100])


def save_external(path: Path) -> None:
    tensor = TensorProto(name="x", dims=[1, 3], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    path.parent.mkdir()
    path.write_bytes(tensor.SerializeToString())


def save_set(content: bytes) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        path.parent.mkdir()
        path.write_bytes(content)

    return save


@pytest.mark.parametrize(
    ("name", "save", "fragments"),
    [
        ("none.npz", lambda _: None, ["none.npz", "no such file", "'random'"]),
        ("d.npz", save_truncated, ["d.npz", "cannot be read"]),
        ("d.npz", save_damaged, ["d.npz", "cannot be read"]),
        ("d.npz", save_pickled_npz, ["d.npz", "allow_pickle=False"]),
        ("d.npz", lambda path: path.write_bytes(b"not a zip"), ["d.npz", "cannot be read"]),
        ("d.npy", save_short, ["d.npy", "cannot be read"]),
        ("d.npy", save_pickled, ["d.npy", "allow_pickle=False"]),
        ("d.npy", lambda path: path.write_bytes(b""), ["d.npy", "cannot be read"]),
        ("d.npy", lambda path: np.save(path, floats(2, 4)), ["d.npy", "'x'", "[4]"]),
        ("d.csv", lambda path: path.write_text("1,2,3"), ["d.csv", "not calibration data", ".npz or .npy"]),
        ("folder", lambda path: path.mkdir(), ["folder", "not calibration data (the folder is empty)"]),
        ("folder", lambda path: (path / "cat").mkdir(parents=True), ["folder", "(subfolders are not searched)"]),
        ("test_data_set_0", lambda path: path.mkdir(), ["test_data_set_0", "not calibration data"]),
        ("test_data_set_0/x.pb", save_set(b""), ["test_data_set_0", "holds nothing", "input 'x' expects float32[batch, 3]"]),
        ("test_data_set_0/input_0.pb", save_set(b"\xff\xfejunk"), ["input_0.pb", "cannot be read"]),
        ("test_data_set_0/input_0.pb", save_set(b""), ["input_0.pb", "cannot be read"]),
        ("test_data_set_0/input_0.pb", save_external, ["input_0.pb", "another file"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, save: Callable[[Path], object], fragments: list[str]) -> None:
    save(tmp_path / name)
    with pytest.raises(CalibrationError) as caught:
        load(tmp_path / name if "/" not in name else tmp_path)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


@pytest.mark.parametrize("kind", ["<M8[s/0]", "<M8[s\\x2f0]"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_type_that_numpy_would_crash_on(tmp_path: Path, kind: str, suffix: str) -> None:
    header = f"{{'descr':'{kind}','fortran_order':False,'shape':(4,3)}}\n".encode()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(96)
    path = tmp_path / f"d{suffix}"
    if suffix == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    with pytest.raises(CalibrationError, match="names a type that is no number"):
        load(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
@pytest.mark.parametrize("link", [False, True])
def test_test_data_that_is_no_file(tmp_path: Path, link: bool) -> None:
    (tmp_path / "test_data_set_0").mkdir()
    path = tmp_path / "test_data_set_0" / "input_0.pb"
    if link:
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    with pytest.raises(CalibrationError, match=r"input_0\.pb: not a regular file"):
        load(tmp_path)


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_members_of_an_npz(tmp_path: Path, kind: int) -> None:
    buffer = io.BytesIO()
    np.save(buffer, floats(4, 3))
    with zipfile.ZipFile(tmp_path / "d.npz", "w", kind) as archive:
        archive.writestr("x.npy", buffer.getvalue())
    assert len(load(tmp_path / "d.npz")) == 4
    raw, failed = (tmp_path / "d.npz").read_bytes(), []
    for position in range(35, 80):
        (tmp_path / "d.npz").write_bytes(raw[:position] + bytes([raw[position] ^ 0xFF]) + raw[position + 1 :])
        try:
            assert len(load(tmp_path / "d.npz")) == 4  # where it said how large a window to unpack with
        except CalibrationError as error:
            failed.append(str(error))
    assert len(failed) > 30


@settings(deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255), kind=st.sampled_from(["npz", "npy", "pb"]))
def test_damaged_files_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, kind: str
) -> None:
    buffer, array = io.BytesIO(), floats(4, 3)
    if kind == "npz":
        np.savez_compressed(buffer, x=array)
    elif kind == "npy":
        np.save(buffer, array)
    else:
        buffer.write(numpy_helper.from_array(array).SerializeToString())
    raw = bytearray(buffer.getvalue())
    raw[position % len(raw)] = value
    folder = tmp_path_factory.mktemp("test_data_set_", numbered=True)
    (folder / ("input_0.pb" if kind == "pb" else f"d.{kind}")).write_bytes(raw)
    try:
        samples, message = load(folder if kind == "pb" else folder / f"d.{kind}"), ""
    except CalibrationError as error:
        samples, message = None, str(error)
    assert str(folder) in message if samples is None else joined(samples).shape[1] == 3


def test_members_of_an_npz_that_are_no_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x", b"not an array")
    with pytest.raises(CalibrationError, match="magic string"):
        load(tmp_path / "d.npz")


# Options that are wrong or cannot apply


@pytest.mark.parametrize(
    ("source", "inputs", "options", "fragment"),
    [
        ({"a": floats(2, 3), "b": floats(2, 3)}, [VECTOR], {"key": "c"}, "holds 'a', 'b', not ['c']"),
        ({"x": floats(2, 3), "y": floats(2, 2)}, PAIR, {"key": "x"}, "2 inputs"),
        (floats(2, 3), [VECTOR], {"key": "a"}, "holds one array without a name, so no 'a'; leave --calib-key out"),
        ("random", [VECTOR], {"key": "a"}, "random data: holds 'x', not ['a']"),
        (floats(2, 3), [VECTOR], {"random_range": (0, 1)}, "random_range cannot apply"),
        (floats(2, 3), [VECTOR], {"preprocessing": RAW}, "preprocessing cannot apply"),
        ("random", [VECTOR], {"preprocessing": RAW}, "preprocessing cannot apply"),
        (pixels(2, 3), [TensorInfo("x", "tensor(uint8)", ("batch", 3))], {"preprocessing": RAW}, "preprocessing cannot apply"),
        (pixels(2, 8, 6, 3), [IMAGE], {"preprocessing": Preprocessing(mean=(1.0, 2.0))}, "has 2 values, but"),
        (pixels(2, 8, 6, 3), [IMAGE], {"preprocessing": Preprocessing(std=(1.0, 2.0))}, "has 2 values, but"),
        (pixels(2, 8, 6, 1), [IMAGE], {"preprocessing": Preprocessing(std=(1.0, 2.0))}, "1 channels; give 1"),
        (pixels(2, 8, 6, 3), [IMAGE], {"preprocessing": Preprocessing(image_size=(9, 9))}, "[3, 9, 9]"),
    ],
)  # fmt: skip
def test_options_that_cannot_apply(
    source: object, inputs: list[TensorInfo], options: Mapping[str, object], fragment: str
) -> None:
    with pytest.raises(RelRepError) as caught:
        load(source, *inputs, **options)
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataOptions(random_range=(2, 1)),
        lambda: DataOptions(random_range=(0, float("inf"))),
        lambda: Preprocessing(image_size=(0, 3)),
        lambda: Preprocessing(std=(0.0,)),
        lambda: Preprocessing(scale=0.0),
        lambda: Preprocessing(mean=(float("nan"),)),
        lambda: Preprocessing(layout="chw"),  # type: ignore[arg-type]
        lambda: Preprocessing(color="gray"),  # type: ignore[arg-type]
    ],
)
def test_wrong_options(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()


# Images


def expected(images: Array, scale: float = 1 / 255) -> Array:
    return (images * np.float32(scale)).astype(np.float32)


@pytest.mark.parametrize(
    ("array", "info", "nhwc"),
    [
        (pixels(4, 8, 6, 3), IMAGE, lambda a: a),
        (pixels(4, 3, 8, 6), IMAGE, lambda a: a.transpose(0, 2, 3, 1)),
        (pixels(4, 8, 6, 3), NHWC, lambda a: a),
        (pixels(4, 3, 8, 6), NHWC, lambda a: a.transpose(0, 2, 3, 1)),
        (pixels(4, 8, 6), TensorInfo("x", "tensor(float)", ("batch", 1, 8, 6)), lambda a: a[..., None]),
        (pixels(4, 8, 6, 5), TensorInfo("x", "tensor(float)", ("batch", 5, "h", "w")), lambda a: a),
        (pixels(4, 5, 8, 6), TensorInfo("x", "tensor(float)", ("batch", 5, "h", "w")), lambda a: a.transpose(0, 2, 3, 1)),
        (pixels(4, 8, 6, 3), TensorInfo("x", "tensor(float16)", ("batch", 3, 8, 6)), lambda a: a),
        (pixels(4, 8, 6, 3), TensorInfo("x", "tensor(float)", ()), lambda a: a),
    ],
)
def test_pixel_arrays(array: Array, info: TensorInfo, nhwc: Callable[[Array], Array]) -> None:
    got = joined(load(array, info), batch_size=3)
    want = expected(nhwc(array))
    assert got.dtype == info.dtype
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got, want if info is NHWC else want.transpose(0, 3, 1, 2), rtol=1e-3)


def test_pixels_stay_pixels_in_memory() -> None:
    array = pixels(4, 3, 8, 6)
    for entry in load(array, IMAGE).entries:
        assert entry.arrays["x"].dtype == np.uint8
        assert np.shares_memory(entry.arrays["x"], array)


def test_scale_mean_and_std() -> None:
    array = pixels(4, 8, 6, 3)
    how = Preprocessing(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), scale=2.0, layout="nhwc")
    got = joined(load(array, TensorInfo("x", "tensor(float)", (None, None, None, None)), preprocessing=how))
    np.testing.assert_allclose(got, (array * 2.0 - [1, 2, 3]) / [4, 5, 6], rtol=1e-5)


def test_one_mean_for_all_channels_and_the_default_scale() -> None:
    array = pixels(4, 8, 6, 3)
    got = joined(load(array, NHWC, preprocessing=Preprocessing(mean=(0.5,), std=(0.5,))))
    np.testing.assert_allclose(got, (array / 255 - 0.5) / 0.5, atol=1e-6)


def test_bgr_needs_three_channels() -> None:
    with pytest.raises(ConfigError, match=r"the given data: input 'x' .*'bgr' cannot apply to images with 1 channels"):
        load(pixels(2, 8, 6), OPEN_IMAGE, preprocessing=Preprocessing(color="bgr"))


def test_bgr() -> None:
    array = pixels(4, 8, 6, 3)
    got = joined(load(array, NHWC, preprocessing=Preprocessing(scale=1.0, color="bgr")))
    np.testing.assert_array_equal(got, array[..., ::-1])


def test_whole_feeds_of_images() -> None:
    array = pixels(5, 2, 8, 6, 3)
    samples = load(array, IMAGE)
    assert [feeds["x"].shape for feeds in samples.batches(9)] == [(2, 3, 8, 6)] * 5


def test_resize() -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is an optional dependency")
    array = pixels(2, 20, 10, 3)
    got = joined(load(array, IMAGE, preprocessing=Preprocessing(image_size=(8, 6), scale=1.0)))
    want = [np.asarray(image.fromarray(a).resize((6, 8), image.Resampling.BILINEAR)) for a in array]
    np.testing.assert_array_equal(got.transpose(0, 2, 3, 1), np.stack(want))


@pytest.fixture
def image_folder(tmp_path: Path) -> tuple[Path, list[Array]]:
    image = pytest.importorskip("PIL.Image", reason="Pillow is an optional dependency")
    arrays = [pixels(8, 6, 3), pixels(8, 6, 3) // 2, np.full((8, 6, 3), 7, np.uint8)]
    for name, array in zip(["a.png", "b.BMP", "c.png"], arrays, strict=True):
        image.fromarray(array).save(tmp_path / name)
    return tmp_path, arrays


@pytest.mark.parametrize("info", [IMAGE, OPEN_IMAGE, NHWC])
def test_image_files(image_folder: tuple[Path, list[Array]], info: TensorInfo) -> None:
    folder, arrays = image_folder
    samples = load(folder, info)
    want = expected(np.stack(arrays))
    assert lengths(samples, 2) == [2, 1]
    np.testing.assert_allclose(joined(samples), want if info is NHWC else want.transpose(0, 3, 1, 2), rtol=1e-6)


def test_image_files_are_resized_to_a_fixed_model(image_folder: tuple[Path, list[Array]]) -> None:
    samples = load(image_folder[0], TensorInfo("x", "tensor(float)", ("batch", 3, 16, 4)))
    assert [feeds["x"].shape for feeds in samples.batches(8)] == [(3, 3, 16, 4)]


def test_image_files_of_many_sizes_are_batched_apart(image_folder: tuple[Path, list[Array]]) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is an optional dependency")
    folder, _ = image_folder
    image.fromarray(pixels(5, 5)).save(folder / "d.png")
    assert [feeds["x"].shape for feeds in load(folder, OPEN_IMAGE).batches(8)] == [(3, 3, 8, 6), (1, 3, 5, 5)]
    asked = load(folder, OPEN_IMAGE, preprocessing=Preprocessing(image_size=(4, 2)))
    assert [feeds["x"].shape for feeds in asked.batches(8)] == [(4, 3, 4, 2)]


def test_image_files_for_a_gray_model(image_folder: tuple[Path, list[Array]]) -> None:
    samples = load(image_folder[0], TensorInfo("x", "tensor(float)", ("batch", 1, 8, 6)), preprocessing=RAW)
    np.testing.assert_array_equal(joined(samples)[2], np.full((1, 8, 6), 7))


def test_image_file_that_is_none(image_folder: tuple[Path, list[Array]]) -> None:
    (image_folder[0] / "b.BMP").write_bytes(b"not an image")
    with pytest.raises(CalibrationError, match=r"b\.BMP: cannot be read"):
        load(image_folder[0], IMAGE)


def test_truncated_image_file(image_folder: tuple[Path, list[Array]]) -> None:
    path = image_folder[0] / "a.png"
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(CalibrationError, match=r"a\.png: cannot be read"):
        load(image_folder[0], IMAGE)


def test_image_file_of_16_bits(image_folder: tuple[Path, list[Array]]) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is an optional dependency")
    image.fromarray(np.full((8, 6), 40000, np.uint16)).save(image_folder[0] / "a.png")
    with pytest.raises(CalibrationError, match="more than 8 bits"):
        load(image_folder[0], IMAGE)


@pytest.mark.parametrize("limit", [40, 10])  # Pillow warns from 48 pixels on, and refuses more than twice the limit
def test_image_file_too_large(image_folder: tuple[Path, list[Array]], monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is an optional dependency")
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(CalibrationError, match=r"a\.png: cannot be read .*decompression bomb.*leave it out"):
        load(image_folder[0], IMAGE)


@pytest.mark.parametrize("content", ["bomb", "eps", "gif"])
def test_image_file_of_another_format(image_folder: tuple[Path, list[Array]], content: str) -> None:
    """A bomb inside another file is only seen when the pixels are read; an EPS would start Ghostscript."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is an optional dependency")
    path = image_folder[0] / "a.png"
    if content == "bomb":
        header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
        inner = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
        block = b"ic07" + struct.pack(">I", len(inner) + 8) + inner
        path.write_bytes(b"icns" + struct.pack(">I", len(block) + 8) + block)
    elif content == "eps":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 8\n%%EndComments\nshowpage\n%%EOF\n")
    else:
        image.fromarray(pixels(8, 6)).save(path, "GIF")
    with pytest.raises(CalibrationError, match=r"a\.png: cannot be read \(UnidentifiedImageError"):
        load(image_folder[0], IMAGE)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_transparency_is_left_out_without_a_word(image_folder: tuple[Path, list[Array]]) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is an optional dependency")
    picture = image.fromarray(pixels(8, 6, 3)).quantize(8)
    picture.save(image_folder[0] / "a.png", transparency=bytes(range(8)))
    np.testing.assert_array_equal(
        joined(load(image_folder[0], IMAGE, preprocessing=RAW))[0], np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    )


def test_image_files_for_a_uint8_model(image_folder: tuple[Path, list[Array]]) -> None:
    folder, arrays = image_folder
    got = joined(load(folder, TensorInfo("x", "tensor(uint8)", ("batch", "h", "w", 3))))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.stack(arrays))


def test_pixels_for_one_of_two_inputs() -> None:
    array = pixels(2, 8, 6, 3)
    (feeds,) = load({"x": array, "y": floats(2, 2)}, IMAGE, PAIR[1]).batches(4)
    np.testing.assert_allclose(feeds["x"], expected(array).transpose(0, 3, 1, 2), rtol=1e-6)
    np.testing.assert_array_equal(feeds["y"], floats(2, 2))


@pytest.mark.parametrize(
    ("inputs", "options", "fragment"),
    [
        (PAIR, {}, r"a\.png: holds '\(unnamed\)'"),
        ([TensorInfo("x", "tensor(uint8)", ("batch", 3, 8, 6))], {}, r"a\.png: input 'x' expects uint8.*samples of \[8, 6, 3\]"),
        ([IMAGE], {"key": "x"}, r"a\.png: holds one array without a name, so no 'x'"),
        ([VECTOR], {}, "as images"),
    ],
)
def test_image_files_that_cannot_serve(
    image_folder: tuple[Path, list[Array]], inputs: list[TensorInfo], options: Mapping[str, object], fragment: str
) -> None:
    with pytest.raises(RelRepError, match=fragment):
        load(image_folder[0], *inputs, **options)


def test_images_and_arrays_in_one_folder(image_folder: tuple[Path, list[Array]]) -> None:
    np.save(image_folder[0] / "z.npy", floats(2, 3))
    with pytest.raises(CalibrationError, match=r"z\.npy: input 'x'"):
        load(image_folder[0], IMAGE)


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CalibrationError, match=r"pip install 'relrep-onnx\[images\]'"):
        load(tmp_path, IMAGE)


# Random data


@pytest.mark.parametrize("others", [[], [VECTOR]])
def test_random_data_for_an_input_without_a_rank(others: list[TensorInfo]) -> None:
    anything = TensorInfo("any", "tensor(float)", ())
    samples = load("random", anything, *others, num_samples=4, input_shapes={"any": (1, 5)})
    rows = 1 if others else 2
    assert [feeds["any"].shape for feeds in samples.batches(2)] == [(rows, 5)] * (4 // rows)


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"input 'x' has the shape \[0, 3\], a batch of none"):
        load(floats(8, 3), TensorInfo("x", "tensor(float)", (0, 3)))


def test_random_floats() -> None:
    samples = load("random", IMAGE)
    array = joined(samples)
    assert (samples.source, samples.random, len(samples)) == ("random", True, 64)
    assert array.shape == (64, 3, 8, 6)
    assert array.dtype == np.float32
    assert abs(array.mean()) < 0.05
    assert abs(array.std() - 1) < 0.05


def test_random_depends_on_the_seed_alone() -> None:
    first, again, other = (load("random", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(joined(first), joined(again))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("first", "num_samples", "count"), [("n", None, 64), (1, None, 64), (48, None, 192), ("n", 7, 7), (4, 7, 4)]
)
def test_random_count(first: int | str, num_samples: int | None, count: int) -> None:
    assert len(load("random", TensorInfo("x", "tensor(float16)", (first, 3)), num_samples=num_samples)) == count


def test_random_integers_floats_and_bools() -> None:
    (feeds,) = load("random", IDS, VECTOR, MASK, random_range=(5, 7), input_shapes={"ids": (1, 9)}).batches(64)
    assert feeds["ids"].shape == (64, 9)
    assert feeds["ids"].dtype == np.int64
    assert set(feeds["ids"].flat) == {5, 6, 7}
    assert set(feeds["mask"].flat) == {False, True}
    assert feeds["x"].min() < 0


def test_random_range_is_for_floats_where_there_are_no_integers() -> None:
    array = joined(load("random", random_range=(2, 3)))
    assert array.dtype == np.float32
    assert 2 <= array.min() < 2.2 < 2.8 < array.max() <= 3


@pytest.mark.parametrize(
    ("other", "shape"),
    [(SCALAR, ()), (TensorInfo("t", "tensor(float)", ("boxes", 4)), (1, 4)), (TensorInfo("t", "tensor(float)", (5,)), (5,))],
)
def test_random_feeds_without_a_common_batch_run_whole(other: TensorInfo, shape: tuple[int, ...]) -> None:
    samples = load("random", VECTOR, other, num_samples=6)
    assert [(feeds["x"].shape, feeds["t"].shape) for feeds in samples.batches(3)] == [((1, 3), shape)] * 6


@pytest.mark.parametrize(
    ("inputs", "options", "kind", "fragments"),
    [
        ([OPEN_IMAGE], {}, CalibrationError, ["'x'", "height", "--input-shape x:1,3,?,?"]),
        ([TensorInfo("x", "tensor(float)", ("n", None))], {}, CalibrationError, ["float32[n, ?]", "--input-shape x:1,?"]),
        ([IDS], {"input_shapes": {"ids": (1, 4)}}, CalibrationError, ["'ids'", "--random-range"]),
        ([IDS], {"input_shapes": {"ids": (1, 4)}, "random_range": (0.2, 0.8)}, ConfigError, ["--random-range 0.2,0.8"]),
        ([TensorInfo("x", "tensor(uint8)", ("n",))], {"random_range": (0, 256)}, ConfigError, ["--random-range 0,256", "uint8"]),
        ([VECTOR], {"input_shapes": {"z": (1, 3)}}, ConfigError, ["'z'", "'x'"]),
        ([VECTOR], {"input_shapes": {"x": (1, 4)}}, CalibrationError, ["float32[batch, 3]", "[4]"]),
        ([VECTOR], {"input_shapes": {"x": (3,)}}, CalibrationError, ["float32[batch, 3]", "[3]"]),
        ([IDS], {"input_shapes": {"ids": (1, 0)}}, CalibrationError, ["[1, 0]"]),
        ([SCALAR], {"input_shapes": {SCALAR.name: (1, 0)}}, CalibrationError, ["[1, 0]"]),
        ([TensorInfo("x", "tensor(float)", ("n", 2**60, 16))], {}, CalibrationError, ["'x'", "do not fit into memory"]),
        ([VECTOR], {"random_range": (-1e308, 1e308)}, ConfigError, ["random_range is (-1e+308, 1e+308)"]),
    ],
)  # fmt: skip
def test_random_that_cannot_be_made(
    inputs: list[TensorInfo], options: Mapping[str, object], kind: type[RelRepError], fragments: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        load("random", *inputs, **options)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


# Holdout and fingerprint


@settings(deadline=None)
@given(count=st.integers(4, 900))
def test_holdout(count: int) -> None:
    samples = load(floats(count, 3))
    parts = split_holdout(samples)
    calibration, decide, verify = map(len, parts)
    held = decide + verify
    assert calibration + held == count
    assert held == min(max(count // 8, 32), count // 2)
    assert decide <= verify <= decide + 1
    assert decide >= 1
    np.testing.assert_array_equal(np.concatenate([joined(part) for part in parts]), floats(count, 3))


@settings(deadline=None)
@given(batches=st.integers(4, 60), extra=st.integers(0, 3))
def test_holdout_of_a_fixed_batch_loses_nothing(batches: int, extra: int) -> None:
    samples = load(floats(4 * batches + extra, 3), FIXED)
    parts = [len(part) for part in split_holdout(samples)]
    assert sum(parts) == 4 * batches
    assert min(parts) > 0
    assert all(part % 4 == 0 for part in parts)


def test_holdout_of_large_batches_is_one_to_decide_and_one_to_verify() -> None:
    samples = load(floats(64 * 5, 3), TensorInfo("x", "tensor(float)", (64, 3)))
    assert [len(part) for part in split_holdout(samples)] == [192, 64, 64]


@pytest.mark.parametrize(("rows", "info", "need"), [(1, VECTOR, "two samples"), (4, FIXED, "two of its batches")])
def test_halves_are_never_empty(rows: int, info: TensorInfo, need: str) -> None:
    with pytest.raises(CalibrationError, match=f"gives {rows} samples, .*; give at least {need}"):
        halves(load(floats(rows, 3), info))
    assert [len(part) for part in halves(load(floats(2 * rows, 3), info))] == [rows, rows]


@pytest.mark.parametrize(("rows", "info", "least"), [(3, VECTOR, 4), (15, FIXED, 16)])
def test_holdout_needs_samples(rows: int, info: TensorInfo, least: int) -> None:
    with pytest.raises(CalibrationError, match=f"at least {least}"):
        split_holdout(load(floats(rows, 3), info))


def test_fingerprint_is_stable_and_tells_data_apart() -> None:
    array = pixels(4, 8, 6, 3)
    variants: list[tuple[object, TensorInfo, dict[str, Any]]] = [
        (array, IMAGE, {}),
        (array, IMAGE, {"preprocessing": RAW}),
        (array, TensorInfo("z", IMAGE.type, IMAGE.shape), {}),
        (array[::-1], IMAGE, {}),
        (array[:3], IMAGE, {}),
        (expected(array).transpose(0, 3, 1, 2), IMAGE, {}),
    ]
    first, again = ([load(source, info, **options).fingerprint() for source, info, options in variants] for _ in range(2))
    assert first == again
    assert len(set(first)) == len(variants)
    assert all(len(digest) == 64 for digest in first)


def test_fingerprint_is_about_content_not_origin(tmp_path: Path) -> None:
    assert load(save_npy(tmp_path)).fingerprint() == load([{"x": floats(6, 3)}]).fingerprint()
