"""A made-up voice as samples for the speech how-to: `python -m tools.docs.voice voice.npy`, float32 mono at 16 kHz.

Syllables of a few harmonics under two moving formants, pauses between words, and background noise.  It is there so that the
commands run; your own recordings are the samples to use.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import numpy as np

from relrep_onnx.types import FloatArray

RATE: Final = 16_000


def glide(rng: np.random.Generator, low: float, high: float, count: int) -> FloatArray:
    """A frequency that moves from one to another between two bounds."""
    start, stop = rng.uniform(low, high, 2)
    return np.linspace(start, stop, count)


def syllable(rng: np.random.Generator, seconds: float) -> FloatArray:
    """A voiced sound: harmonics of a gliding pitch, louder near two formants."""
    time = np.arange(int(seconds * RATE)) / RATE
    pitch = glide(rng, 90, 240, time.size)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    formants = [glide(rng, 300, 800, time.size), glide(rng, 900, 2300, time.size)]
    sound = np.zeros(time.size)
    for number in range(1, 24):
        near = sum(np.exp(-(((number * pitch - formant) / 180) ** 2)) for formant in formants)
        sound += (near + 0.02) * np.sin(number * phase) / number**0.5
    return np.asarray(sound * np.hanning(time.size) ** 0.3)


def voice(seconds: float, seed: int) -> FloatArray:
    """Words of one to four syllables with pauses between them."""
    rng = np.random.default_rng(seed)
    parts: list[FloatArray] = []
    while sum(part.size for part in parts) < seconds * RATE:
        parts += [syllable(rng, rng.uniform(0.12, 0.3)) * rng.uniform(0.1, 0.4) for _ in range(rng.integers(1, 5))]
        parts.append(np.zeros(int(rng.uniform(0.1, 1.2) * RATE)))
    sound = np.concatenate(parts)[: int(seconds * RATE)]
    return np.asarray(sound + rng.normal(0, 0.003, sound.size), np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    np.save(options.output, voice(options.seconds, options.seed))


if __name__ == "__main__":
    main()
