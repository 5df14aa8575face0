"""Images, from files and uint8 arrays: they stay uint8[n, h, w, c] in memory, and become floats only as they are fed."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from relrep_onnx.types import MOST, Array, CalibrationError, ConfigError

Dim = int | str | None

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS: Final = ("PNG", "JPEG", "BMP", "WEBP")
"""What files of these suffixes hold; others that Pillow knows may contain any further one, or start programs."""


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels to a float input: value = (pixel * scale - mean) / std.

    `mean` (0 by default) and `std` (1) are one value or one per channel, in the order `color` that the model wants; files and
    arrays are RGB.  `scale` is 1/255 by default.  `image_size` is height and width.  Without a `layout`, the model's shape tells.
    """

    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    color: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        if self.image_size is not None and not (len(self.image_size) == 2 and all(1 <= size <= MOST for size in self.image_size)):
            raise ConfigError(f"image_size is {self.image_size}; give a height and a width of at least 1, at most {MOST}")
        divisors = (*(self.std or ()), 1 if self.scale is None else self.scale)
        if not all(math.isfinite(v) for v in (*(self.mean or ()), *divisors)) or 0 in divisors:
            raise ConfigError(f"mean {self.mean}, std {self.std}, scale {self.scale}: give finite numbers, no std or scale of 0")
        if self.layout not in (None, "nchw", "nhwc") or self.color not in ("rgb", "bgr"):
            raise ConfigError(f"layout {self.layout!r}, color {self.color!r}: use 'nchw' or 'nhwc', and 'rgb' or 'bgr'")


@dataclass(frozen=True)
class ImageFormat:
    """The images that one input wants; `channels` and `size` (height, width) are None where the model leaves them open."""

    how: Preprocessing
    channels_last: bool
    channels: int | None
    size: tuple[int, int] | None

    @classmethod
    def of(cls, shape: tuple[Dim, ...], how: Preprocessing) -> ImageFormat:
        """What an input of this shape wants; 1 or 3 is taken for the number of channels, where only one end has it."""
        _, first, middle, last = shape if len(shape) == 4 else (None,) * 4
        channels_last = how.layout == "nhwc" or (how.layout is None and last in (1, 3) and first not in (1, 3))
        channels, height, width = (last, first, middle) if channels_last else (first, middle, last)
        size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        return cls(how, channels_last, channels if isinstance(channels, int) else None, size)

    def pixels(self, array: Array) -> Array:
        """Gray [n, h, w] and channels-first images as uint8[..., h, w, c], without a copy."""
        array = array[..., None] if array.ndim == 3 else array
        plausible = (1, 3, self.channels)
        if array.shape[-3] in plausible and array.shape[-1] not in plausible:
            array = np.moveaxis(array, -3, -1)
        count = array.shape[-1]
        if given := [len(v) for v in (self.how.mean, self.how.std) if v is not None and len(v) not in (1, count)]:
            fix = "give 1" + f" or {count}" * (count > 1)
            raise ConfigError(f"mean or std has {given[0]} values, but the images have {count} channels; {fix}")
        if self.how.color == "bgr" and count != 3:
            raise ConfigError(f"color 'bgr' cannot apply to images with {count} channels; leave it out")
        return array

    def floats(self, images: Array) -> Array:
        """What the model sees of uint8[n, h, w, c]: float32[n, c, h, w], or [n, h, w, c]."""
        pixels = _resize(images, self.how.image_size or images.shape[1:3])[..., :: -1 if self.how.color == "bgr" else 1]
        values: Array = pixels * np.float32(1 / 255 if self.how.scale is None else self.how.scale)
        values = (values - np.array(self.how.mean or 0, np.float32)) / np.array(self.how.std or 1, np.float32)
        return values if self.channels_last else values.transpose(0, 3, 1, 2)

    def read(self, path: Path) -> Array:
        """A file's pixels, uint8[1, h, w, c]; resized already here, so that large photos take little memory."""
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # such as of transparency, which is left out
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # a small file whose pixels would fill the memory
            try:
                with Image.open(path, formats=FORMATS) as image:
                    if image.mode.startswith(("I", "F")):  # conversion would clip
                        raise CalibrationError("it has more than 8 bits per channel; convert it to 8")
                    pixels = np.asarray(image.convert("L" if self.channels == 1 else "RGB"))
            except Image.DecompressionBombError as error:
                raise ValueError(str(error)) from error
        return _resize(pixels.reshape(1, *pixels.shape[:2], -1), self.how.image_size or self.size or pixels.shape[:2])


def _resize(images: Array, size: tuple[int, ...]) -> Array:
    """uint8[n, h, w, c] at another height and width; channel by channel, so any number of them will do."""
    if images.shape[1:3] == size:
        return images
    from PIL import Image

    resized = np.empty((len(images), *size, images.shape[3]), np.uint8)
    for image, channel in np.ndindex(len(images), images.shape[3]):
        plane = Image.fromarray(np.ascontiguousarray(images[image, :, :, channel]))
        resized[image, :, :, channel] = plane.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return resized
