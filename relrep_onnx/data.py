"""Calibration data: from whatever the user has to batches a session can run.

Every source becomes blocks: arrays [n, ...] that share one shape, held as they came.  Normally axis 0 is the model's batch axis.
Where a feed must not be cut (one more axis than the input, or inputs that disagree on axis 0) each entry is a whole feed, run
alone.  uint8 data for a float input are images: kept as uint8[n, h, w, c] and converted batch by batch, so memory stays small.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

import numpy as np
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from relrep_onnx.types import Array, CalibrationError, ConfigError, TensorInfo

RANDOM: Final = "random"
RANDOM_SAMPLES: Final = 64
GIVEN: Final = "the given data"
IMAGES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
ARRAYS: Final = frozenset({".npz", ".npy"})
MAX_NPZ_BYTES: Final = 64 * 2**30
UNREADABLE: Final[tuple[type[Exception], ...]] = (
    OSError, ValueError, EOFError, MemoryError, RuntimeError, SyntaxError, TypeError, zipfile.BadZipFile, zlib.error,
    LookupError, DecodeError, struct.error, tokenize.TokenError,
)  # fmt: skip


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels to a float input: value = (pixel * scale - mean) / std.

    Attributes:
        image_size: height and width to resize to.
        mean: one value, or one per channel in the model's channel order; 0 by default.
        std: the same; 1 by default.
        scale: 1/255 by default.
        layout: what the model wants; by default its shape tells.
        color: channel order the model wants; files and arrays are RGB.
    """

    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    color: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ConfigError(f"image_size is {self.image_size}; give a height and a width of at least 1")
        if not all(math.isfinite(v) for v in (*(self.mean or ()), *(self.std or ()), self.scale or 0.0)):
            raise ConfigError("mean, std and scale must be finite numbers")
        if self.std is not None and 0 in self.std:
            raise ConfigError(f"std is {self.std}; it divides, so it must not be 0")
        if self.layout not in (None, "nchw", "nhwc") or self.color not in ("rgb", "bgr"):
            raise ConfigError(f"layout {self.layout!r}, color {self.color!r}: use 'nchw' or 'nhwc', and 'rgb' or 'bgr'")


@dataclass(frozen=True)
class DataOptions:
    """How a source is read; `input_shapes` resolves symbolic dimensions of random data, `num_samples` takes the first ones."""

    key: str | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    num_samples: int | None = None
    random_range: tuple[float, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ConfigError(f"num_samples is {self.num_samples}; it must be at least 1")
        if self.random_range is not None:
            low, high = self.random_range
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ConfigError(f"random_range is {low}, {high}; give a low and a high end, such as 0, 999")


@dataclass(frozen=True)
class _Input:
    """One input of the model, and how data is made to fit it."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    how: Preprocessing

    @classmethod
    def of(cls, info: TensorInfo, how: Preprocessing) -> _Input:
        if info.dtype is None or info.dtype.kind not in "fiub":
            raise CalibrationError(
                f"input {info.name!r} has type {info.type}; only float, integer and bool tensors can be calibrated"
            )
        return cls(info.name, info.dtype, info.shape, how)

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"input {self.name!r} expects {self.dtype}" + (f"[{dims}]" if self.shape else "")

    def is_image(self, array: Array) -> bool:
        return self.dtype.kind == "f" and array.dtype == np.uint8

    @property
    def channel_axis(self) -> Literal[1, 3]:
        if self.how.layout or len(self.shape) != 4:
            return 3 if self.how.layout == "nhwc" else 1
        return 3 if self.shape[3] in (1, 3) and self.shape[1] not in (1, 3) else 1

    @property
    def channels(self) -> int | None:
        dim = self.shape[self.channel_axis] if len(self.shape) == 4 else None
        return dim if isinstance(dim, int) else None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width to decode files to: as asked, or the model's own where it fixes both."""
        match self.how.image_size, self.spatial:
            case None, (int(height), int(width)):
                return height, width
            case asked, _:
                return asked

    @property
    def spatial(self) -> tuple[int | str | None, ...]:
        return tuple(d for axis, d in enumerate(self.shape) if axis not in (0, self.channel_axis)) if len(self.shape) == 4 else ()

    def extra_axes(self, array: Array) -> int | None:
        """Axes beyond the input's own; None where ONNX Runtime gives no shape: a scalar, or an unknown rank."""
        rank = 4 if self.is_image(array) else len(self.shape)
        return array.ndim - rank if rank else None

    def fit(self, value: object, where: str) -> Array:
        """The value as an array of this input's type, or as uint8[..., h, w, c] where it holds images."""
        try:
            array: Array = np.asarray(value)
        except ValueError as error:
            raise CalibrationError(f"{where}: {self}, but the data are no array: {error}") from error
        array = self._fit_image(array, where) if self.is_image(array) else self._cast(array, where)
        if self.extra_axes(array) not in (None, 0, 1):
            raise CalibrationError(f"{where}: {self}, rank {len(self.shape)}, but the data have shape {list(array.shape)}")
        return array

    def _fit_image(self, array: Array, where: str) -> Array:
        if len(self.shape) not in (0, 4) or array.ndim not in (3, 4, 5):
            shape = list(array.shape)
            raise CalibrationError(
                f"{where}: {self}, which uint8{shape} does not fit as images; if it holds none, cast it to {self.dtype}"
            )
        if array.ndim == 3:
            array = array[..., None]
        first = {1, 3, self.channels}
        if array.shape[-3] in first and array.shape[-1] not in first:
            array = np.moveaxis(array, -3, -1)
        for name, values in (("mean", self.how.mean), ("std", self.how.std)):
            if values is not None and len(values) not in (1, array.shape[-1]):
                raise ConfigError(f"{where}: {name} has {len(values)} values, but the images have {array.shape[-1]} channels")
        return array

    def _cast(self, array: Array, where: str) -> Array:
        integers = {array.dtype.kind, self.dtype.kind} <= {"i", "u"}
        if array.dtype.kind != self.dtype.kind and not integers:
            raise CalibrationError(f"{where}: {self}, but the data have type {array.dtype}")
        if integers and array.size and not np.can_cast(array.dtype, self.dtype):
            low, high, limits = int(array.min()), int(array.max()), np.iinfo(self.dtype)
            if low < limits.min or high > limits.max:
                raise CalibrationError(f"{where}: {self}, which cannot hold the values from {low} to {high}")
        with np.errstate(over="ignore"):  # the check below reports it, with its place
            array = array.astype(self.dtype, copy=False)
        if self.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
            sample = f"sample {np.argwhere(~finite)[0, 0]}" if array.ndim else "the value"
            raise CalibrationError(f"{where}: {self}, but {sample} holds NaN or Inf (as {self.dtype})")
        return array

    def check_dims(self, array: Array, whole: bool, where: str) -> None:
        """Holds what the model will see of one entry against the dimensions it fixes."""
        shape, hint = array.shape, ""
        if self.is_image(array):
            size = self.how.image_size or shape[-3:-1]
            shape = (*shape[:-3], shape[-1], *size) if self.channel_axis == 1 else (*shape[:-3], *size, shape[-1])
        got, want = shape[1:], self.shape if whole else self.shape[1:]
        wrong = [axis - len(want) for axis, dim in enumerate(want) if isinstance(dim, int) and dim != got[axis]]
        if not wrong:
            return
        if self.is_image(array) and not {-4, self.channel_axis - 4} & set(wrong):
            hint = "; resize the images with --image-size " + ",".join(map(str, self.spatial))
        raise CalibrationError(f"{where}: {self}, but the data give {'' if whole else 'samples of '}{list(got)}{hint}")

    def ready(self, array: Array) -> Array:
        """What the session gets: the array, or float[n, c, h, w] (or [n, h, w, c]) from uint8[n, h, w, c]."""
        if not self.is_image(array):
            return array
        pixels = _resize(array, self.how.image_size or array.shape[1:3])
        if self.how.color == "bgr" and pixels.shape[-1] == 3:
            pixels = pixels[..., ::-1]
        values = pixels.astype(np.float32) * np.float32(1 / 255 if self.how.scale is None else self.how.scale)
        mean, std = np.array(self.how.mean or [0.0], np.float32), np.array(self.how.std or [1.0], np.float32)
        return np.ascontiguousarray(np.moveaxis((values - mean) / std, 3, self.channel_axis), self.dtype)


@dataclass(frozen=True, eq=False)
class _Block:
    """Arrays [n, ...] by input name; `step` samples go into a run, None: as many as asked.  Whole: an entry is a feed."""

    arrays: Mapping[str, Array]
    step: int | None
    whole: bool

    @property
    def rows(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def usable(self) -> int:
        return self.rows - self.rows % (self.step or 1)

    @property
    def signature(self) -> object:
        """Equal for blocks that can be joined."""
        return self.whole, [(a.dtype, a.shape[1:]) for a in self.arrays.values()]

    def cut(self, start: int, stop: int) -> _Block:
        return replace(self, arrays={name: a[start:stop] for name, a in self.arrays.items()})

    def runs(self, batch_size: int) -> Iterator[dict[str, Array]]:
        stop, step = self.usable, self.step or batch_size
        for start in range(0, stop, step):
            rows = start if self.whole else slice(start, min(start + step, stop))
            yield {name: a[rows, ...] for name, a in self.arrays.items()}


@dataclass(frozen=True, eq=False)
class Samples:
    """Calibration samples, in order.  Where the model fixes its batch, a remainder that fills no batch is not counted.

    Attributes:
        source: the path, 'random' or 'python'; for messages and the report.
        random: the data are made up.
    """

    source: str
    random: bool
    _inputs: tuple[_Input, ...] = field(repr=False)
    _blocks: tuple[_Block, ...] = field(repr=False)

    def __len__(self) -> int:
        return sum(block.usable for block in self._blocks)

    @property
    def group(self) -> int:
        """Samples that cannot be parted: the batch the model fixes, otherwise 1."""
        return max((block.step or 1 for block in self._blocks), default=1)

    def batches(self, batch_size: int) -> Iterator[dict[str, Array]]:
        """Feeds for the session, in the same order each time, of at most `batch_size` samples where the model leaves it free."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        runs = (run for block in self._blocks for run in block.runs(batch_size))
        return ({i.name: i.ready(run[i.name]) for i in self._inputs} for run in runs)

    def batch_count(self, batch_size: int) -> int:
        """How many feeds `batches` gives."""
        return sum(math.ceil(block.usable / (block.step or batch_size)) for block in self._blocks)

    def split(self, first: int) -> tuple[Samples, Samples]:
        """The first `first` samples, and the rest; cut at a multiple of `group`, or lose what fills no batch."""
        head, tail, left = [], [], max(first, 0)
        for block in self._blocks:
            head.append(block.cut(0, min(left, block.usable)))
            tail.append(block.cut(left, block.usable))
            left = max(left - block.usable, 0)
        return self._with(head), self._with(tail)

    def _with(self, blocks: Iterable[_Block]) -> Samples:
        return replace(self, _blocks=tuple(block for block in blocks if block.usable))

    def fingerprint(self) -> str:
        """SHA-256 over names, types, shapes, values and preprocessing, in hexadecimal."""
        digest = hashlib.sha256(repr([i.how for i in self._inputs]).encode())
        for block in self._blocks:
            for name, array in block.arrays.items():
                digest.update(repr((name, array.dtype.str, array.shape, block.whole)).encode())
                for start in range(0, len(array), 256):  # in pieces: tobytes copies
                    digest.update(array[start : start + 256].tobytes())
        return digest.hexdigest()


def load_samples(source: object, inputs: Sequence[TensorInfo], options: DataOptions) -> Samples:
    """Reads calibration data.

    Args:
        source: a path (.npz, .npy; a folder of those, of images, or of ONNX Runtime test data), the word 'random', an array, a
            mapping of input name to array, an iterable of such mappings, or an object whose `get_next()` gives them until None.
        inputs: the model's inputs.
        options: how to read it.

    Raises:
        CalibrationError: the data cannot be read, or do not fit the inputs.
        ConfigError: an option cannot apply.
    """
    if not inputs:
        raise CalibrationError("the model has no inputs, so no data can reach it")
    if options.key is not None and len(inputs) > 1:
        raise ConfigError(
            f"key {options.key!r} picks one array, but the model has {len(inputs)} inputs; name the arrays after them"
        )
    random = isinstance(source, str) and source == RANDOM
    if options.random_range is not None and not random:
        raise ConfigError("random_range cannot apply: the data are not random")
    reader = _Reader(tuple(_Input.of(info, options.preprocessing) for info in inputs), options)
    blocks = tuple(_join(_take(reader.blocks(source, random), options.num_samples)))
    images = any(i.is_image(block.arrays[i.name]) for i in reader.inputs for block in blocks)
    if options.preprocessing != Preprocessing() and not images:
        raise ConfigError("preprocessing cannot apply: no uint8 images feed a float input")
    name = str(source) if isinstance(source, str | os.PathLike) else "python"
    samples = Samples(name, random, reader.inputs, blocks)
    if not len(samples):
        missing = f"; the model takes {samples.group} at a time" if samples.group > 1 else ""
        raise CalibrationError(f"{GIVEN if name == 'python' else name}: no samples, or too few{missing}")
    return samples


def split_holdout(samples: Samples) -> tuple[Samples, Samples, Samples]:
    """Splits into calibration, decide and verify.

    The last eighth is held out, at least 32 samples and at most half; its first half decides, its second half verifies.

    Raises:
        CalibrationError: fewer than four samples, or than four batches of a model with a fixed batch.
    """
    total, group = len(samples), samples.group
    if total < 4 * group:
        raise CalibrationError(f"{samples.source} gives {total} samples; give at least {4 * group}, better some hundred")
    held = min(-(-max(total // 8, 32) // group), total // 2 // group)
    calibration, rest = samples.split(total - held * group)
    return calibration, *rest.split(held // 2 * group)


@dataclass(frozen=True)
class _Reader:
    """Turns each kind of source into blocks, lazily."""

    inputs: tuple[_Input, ...]
    options: DataOptions

    def blocks(self, source: object, random: bool) -> Iterator[_Block]:
        if random:
            self._refuse_key("random data")
            return iter([self._block(self._random(), "random data")])
        if isinstance(source, str | os.PathLike):
            return self._from_path(Path(source))
        if isinstance(source, np.ndarray):
            return iter([self._block(self._only(source, GIVEN), GIVEN)])
        if isinstance(source, Mapping):
            return iter([self._block(self._pick(source, GIVEN), GIVEN)])
        if callable(get_next := getattr(source, "get_next", None)):
            return self._from_feeds(iter(get_next, None))
        if isinstance(source, Iterable):
            return self._from_feeds(source)
        raise CalibrationError(f"cannot calibrate with a {type(source).__name__}; give a path, arrays or feeds")

    def _from_feeds(self, feeds: Iterable[object]) -> Iterator[_Block]:
        for index, feed in enumerate(feeds):
            where = f"{GIVEN}, feed {index}"
            if not isinstance(feed, Mapping):
                raise CalibrationError(f"{where}: expected a mapping of input name to array, got a {type(feed).__name__}")
            yield self._block(self._pick(feed, where), where)

    def _from_path(self, path: Path) -> Iterator[_Block]:
        if path.is_dir():
            return self._from_folder(path)
        if not path.exists():
            raise CalibrationError(f"{path}: no such file or folder; for made-up data say 'random'")
        if path.suffix.lower() not in ARRAYS:
            raise CalibrationError(f"{path}: not calibration data; give an .npz or .npy file, or a folder of those or of images")
        return self._from_arrays([path])

    def _from_folder(self, folder: Path) -> Iterator[_Block]:
        sets = sorted(folder.glob("test_data_set_*/"), key=_natural)
        if sets or folder.name.startswith("test_data_set_") or any(folder.glob("input_*.pb")):
            return self._from_test_data(sets or [folder])
        with _reading(folder):
            files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        arrays, images = ([path for path in files if path.suffix.lower() in kinds] for kinds in (ARRAYS, IMAGES))
        if bool(arrays) == bool(images):
            found = "both arrays and images; keep one kind" if arrays else "no .npz, .npy, image or test_data_set_* in it"
            raise CalibrationError(f"{folder}: {found}")
        return self._from_arrays(arrays) if arrays else self._from_images(folder, images)

    def _from_arrays(self, files: Iterable[Path]) -> Iterator[_Block]:
        for path in files:
            with _reading(path):
                arrays = self._read_npz(path) if path.suffix.lower() == ".npz" else self._only(_read_npy(path), str(path))
            yield self._block(arrays, str(path))

    def _read_npz(self, path: Path) -> dict[str, object]:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MAX_NPZ_BYTES:
            raise CalibrationError(f"{path}: unpacks to {size / 2**30:.0f} GiB; at most {MAX_NPZ_BYTES // 2**30} GiB are read")
        with np.load(path, allow_pickle=False) as arrays:
            return self._pick(arrays, str(path))

    def _from_test_data(self, folders: Iterable[Path]) -> Iterator[_Block]:
        self._refuse_key("ONNX Runtime test data")
        for folder in folders:
            tensors = [_read_tensor(path) for path in sorted(folder.glob("input_*.pb"), key=_natural)]
            by_name: dict[str, object] = dict(tensors)
            if not all(i.name in by_name for i in self.inputs):
                if len(tensors) != len(self.inputs):
                    raise CalibrationError(f"{folder}: {len(tensors)} input_*.pb files, but the model has {self._names()}")
                by_name = {i.name: array for i, (_, array) in zip(self.inputs, tensors, strict=True)}
            yield self._block(by_name, str(folder))

    def _from_images(self, folder: Path, files: Iterable[Path]) -> Iterator[_Block]:
        self._refuse_key("a folder of images")
        model_input = self.inputs[0]
        if len(self.inputs) > 1 or model_input.dtype.kind != "f":
            raise CalibrationError(f"{folder}: images serve a model with one float input, but this one has {self._names()}")
        for path in files:
            pixels = _read_image(path, model_input.channels == 1, model_input.image_size)
            yield self._block({model_input.name: pixels[None]}, str(path))

    def _only(self, array: Array, where: str) -> dict[str, object]:
        """One array without a name."""
        self._refuse_key("an array without a name")
        if len(self.inputs) > 1:
            raise CalibrationError(
                f"{where}: one array, but the model has {self._names()}; give an .npz or a mapping with these names"
            )
        return {self.inputs[0].name: array}

    def _pick(self, arrays: Mapping[str, object], where: str) -> dict[str, object]:
        """The arrays of the inputs: the key's if one is given, else by name, else the only one there is."""
        name, key, found = self.inputs[0].name, self.options.key, ", ".join(map(repr, arrays)) or "nothing"
        if key is not None:
            if key not in arrays:
                raise CalibrationError(f"{where}: no array {key!r} (--calib-key); it holds {found}")
            return {name: arrays[key]}
        if all(i.name in arrays for i in self.inputs):
            return {i.name: arrays[i.name] for i in self.inputs}
        if len(self.inputs) == 1 and len(arrays) == 1:
            return {name: next(iter(arrays.values()))}
        hint = "pick one with --calib-key" if len(self.inputs) == 1 else "name the arrays after the inputs"
        raise CalibrationError(f"{where}: holds {found}, but the model has {self._names()}; {hint}")

    def _names(self) -> str:
        return f"input{'s' * (len(self.inputs) > 1)} " + ", ".join(f"{i.name!r} ({i.dtype})" for i in self.inputs)

    def _refuse_key(self, what: str) -> None:
        if self.options.key is not None:
            raise ConfigError(f"key {self.options.key!r} cannot apply to {what}")

    def _fixed_batches(self) -> set[int]:
        return {i.shape[0] for i in self.inputs if i.shape and isinstance(i.shape[0], int)}

    def _block(self, values: Mapping[str, object], where: str) -> _Block:
        """Fits every array, and finds what axis 0 is: samples, whole feeds, or (then one is added) nothing of the kind."""
        arrays = {i.name: i.fit(values[i.name], where) for i in self.inputs}
        extra = {axes for i in self.inputs if (axes := i.extra_axes(arrays[i.name])) is not None}
        if extra == {0, 1}:
            shapes = ", ".join(f"{name!r} {list(array.shape)}" for name, array in arrays.items())
            raise CalibrationError(f"{where}: some arrays have one axis more than their input and some have not: {shapes}")
        # Without any known rank, a list of numbers is taken as one scalar per feed.
        whole = extra == {1} or (not extra and all(array.ndim == 1 for array in arrays.values()))
        lengths = {array.shape[0] if array.ndim else None for array in arrays.values()}
        same_length = len(lengths) == 1 and None not in lengths
        if whole and not same_length:
            raise CalibrationError(f"{where}: the inputs have different numbers of feeds: {lengths}")
        fixed = self._fixed_batches()
        if not whole and (not same_length or len(fixed) > 1):
            arrays, whole = {name: array[None] for name, array in arrays.items()}, True
        for i in self.inputs:
            i.check_dims(arrays[i.name], whole, where)
        return _Block(arrays, 1 if whole else next(iter(fixed), None), whole)

    def _random(self) -> dict[str, object]:
        unknown = sorted(self.options.input_shapes.keys() - {i.name for i in self.inputs})
        if unknown:
            raise ConfigError(f"--input-shape names {unknown[0]!r}, but the model has {self._names()}")
        rng = np.random.default_rng(self.options.seed)
        batches = {i.shape[0] if i.shape else "scalar" for i in self.inputs}
        whole = len(batches) > 1 or "scalar" in batches
        group = 1 if whole else max(self._fixed_batches(), default=1)
        count = self.options.num_samples or -(-RANDOM_SAMPLES // group) * group
        shapes = [self._random_shape(i) for i in self.inputs]
        return {
            i.name: self._draw(i, (count, *(shape if whole else shape[1:])), rng)
            for i, shape in zip(self.inputs, shapes, strict=True)
        }

    def _random_shape(self, model_input: _Input) -> tuple[int, ...]:
        given = self.options.input_shapes.get(model_input.name)
        if given is not None and len(given) != len(model_input.shape):
            raise ConfigError(f"--input-shape {model_input.name}: {model_input}, not {list(given)}")
        shape = []
        for axis, dim in enumerate(model_input.shape):
            known = dim if isinstance(dim, int) else given[axis] if given else 1 if axis == 0 else None
            if known is None:
                raise CalibrationError(
                    f"random data: {model_input}, where dimension {axis} ({dim or 'unnamed'}) is open; "
                    f"fix it with --input-shape, such as {model_input.name}:1,3,224,224"
                )
            if known < 1 or (axis and given and given[axis] != known):
                raise ConfigError(f"--input-shape {model_input.name}: {model_input}, not {list(given or ())}")
            shape.append(known)
        return tuple(shape)

    def _draw(self, model_input: _Input, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        """Floats are standard normal; a range is for the integers, or for the floats of a model that has no integers."""
        dtype, limits = model_input.dtype, self.options.random_range
        if dtype.kind == "b":
            return rng.integers(0, 2, shape).astype(np.bool_)
        if dtype.kind == "f":
            uniform = limits is not None and not any(i.dtype.kind in "iu" for i in self.inputs)
            return (rng.uniform(*limits, shape) if uniform and limits else rng.standard_normal(shape, np.float32)).astype(dtype)
        if limits is None:
            raise CalibrationError(f"random data: {model_input}; say which integers with --random-range, such as 0,999")
        low, high, info = math.ceil(limits[0]), math.floor(limits[1]), np.iinfo(dtype)
        if low > high or low < info.min or high > info.max:
            raise ConfigError(f"--random-range {limits[0]:g},{limits[1]:g} holds no integers, or some beyond {dtype}")
        return np.asarray(rng.integers(low, high, shape, dtype=dtype.type, endpoint=True))


def _take(blocks: Iterable[_Block], limit: int | None) -> list[_Block]:
    """Blocks up to `limit` samples; reads no further than it must."""
    taken: list[_Block] = []
    left = limit
    for block in blocks:
        taken.append(block.cut(0, block.rows if left is None else left))
        if left is not None and (left := left - taken[-1].rows) == 0:
            break
    return taken


def _join(blocks: Iterable[_Block]) -> Iterator[_Block]:
    """Joins neighbours of equal shapes, so that they batch together."""
    for _, group in groupby(blocks, key=lambda block: block.signature):
        first, *others = group
        joined = {
            name: np.concatenate([a, *(o.arrays[name] for o in others)]) if others else a for name, a in first.arrays.items()
        }
        yield replace(first, arrays=joined)


@contextmanager
def _reading(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Whatever a broken file makes the readers raise becomes a CalibrationError with its name."""
    try:
        yield
    except UNREADABLE + also as error:
        pickled = "; pickled data are refused, save plain arrays" if "pickle" in str(error) else ""
        raise CalibrationError(f"{path}: cannot be read: {error}{pickled}") from error


def _read_npy(path: Path) -> Array:
    with path.open("rb") as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _read_tensor(path: Path) -> tuple[str, Array]:
    with _reading(path):
        tensor = TensorProto.FromString(path.read_bytes())
        if tensor.data_location == TensorProto.EXTERNAL:  # it could name any file
            raise ValueError("its data are in another file")
        return tensor.name, numpy_helper.to_array(tensor)


def _read_image(path: Path, gray: bool, size: tuple[int, int] | None) -> Array:
    """Pixels, uint8[h, w, c], resized already here so that large photos take little memory."""
    pillow = _pillow()
    with _reading(path, pillow.DecompressionBombError), pillow.open(path) as image:
        if image.mode.startswith(("I", "F")):  # conversion would clip
            raise ValueError("it has more than 8 bits per channel")
        image = image.convert("L" if gray else "RGB")
        pixels = np.asarray(image.resize(size[::-1], pillow.Resampling.BILINEAR) if size else image)
        return pixels.reshape(*pixels.shape[:2], -1)


def _resize(images: Array, size: tuple[int, int]) -> Array:
    """uint8[n, h, w, c] at another height and width; channel by channel, so any number of them will do."""
    if images.shape[1:3] == size:
        return images
    pillow = _pillow()
    resized = np.empty((len(images), *size, images.shape[3]), np.uint8)
    for image, channel in np.ndindex(len(images), images.shape[3]):
        plane = pillow.fromarray(np.ascontiguousarray(images[image, :, :, channel]))
        resized[image, :, :, channel] = plane.resize(size[::-1], pillow.Resampling.BILINEAR)
    return resized


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("images need Pillow: pip install 'relrep-onnx[images]'") from error
    return Image


def _natural(path: Path) -> list[str | int]:
    """Sorts input_2 before input_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
