"""Adam on flat arrays (Kingma & Ba 2015, algorithm 1) whose masked zeros stay zeros, and the one-cycle schedule (Smith 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from relrep_onnx.types import Array, FloatArray

BETAS: Final = (0.9, 0.99)
EPSILON: Final = 1e-8
WARMUP: Final = 0.3
"""The rate rises for this share of the steps, and falls for the rest."""
FIRST: Final = 1 / 25
LAST: Final = 1e-4
"""Where the rate starts and ends, as shares of its peak."""


class Buffers:
    """All parameters, their gradients and Adam's moments, each one flat float32 array that stays where it is."""

    def __init__(self, values: Mapping[str, Array], masked: Iterable[str], scales: Mapping[str, float]) -> None:
        """Takes the parameters' values, the names of those whose zeros stay zeros, and what each one's rate is multiplied by."""
        edges = np.cumsum([0, *(array.size for array in values.values())])
        self._places = {name: (slice(edges[i], edges[i + 1]), array.shape) for i, (name, array) in enumerate(values.items())}
        self.values, self.gradients, self.mean, self.square = (np.zeros(edges[-1], np.float32) for _ in range(4))
        self.mask = np.ones(edges[-1], np.float32)
        self.count = 0
        for name, view in self.views(self.values).items():
            view[...] = values[name]
        masks = self.views(self.mask)
        for name in masked:
            masks[name][...] = values[name] != 0
        self._scale = np.ones(edges[-1], np.float32)
        for name, view in self.views(self._scale).items():
            view[...] = scales[name]

    def views(self, flat: FloatArray) -> dict[str, FloatArray]:
        """The parts of a flat array, by parameter and in its shape."""
        return {name: flat[place].reshape(shape) for name, (place, shape) in self._places.items()}

    def restart(self, values: FloatArray) -> None:
        """Other values, and no memory of the gradients so far."""
        self.values[...] = values
        self.mean[...] = self.square[...] = 0
        self.count = 0

    def step(self, rate: float) -> None:
        """Moves the values against the gradients, in place."""
        self.count += 1
        first, second = BETAS
        self.mean += (1 - first) * (self.gradients - self.mean)
        self.square += (1 - second) * (self.gradients * self.gradients - self.square)
        unbias = math.sqrt(1 - second**self.count) / (1 - first**self.count)
        self.values -= (rate * unbias) * self._scale * self.mean / (np.sqrt(self.square) + EPSILON)


def one_cycle(share: float) -> float:
    """The rate as a share of its peak, from the share of the steps done: up and down along half a cosine each."""
    if share < WARMUP:
        low, high, way = FIRST, 1.0, share / WARMUP
    else:
        low, high, way = 1.0, LAST, (share - WARMUP) / (1 - WARMUP)
    return low + (high - low) * (1 - math.cos(math.pi * way)) / 2
