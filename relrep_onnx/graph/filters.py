"""Fixed filter banks: transforms such as a short-time Fourier or constant-Q transform, stored as a convolution of one channel.

Each of their kernels is a windowed tone, so its spectrum is one narrow peak.  What a network learned is not: its kernels spread
their energy, and of kernels that long few are learned at all.  Pruning a transform saves little and distorts all that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from relrep_onnx.types import FloatArray

LONG: Final = 32
"""A shorter kernel is not looked at; its spectrum has too few bins to tell."""
PURE: Final = 0.99
"""The least share of a tone's energy in its peak: the middle kernel of a bank has more, one of random numbers under a half."""


def is_bank(kernel: Sequence[int], cols: int, read: Callable[[], FloatArray]) -> bool:
    """Whether the rows of a convolution's weight are windowed tones, of one channel along one axis.

    Args:
        kernel: the window's sizes.
        cols: numbers in a row, all channels of it.
        read: gives the weight float64[rows, cols]; not asked where the sizes tell.
    """
    return max(kernel) == cols >= LONG and float(np.median(_peak_share(read()))) > PURE


def _peak_share(kernels: FloatArray) -> FloatArray:
    """The most of each kernel's energy that lies in a narrow band: float64[rows]."""
    power = np.abs(np.fft.rfft(kernels)) ** 2
    half = max(2, kernels.shape[1] // LONG)
    sums = np.cumsum(np.pad(power, ((0, 0), (half + 1, half))), axis=1)
    inside = sums[:, 2 * half + 1 :] - sums[:, : -2 * half - 1]
    return np.asarray(inside.max(axis=1) / np.maximum(power.sum(axis=1), np.finfo(np.float64).tiny))
