"""Sources: files, folders, arrays, feeds or random data, each read part by part, a part as a mapping of name to array."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Final

import numpy as np
from onnx import TensorProto, numpy_helper

from relrep_onnx.data.arrays import read_arrays
from relrep_onnx.data.images import SUFFIXES as IMAGES
from relrep_onnx.data.images import Preprocessing
from relrep_onnx.data.samples import GIVEN, Entry, Input, Samples, entries_of, errors_naming, fixed_batches, join, runs
from relrep_onnx.memory import has_room
from relrep_onnx.types import Array, CalibrationError, ConfigError, TensorInfo

ARRAYS: Final = (".npz", ".npy")
UNNAMED: Final = "(unnamed)"
"""The name of an array that has none."""


@dataclass(frozen=True)
class DataOptions:
    """How a source is read; `input_shapes` resolves symbolic dimensions of random data, `num_samples` takes the first ones.

    `skip_bad` leaves out samples that cannot be read or do not fit, instead of failing on them.
    """

    key: str | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    num_samples: int | None = None
    random_range: tuple[float, float] | None = None
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.random_range is not None and not 0 <= self.random_range[1] - self.random_range[0] < math.inf:
            raise ConfigError(f"random_range is {self.random_range}; give a low and a high end, such as 0, 999")


def load_samples(source: object, inputs: Sequence[TensorInfo], options: DataOptions) -> Samples:
    """Reads calibration data.

    Args:
        source: a path (.npz, .npy; a folder of those, of images, or of ONNX Runtime test data), the word 'random', an array, a
            mapping of input name to array, an iterable of either, or an object whose `get_next()` gives them until None.
        inputs, options: what the model wants, and how the source is read.

    Raises:
        CalibrationError: the data cannot be read, or do not fit the inputs.
        ConfigError: an option cannot apply.
    """
    if not inputs:
        raise CalibrationError("the model has no inputs, so no data can reach it")
    if options.key is not None and len(inputs) > 1:
        raise ConfigError(f"key {options.key!r} picks one array, but the model has {len(inputs)} inputs; name arrays after them")
    is_path = isinstance(source, str | os.PathLike)
    random = isinstance(source, str) and source == "random"
    if options.random_range is not None and not random:
        raise ConfigError("random_range cannot apply: the data are not random; leave it out")
    reader = _Reader([Input.of(info, options.preprocessing) for info in inputs], options)
    entries = list(islice(reader.entries(source, random), options.num_samples))
    if options.preprocessing != Preprocessing() and not any(i.is_image(e.arrays[i.name]) for e in entries for i in reader.inputs):
        raise ConfigError("preprocessing cannot apply: no uint8 images feed a float input; leave it out")
    for batch in (fixed := fixed_batches(reader.inputs)):
        full = (run for run in runs(entries, batch) if run[0].alone or len(run) == batch)
        entries = [
            run[0] if run[0].alone else Entry(join(run), True, batch, f"{run[0].place} and those after it") for run in full
        ]
    if not entries and reader.left_out:
        raise CalibrationError(f"no sample is left; the first that was left out: {reader.left_out[0]}")
    if not entries:
        raise CalibrationError(f"{source if is_path else GIVEN}: too few samples; give {max(fixed, default=4)} or more")
    return Samples(str(source) if is_path else "python", random, reader.inputs, entries, tuple(reader.left_out))


def lasting(source: object) -> object:
    """The source where it can be read again, and by other processes: feeds that come once become a list, a path absolute.

    Raises:
        CalibrationError: it is no source.
    """
    if isinstance(source, np.ndarray | Mapping | list) or source in (None, "random"):
        return source
    return Path(source).absolute() if isinstance(source, str | os.PathLike) else list(_feeds(source))


def files_of(source: object) -> list[Path]:
    """The files that a source would be read from; none where it is no path, or nothing is there."""
    if not isinstance(source, str | os.PathLike) or source == "random":
        return []
    try:
        found = _find(Path(source))
    except (CalibrationError, OSError):
        return []
    return [file for path in found for file in (path.glob("input_*.pb") if path.is_dir() else [path])]


def _feeds(source: object) -> Iterable[object]:
    """The feeds of an iterable or a CalibrationDataReader."""
    if callable(get_next := getattr(source, "get_next", None)):
        return takewhile(lambda feed: feed is not None, iter(get_next, object()))
    if isinstance(source, Iterable):
        return source
    raise CalibrationError(f"cannot calibrate with a {type(source).__name__}; give a path, arrays or feeds")


@dataclass(frozen=True)
class _Reader:
    inputs: Sequence[Input]
    options: DataOptions
    left_out: list[str] = field(default_factory=list)

    def entries(self, source: object, random: bool) -> Iterator[Entry]:
        for place, part in [("random data", _random(self.inputs, self.options))] if random else self._parts(source):
            arrays: Mapping[str, object] = {}
            try:
                with errors_naming(place):
                    arrays = self._arrays(part)
                    entries = entries_of(self.inputs, arrays, place)
            except CalibrationError as error:
                if not self.options.skip_bad:
                    raise
                entries = list(self._good(arrays, place, error))
            yield from entries

    def _good(self, arrays: Mapping[str, object], place: object, error: CalibrationError) -> Iterator[Entry]:
        """The samples of a part that fit, if it can be parted; of the others is kept what is wrong with them."""
        parted = [value for value in arrays.values() if isinstance(value, np.ndarray) and value.ndim]
        lengths = {len(value) for value in parted}
        if not parted or len(parted) < len(arrays) or len(lengths) > 1 or lengths <= {0, 1}:
            self.left_out.append(str(error))
            return
        for row in range(lengths.pop()):
            where = f"{place}, sample {row}"
            try:
                with errors_naming(where):
                    entries = entries_of(
                        self.inputs, {name: value[row : row + 1] for name, value in zip(arrays, parted, strict=True)}, where
                    )
            except CalibrationError as one:
                self.left_out.append(str(one))
            else:
                yield from entries

    def _parts(self, source: object) -> Iterable[tuple[object, object]]:
        """What is read in one go, each with the place that errors name."""
        if isinstance(source, str | os.PathLike):
            with errors_naming(source):
                return [(path, path) for path in _find(Path(source))]
        if isinstance(source, np.ndarray | Mapping):
            return [(GIVEN, source)]
        return ((f"{GIVEN}, feed {index}", feed) for index, feed in enumerate(_feeds(source)))

    def _arrays(self, part: object) -> dict[str, object]:
        match part:
            case Mapping():
                return self._pick(part)
            case np.ndarray():
                return self._pick({UNNAMED: part})
            case Path() if part.is_dir():
                return self._pick(_read_test_data(part, [i.name for i in self.inputs]))
            case Path() if _regular(part).suffix.lower() in IMAGES:
                return self._arrays(self.inputs[0].images.read(part))
            case Path():
                return self._arrays(read_arrays(part))
        raise CalibrationError(f"got a {type(part).__name__}; give a mapping of input name to array")

    def _pick(self, arrays: Mapping[str, object]) -> dict[str, object]:
        """The arrays of the inputs: the key's if one is given, else by name, else the only one there is."""
        key, names = self.options.key, [i.name for i in self.inputs]
        if key is not None and UNNAMED in arrays:
            raise CalibrationError(f"holds one array without a name, so no {key!r}; leave --calib-key out")
        keys = [key] if key is not None else list(arrays) if len(arrays) == len(names) == 1 else names
        if all(key in arrays for key in keys):
            return {name: arrays[key] for name, key in zip(names, keys, strict=True)}
        held, wants = ", ".join(map(repr, arrays)) or "nothing", ", ".join(map(str, self.inputs))
        pick = ", or pick one with --calib-key" if len(names) == 1 else ""
        raise CalibrationError(f"holds {held}, not {keys}; {wants}; name the arrays so{pick}")


def _random(inputs: Sequence[Input], options: DataOptions) -> dict[str, object]:
    """Made-up arrays: samples along axis 0 where all inputs share it, otherwise whole feeds."""
    if unknown := sorted(options.input_shapes.keys() - {i.name for i in inputs}):
        raise ConfigError(f"--input-shape names {unknown[0]!r}, but {', '.join(map(str, inputs))}; name one of them")
    # An input without a rank may get any.
    ranked = {i.name: i.shape or (None,) * len(options.input_shapes.get(i.name, ())) for i in inputs}
    whole = len(first := {dims[:1] for dims in ranked.values()}) > 1 or () in first
    count = options.num_samples or max(64, 4 * max(fixed_batches(inputs), default=0))  # a hold-out takes four batches
    integers, rng = any(i.dtype.kind in "iu" for i in inputs), np.random.default_rng(options.seed)
    arrays: dict[str, object] = {}
    for i in inputs:
        # An open batch is 1, any other open dimension 0.
        own = tuple(dim if isinstance(dim, int) else int(axis == 0) for axis, dim in enumerate(ranked[i.name]))
        shape = options.input_shapes.get(i.name, own)
        if len(shape) != len(own) or any(dim < 1 for dim in shape):
            known = ",".join(str(dim or "?") for dim in own)
            raise CalibrationError(f"random data: {i}, not {list(shape)}; fill in --input-shape {i.name}:{known}")
        if not has_room((count, *shape)):
            what = f"{count} of {list(shape)} do not fit into memory; give a smaller --input-shape, or fewer samples"
            raise CalibrationError(f"random data: {i}; {what}")
        limits = None if integers and i.dtype.kind == "f" else options.random_range
        arrays[i.name] = _draw(i, (count, *shape[not whole :]), limits, rng)
    return arrays


def _draw(i: Input, shape: tuple[int, ...], limits: tuple[float, float] | None, rng: np.random.Generator) -> Array:
    """Floats are standard normal unless they have limits; integers need them."""
    if i.dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(np.bool_)
    if i.dtype.kind == "f":
        return rng.uniform(*limits, shape) if limits else rng.standard_normal(shape, np.float32)
    if limits is None:
        raise CalibrationError(f"random data: {i}; say which integers with --random-range, such as 0,999")
    low, high, info = math.ceil(limits[0]), math.floor(limits[1]), np.iinfo(i.dtype)
    if low > high or low < info.min or high > info.max:
        raise ConfigError(f"--random-range {limits[0]:g},{limits[1]:g} holds no integers, or some beyond {i.dtype}; change it")
    return np.asarray(rng.integers(low, high, shape, i.dtype.type, endpoint=True))


def _find(path: Path) -> Sequence[Path]:
    """The files that a path stands for, or the folders of ONNX Runtime test data."""
    if not path.exists():
        raise CalibrationError("no such file or folder; for made-up data say 'random'")
    if folders := list(path.glob("test_data_set_*/")) or [path] * any(path.glob("input_*.pb")):
        return sorted(folders, key=lambda folder: (len(folder.name), folder.name))  # 2 before 10
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if known := [file for file in files if file.suffix.lower() in ARRAYS + IMAGES and not file.name.startswith(".")]:
        return known
    why = " (subfolders are not searched)" if any(file.is_dir() for file in files) else " (the folder is empty)" * (not files)
    known_kinds = ".npz or .npy files, images, or a folder of them or of test_data_set_*"
    raise CalibrationError(f"not calibration data{why}; give {known_kinds}")


def _regular(path: Path) -> Path:
    """The path of what has an end, unlike pipes and devices."""
    if not path.is_file():
        raise CalibrationError("not a regular file; leave it out")
    return path


def _read_test_data(folder: Path, names: Sequence[str]) -> Mapping[str, object]:
    """Where the tensors do not have the names of the inputs, the order of their files counts."""
    tensors: dict[str, object] = {}
    for path in sorted(folder.glob("input_*.pb"), key=lambda path: (len(path.name), path.name)):
        with errors_naming(path.name):
            tensor = TensorProto.FromString(_regular(path).read_bytes())
            if tensor.data_location == TensorProto.EXTERNAL:  # it could name any file
                raise CalibrationError("its data are in another file; store them inside")
            tensors[tensor.name or path.stem] = numpy_helper.to_array(tensor)
    in_order = len(tensors) == len(names) and tensors.keys() != set(names)
    return dict(zip(names, tensors.values(), strict=True)) if in_order else tensors
