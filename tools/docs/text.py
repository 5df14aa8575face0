"""Pictures of text as unlabelled samples for the OCR and detector how-tos: `python -m tools.docs.text lines.npz pages.npz`.

Lines are uint8[n, 48, 320, 3], pages uint8[n, 320, 320, 3] with a few lines each; words are random, fonts are the three that
matplotlib ships.  Your own pictures are better samples than these.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path
from typing import Final

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from relrep_onnx.types import Array

FONTS: Final = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
LETTERS: Final = string.ascii_letters + string.digits


def words(rng: np.random.Generator, most: int) -> str:
    """Up to `most` words of two to nine letters and digits."""
    count = int(rng.integers(1, most + 1))
    return " ".join("".join(rng.choice(list(LETTERS), int(rng.integers(2, 10)))) for _ in range(count))


def font(rng: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    """One of the fonts."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / str(rng.choice(FONTS))), size)


def picture(rng: np.random.Generator, width: int, height: int, lines: int) -> Array:
    """Dark text on a light, noisy ground, `lines` lines that fill the height: uint8[height, width, 3]."""
    canvas = Image.new("L", (width, height), int(rng.integers(180, 256)))
    pen, row = ImageDraw.Draw(canvas), height // lines
    for line in range(lines):
        size = int(rng.integers(row // 2, row * 3 // 4))
        place = (int(rng.integers(2, 12)), line * row + int(rng.integers(0, max(1, row - size))))
        pen.text(place, words(rng, 4), font=font(rng, size), fill=int(rng.integers(0, 90)))
    noisy = np.asarray(canvas, np.float64) + rng.normal(0, float(rng.uniform(0, 12)), (height, width))
    return np.repeat(np.clip(noisy, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="an .npz of text lines")
    parser.add_argument("pages", type=Path, help="an .npz of pages")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    np.savez_compressed(options.lines, x=np.stack([picture(rng, 320, 48, 1) for _ in range(options.count)]))
    pages = [picture(rng, 320, 320, int(rng.integers(4, 10))) for _ in range(options.count)]
    np.savez_compressed(options.pages, x=np.stack(pages))


if __name__ == "__main__":
    main()
