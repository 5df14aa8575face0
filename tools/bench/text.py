"""Rendered text with known truth: strings, pictures of them, and how a recogniser's answers are scored.

Fonts are those of Debian's `fonts-dejavu`.  The same seed gives the same strings and pictures; calibration takes another seed
than scoring.  Character error rate: edits between answer and truth (Levenshtein) over the characters of the truth.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tools.bench.data import Array

FONTS: Final = Path("/usr/share/fonts/truetype/dejavu")
FACES: Final = ("Sans", "Sans-Bold", "Serif", "Serif-Bold", "SansMono", "SansMono-Bold")
WORDS: Final = (
    "invoice", "total", "amount", "date", "number", "street", "river", "model", "weight", "layer", "prune", "sparse",
    "graph", "kernel", "edge", "device", "camera", "signal", "battery", "sensor", "power", "voltage", "system", "update",
    "release", "version", "memory", "input", "output", "batch", "train", "label", "truth", "exact", "error", "score",
    "image", "pixel", "noise", "blur", "table", "column", "north", "south", "east", "west", "train", "ticket", "price",
    "weight", "factory", "serial", "warning", "caution", "danger", "open", "close", "start", "stop",
)  # fmt: skip
HEIGHT: Final = 48
LEAST_WIDTH: Final = 320


def strings(count: int, seed: int) -> list[str]:
    """Digits, words, random letters, or a word with a price."""
    rng = np.random.default_rng(seed)
    letters, digits = list(string.ascii_letters + string.digits), list(string.digits)
    made = []
    for _ in range(count):
        match rng.integers(0, 4):
            case 0:
                made.append("".join(rng.choice(digits, rng.integers(4, 11))))
            case 1:
                made.append(" ".join(rng.choice(WORDS, rng.integers(1, 4))))
            case 2:
                made.append("".join(rng.choice(letters, rng.integers(4, 11))))
            case _:
                made.append(f"{rng.choice(WORDS).capitalize()} {rng.integers(0, 9999)}.{rng.integers(0, 99):02d}")
    return made


def font(rng: np.random.Generator, least: int, most: int) -> ImageFont.FreeTypeFont:
    """A random face and size in pixels.

    Raises:
        OSError: the fonts are not installed.
    """
    face = FACES[rng.integers(len(FACES))]
    return ImageFont.truetype(str(FONTS / f"DejaVu{face}.ttf"), int(rng.integers(least, most)))


def render(text: str, rng: np.random.Generator) -> Image.Image:
    """One line of text: random font, grey values, tilt, blur and noise."""
    face = font(rng, 20, 40)
    left, top, right, bottom = face.getbbox(text)
    pad, paper, ink = int(rng.integers(3, 9)), int(rng.integers(180, 256)), int(rng.integers(0, 90))
    size = (math.ceil(right - left) + 2 * pad, math.ceil(bottom - top) + 2 * pad)
    picture = Image.new("RGB", size, (paper,) * 3)
    ImageDraw.Draw(picture).text((pad - left, pad - top), text, font=face, fill=(ink,) * 3)
    tilted = picture.rotate(float(rng.uniform(-1.5, 1.5)), fillcolor=(paper,) * 3, resample=Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        tilted = tilted.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.3))))
    noise = rng.normal(0, float(rng.uniform(0, 18)), (tilted.height, tilted.width, 1))
    return Image.fromarray(np.clip(np.asarray(tilted, np.float32) + noise, 0, 255).astype(np.uint8))


def pixels(picture: Image.Image) -> Array:
    """What a recogniser takes: float32[3, 48, width of at least 320], BGR in -1 to 1, zeros to the right."""
    width = max(1, math.ceil(picture.width * HEIGHT / picture.height))
    resized = np.asarray(picture.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float32)
    padded = np.zeros((3, HEIGHT, max(LEAST_WIDTH, width)), np.float32)
    padded[:, :, :width] = (resized[:, :, ::-1].transpose(2, 0, 1) / 255 - 0.5) / 0.5
    return padded


def lines(count: int, seed: int) -> tuple[list[str], list[Array]]:
    """Strings and their pictures."""
    texts, rng = strings(count, seed), np.random.default_rng(seed + 1000)
    return texts, [pixels(render(text, rng)) for text in texts]


def calibration(count: int, seed: int) -> Array:
    """float32[count, 3, 48, 320], longer lines cut."""
    return np.stack([picture[:, :, :LEAST_WIDTH] for picture in lines(count, seed)[1]])


def distance(left: str, right: str) -> int:
    """Fewest insertions, removals and replacements between two strings."""
    before = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        row = [i]
        for j, b in enumerate(right, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
        before = row
    return before[-1]


def character_error_rate(session: onnxruntime.InferenceSession, seeds: Sequence[int], count: int = 200) -> float:
    """The mean over the seeds of a CTC recogniser's rate; the characters are those of the model's own metadata."""
    listed = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    characters = ["", *listed, " "]
    rates = []
    for seed in seeds:
        texts, pictures = lines(count, seed)
        edits = sum(distance(texts[i], read) for i, read in _read(session, pictures, characters))
        rates.append(edits / sum(map(len, texts)))
    return float(np.mean(rates))


def _read(
    session: onnxruntime.InferenceSession, pictures: Sequence[Array], characters: Sequence[str], batch: int = 16
) -> Iterator[tuple[int, str]]:
    order: list[int] = sorted(range(len(pictures)), key=lambda i: pictures[i].shape[2])
    name = session.get_inputs()[0].name
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        joined = np.zeros((len(chosen), 3, HEIGHT, pictures[chosen[-1]].shape[2]), np.float32)
        for row, i in zip(joined, chosen, strict=True):
            row[:, :, : pictures[i].shape[2]] = pictures[i]
        shares: Any = session.run(None, {name: joined})[0]
        for i, best in zip(chosen, shares.argmax(axis=2), strict=True):
            yield i, "".join(characters[key] for key, _ in groupby(best.tolist()))
