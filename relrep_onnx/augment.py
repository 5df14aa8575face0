"""Augmentation of unlabelled batches: every value stays inside the range of the data, so the dense model knows what it sees.

crop     each image reflected at its edges, then cut at a random place up to an eighth of its side away
flip     each image mirrored left to right, or not
mixup    half of the batches: lambda x + (1 - lambda) x of another sample, lambda uniform (Zhang et al. 2018, alpha = 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.random import Generator

from relrep_onnx.types import Array, ConfigError

CROP, FLIP, MIXUP = "crop", "flip", "mixup"
KINDS: Final = (CROP, FLIP, MIXUP)
AUTO: Final = "auto"
NONE: Final = "none"
REACH: Final = 8
"""A crop moves by up to one in so many of an image's side."""


def parse(text: str) -> tuple[str, ...] | None:
    """Reads `crop,flip,mixup`, `none`, or `auto` (as None).

    Raises:
        ConfigError: anything else.
    """
    if text == AUTO:
        return None
    names = [] if text == NONE else text.split(",")
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ConfigError(f"--augment is {text!r}; give {AUTO!r}, {NONE!r}, or some of {', '.join(KINDS)}, joined by commas")
    return tuple(kind for kind in KINDS if kind in names)


class Augmenter:
    """Applies some kinds of augmentation to feeds; image inputs are those whose two spatial axes are given."""

    def __init__(self, kinds: Sequence[str], images: Mapping[str, tuple[int, int]]) -> None:
        """Takes the kinds, and the vertical and horizontal axis of each image input."""
        self.kinds = tuple(kinds)
        self._images = images

    def apply(self, feeds: Mapping[str, Array], rng: Generator) -> dict[str, Array]:
        """The augmented feeds; arrays that nothing changes are handed through."""
        changed = dict(feeds)
        for name, axes in self._images.items():
            if CROP in self.kinds:
                changed[name] = _cropped(changed[name], axes, rng)
            if FLIP in self.kinds:
                changed[name] = _flipped(changed[name], axes[1], rng)
        if MIXUP in self.kinds and rng.random() < 0.5:
            changed = _mixed(changed, rng)
        return changed


def possible(feeds: Mapping[str, Array], images: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """The kinds that can be applied: crop and flip need images, mixup needs floats only and several samples."""
    sizes = {array.shape[0] if array.ndim else 0 for array in feeds.values()}
    mixes = all(array.dtype.kind == "f" for array in feeds.values()) and len(sizes) == 1 and min(sizes) > 1
    return ((CROP, FLIP) if images else ()) + ((MIXUP,) if mixes else ())


def _cropped(x: Array, axes: tuple[int, int], rng: Generator) -> Array:
    reach = [max(1, x.shape[axis] // REACH) if x.shape[axis] > 1 else 0 for axis in axes]
    around = [(0, 0)] * x.ndim
    for axis, r in zip(axes, reach, strict=True):
        around[axis] = (r, r)
    wide = np.pad(x, around, mode="reflect")
    cut = np.empty_like(x)
    starts = np.stack([rng.integers(0, 2 * r + 1, len(x)) for r in reach], axis=1)
    for i, start in enumerate(starts):
        window = [slice(None)] * x.ndim
        window[0] = slice(i, i + 1)
        for axis, first in zip(axes, start, strict=True):
            window[axis] = slice(first, first + x.shape[axis])
        cut[i : i + 1] = wide[tuple(window)]
    return cut


def _flipped(x: Array, axis: int, rng: Generator) -> Array:
    chosen = rng.random(len(x)) < 0.5
    turned = x.copy()
    turned[chosen] = np.flip(x[chosen], axis)
    return turned


def _mixed(feeds: Mapping[str, Array], rng: Generator) -> dict[str, Array]:
    count = len(next(iter(feeds.values())))
    share, other = rng.random(count), rng.permutation(count)
    mixed = {}
    for name, x in feeds.items():
        weight = share.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        mixed[name] = weight * x + (1 - weight) * x[other]
    return mixed
