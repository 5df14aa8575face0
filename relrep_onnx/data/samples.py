"""Samples: data that fit the model's inputs, ready to be batched, split and fingerprinted.

Data become entries, which are never parted: normally one sample, a view [1, ...] of what the user gave, and neighbours of equal
shapes are joined as they are fed.  Where a feed must not be cut (one more axis than the input, or inputs that disagree on axis 0)
an entry is that feed; where the model fixes its batch, an entry is a batch.  Both run alone.
"""

from __future__ import annotations

import hashlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import accumulate, groupby
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from relrep_onnx.data.images import Dim, ImageFormat, Preprocessing
from relrep_onnx.types import Array, CalibrationError, ConfigError, RelRepError, TensorInfo

GIVEN: Final = "the given data"


def _of_packers() -> Iterator[type[Exception]]:
    """What the ways of packing raise that a zip file may use and Python may lack."""
    for module, name in (("lzma", "LZMAError"), ("compression.zstd", "ZstdError")):
        with suppress(ImportError):
            yield getattr(import_module(module), name)


# What the readers of numpy, zipfile, protobuf and Pillow raise on broken files, found by damaging files byte by byte.
BROKEN: Final[tuple[type[Exception], ...]] = (
    OSError, ValueError, EOFError, MemoryError, RuntimeError, SyntaxError, TypeError, LookupError, ImportError, Warning,
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, DecodeError, *_of_packers(),
)  # fmt: skip


@contextmanager
def errors_naming(place: object) -> Iterator[None]:
    """Errors name the place they come from; what broken data raise becomes a CalibrationError."""
    try:
        yield
    except RelRepError as error:
        raise type(error)(f"{place}: {error}") from error
    except BROKEN as error:
        fix = "pip install 'relrep-onnx[images]'" if isinstance(error, ImportError) else "replace it or leave it out"
        raise CalibrationError(f"{place}: cannot be read ({type(error).__name__}: {error}); {fix}") from error


@dataclass(frozen=True)
class Input:
    """One input of the model, and how data is made to fit it; the shape is empty for a scalar and for an unknown rank."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]
    images: ImageFormat

    @classmethod
    def of(cls, info: TensorInfo, how: Preprocessing) -> Input:
        """The input, if data can serve it."""
        if info.dtype is None or info.dtype.kind not in "fiub":
            raise CalibrationError(f"input {info.name!r} has type {info.type}; only float, integer and bool tensors can be fed")
        if info.shape[:1] == (0,):
            raise CalibrationError(
                f"input {info.name!r} has the shape {list(info.shape)}, a batch of none; export it with another"
            )
        return cls(info.name, info.dtype, info.shape, ImageFormat.of(info.shape, how))

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"input {self.name!r} expects {self.dtype}" + (f"[{dims}]" if self.shape else "")

    def is_image(self, array: Array) -> bool:
        """Whether the array holds pixels, which become floats when they are fed."""
        return self.dtype.kind == "f" and array.dtype == np.uint8

    def fit(self, value: object) -> tuple[Array, int | None]:
        """The value in this input's type, or as uint8[..., h, w, c], and its axes beyond the input's own, if that is known."""
        array, rank = np.asarray(value), len(self.shape)
        if not array.size:
            raise CalibrationError(f"got shape {list(array.shape)}, no samples; give some")
        if not self.is_image(array):
            array = self._cast(array)
        elif rank in (0, 4) and array.ndim in (3, 4, 5):
            array, rank = self.images.pixels(array), 4
        else:
            raise CalibrationError(f"uint8{list(array.shape)} does not fit as images; if it holds none, cast it to {self.dtype}")
        return array, array.ndim - rank if rank else None

    def _cast(self, array: Array) -> Array:
        kinds = {array.dtype.kind, self.dtype.kind}
        if len(kinds) > 1 and kinds != {"i", "u"}:
            raise CalibrationError(f"got {array.dtype}; cast it if that is meant")
        with np.errstate(over="ignore"):  # the check for Inf reports it
            cast = array.astype(self.dtype, copy=False)
        if kinds <= {"i", "u"} and not np.array_equal(cast, array):
            raise CalibrationError(f"cannot hold the values from {array.min()} to {array.max()}; change them")
        if self.dtype.kind == "f" and not (finite := np.isfinite(cast)).all():
            first = f"sample {np.argwhere(~finite)[0, 0]}" if cast.ndim and len(cast) > 1 else "it"
            raise CalibrationError(f"{first} holds NaN or Inf (as {self.dtype}); repair it or leave it out")
        return cast

    def check(self, array: Array, whole: bool) -> None:
        """Holds what the model will see against its shape; axis 0 only where a feed is whole."""
        got, want = (list(shape[not whole :]) for shape in (self.feed(array).shape, self.shape))
        fits = len(got) == len(want) and all(size == dim for size, dim in zip(got, want, strict=True) if isinstance(dim, int))
        if self.shape and not fits:
            size = self.images.size if self.is_image(array) else None
            hint = "fix its channels, or use --image-size {},{}".format(*size) if size else "give data of the model's shape"
            raise CalibrationError(f"got {'feeds' if whole else 'samples'} of {got}; {hint}")

    def feed(self, array: Array) -> Array:
        """What the session gets."""
        return np.ascontiguousarray(self.images.floats(array), self.dtype) if self.is_image(array) else array


@dataclass(frozen=True, eq=False)
class Entry:
    """What is never parted, as arrays by input name: a sample [1, ...]; or, alone in its run, a feed or batch of `samples`.

    `place` says where it comes from.
    """

    arrays: Mapping[str, Array]
    alone: bool = False
    samples: int = 1
    place: str = ""


def entries_of(inputs: Sequence[Input], values: Mapping[str, object], place: object = GIVEN) -> list[Entry]:
    """Fits one array to each input, and parts them where axis 0 counts samples or feeds; otherwise they are one feed."""
    arrays, extras = {}, set()
    for i in inputs:
        with errors_naming(i):
            arrays[i.name], extra = i.fit(values[i.name])
            extras |= {extra} - {None}
    lengths = {array.shape[:1] for array in arrays.values()}
    aligned = len(lengths) == 1 and () not in lengths
    # Without any known rank, a list of numbers is taken as one scalar per feed.
    feeds = extras == {1} or (not extras and all(array.ndim == 1 for array in arrays.values()))
    uncut = not aligned or (not feeds and len(fixed_batches(inputs)) > 1)
    parts = [(...,)] if uncut else [(row if feeds else slice(row, row + 1), ...) for row in range(*lengths.pop())]
    places = [f"{place}, sample {number}" for number in range(len(parts))] if len(parts) > 1 else [str(place)]
    entries = [
        Entry({name: array[part] for name, array in arrays.items()}, feeds or uncut, place=where)
        for part, where in zip(parts, places, strict=True)
    ]
    for i in inputs:
        with errors_naming(i):
            i.check(entries[0].arrays[i.name], feeds or uncut)
    return entries


def fixed_batches(inputs: Sequence[Input]) -> set[int]:
    """The batch the model fixes; where there are several, axis 0 counts no samples."""
    return {i.shape[0] for i in inputs if i.shape and isinstance(i.shape[0], int)}


def runs(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    """At most `size` neighbours of equal shapes, or one that runs alone."""
    for (alone, _), group in groupby(entries, lambda e: (e.alone, [(a.dtype, a.shape) for a in e.arrays.values()])):
        members, step = list(group), 1 if alone else size
        yield from (members[first : first + step] for first in range(0, len(members), step))


def join(run: Sequence[Entry]) -> Mapping[str, Array]:
    """The arrays of a run, copied only where there are several."""
    first, *others = (entry.arrays for entry in run)
    return {name: np.concatenate([a, *(arrays[name] for arrays in others)]) for name, a in first.items()} if others else first


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples in order, in whole batches where the model fixes them; `source` is the path, 'random' (made up) or 'python'.

    `left_out` says of each bad sample that was left out what is wrong with it.
    """

    source: str
    random: bool
    inputs: Sequence[Input] = field(repr=False)
    entries: Sequence[Entry] = field(repr=False)
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(entry.samples for entry in self.entries)

    def batches(self, batch_size: int) -> Iterator[dict[str, Array]]:
        """Feeds for the session, in the same order each time, of at most `batch_size` samples where the model leaves it free."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        return map(self.feeds, runs(self.entries, batch_size))

    def feeds(self, run: Sequence[Entry]) -> dict[str, Array]:
        """What the session gets of some entries that may run together."""
        arrays = join(run)
        return {i.name: i.feed(arrays[i.name]) for i in self.inputs}

    def shuffled(self, batch_size: int, rng: np.random.Generator) -> Iterator[dict[str, Array]]:
        """Full batches in random order, drawn anew each time; what is left of a shape is left out, unless it is all there is."""
        batches = []
        for members in self._alike():
            order = [members[i] for i in rng.permutation(len(members))]
            size = min(batch_size, len(members))
            batches += [order[first : first + size] for first in range(0, len(members) - size + 1, size)]
        for i in rng.permutation(len(batches)):
            yield self.feeds(batches[i])

    def shuffled_count(self, batch_size: int) -> int:
        """How many feeds `shuffled` gives."""
        return sum(max(1, len(members) // batch_size) for members in self._alike())

    def _alike(self) -> list[list[Entry]]:
        """The entries by shape; those that run alone each by itself."""
        groups: dict[object, list[Entry]] = {}
        for number, entry in enumerate(self.entries):
            key = number if entry.alone else tuple((a.dtype.str, a.shape) for a in entry.arrays.values())
            groups.setdefault(key, []).append(entry)
        return list(groups.values())

    @property
    def constant(self) -> bool:
        """Whether all samples are the same."""
        first, *others = self.entries
        inside = (np.array_equal(a, a[:1].repeat(len(a), axis=0)) for a in first.arrays.values() if first.samples > 1)
        return all(inside) and all(
            np.array_equal(array, other.arrays[name]) for other in others for name, array in first.arrays.items()
        )

    @property
    def plain_pixels(self) -> bool:
        """Whether images are fed that nothing but the default scale prepares."""
        first = self.entries[0].arrays
        return any(
            i.is_image(first[i.name]) and (i.images.how.mean, i.images.how.std, i.images.how.scale) == (None,) * 3
            for i in self.inputs
        )

    @property
    def image_axes(self) -> dict[str, tuple[int, int]]:
        """The vertical and horizontal axis of each input that is fed with images: floats of rank 4 with up to four channels."""
        first = self.entries[0].arrays
        found = {}
        for wanted in self.inputs:
            shape, last = wanted.feed(first[wanted.name]).shape, wanted.images.channels_last
            if wanted.dtype.kind == "f" and len(shape) == 4 and shape[-1 if last else 1] <= 4:
                found[wanted.name] = (1, 2) if last else (2, 3)
        return found

    def batch_count(self, batch_size: int) -> int:
        """How many feeds `batches` gives."""
        return sum(1 for _ in runs(self.entries, batch_size))

    def split(self, first: int) -> tuple[Samples, Samples]:
        """The first `first` samples, rounded up to whole batches where the model fixes them, and the rest."""
        cut = sum(start < first for start in accumulate((entry.samples for entry in self.entries), initial=0))
        return replace(self, entries=self.entries[:cut]), replace(self, entries=self.entries[cut:])

    def fingerprint(self) -> str:
        """SHA-256 over names, types, shapes, values and preprocessing, in hexadecimal."""
        digest = hashlib.sha256(repr([i.images.how for i in self.inputs]).encode())
        for name, array in (item for entry in self.entries for item in entry.arrays.items()):
            digest.update(repr((name, array.dtype.str, array.shape)).encode() + array.tobytes())
        return digest.hexdigest()


def halves(samples: Samples) -> tuple[Samples, Samples]:
    """Samples held out, to decide and to verify with.

    Raises:
        CalibrationError: one of the two would get none.
    """
    first, second = samples.split(len(samples) // 2)
    if not (first.entries and second.entries):
        need = "at least two samples" if len(samples) < 2 else "at least two of its batches"
        raise CalibrationError(f"{samples.source} gives {len(samples)} samples, a half each to decide and to verify; give {need}")
    return first, second


def split_holdout(samples: Samples) -> tuple[Samples, Samples, Samples]:
    """The samples to calibrate, decide and verify with; the last two halve the last eighth, at least 32 samples, at most half.

    Raises:
        CalibrationError: fewer than four samples, or than four batches of a model with a fixed batch.
    """
    total, batch = len(samples), max((entry.samples for entry in samples.entries), default=1)
    if total < 4 * batch:
        raise CalibrationError(f"{samples.source} gives {total} samples; give at least {4 * batch}, better some hundred")
    held = min(max(-(-max(total // 8, 32) // batch), 2), total // 2 // batch)
    calibration, rest = samples.split(total - held * batch)
    return calibration, *rest.split(held // 2 * batch)
