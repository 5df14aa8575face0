"""Choosing the sparse layers by the clock: whole files are timed side by side on this machine, and the fastest one wins.

The costs' predictions of the sparse kernels are scaled by a few factors; each gives a set of layers, from bold to careful.  Only
whole networks are timed, since a layer alone hides what its neighbours pay for another layout.  The winner of several is partly
the luckiest: it has to win once more against the dense model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from onnx import ModelProto

from relrep_onnx.export.sparse_ort import GAIN, plan, to_sparse_ort
from relrep_onnx.types import Array

FACTORS: Final = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0)

Race = Callable[[list[ModelProto]], Array]
"""Runs files side by side: seconds float64[files, rounds]."""


@dataclass(frozen=True, eq=False)
class Tuned:
    """The winner, its sparse layers, how many could be, and how many times as fast as the dense model it was in the last race.

    Of a race counts the median round.
    """

    model: ModelProto
    layers: tuple[str, ...]
    possible: int
    ratio: float


def tune(
    model: ModelProto, race: Race, *, instruction_set: str, input_shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Tuned:
    """The fastest sparse form of a model, or the model itself where none takes at most `GAIN` of its time.

    Args:
        model: as for `to_sparse_ort`, whose errors this raises.
        race: times files on the machine and with the threads that count.
        instruction_set: whose costs propose the files.
        input_shapes: shapes of inputs whose open dimensions matter.
    """
    proposals: list[tuple[str, ...]] = []
    for factor in FACTORS:
        choices = plan(model, instruction_set=instruction_set, input_shapes=input_shapes, caution=factor)
        layers = tuple(choice.layer for choice in choices if choice.sparse)
        if layers and layers not in proposals:
            proposals.append(layers)
    files = [to_sparse_ort(model, instruction_set=instruction_set, input_shapes=input_shapes, layers=p) for p in proposals]
    times = race([model, *files])
    ratios = np.median(times[0] / times, axis=1)
    best = int(np.argmax(ratios))
    if best == 0 or ratios[best] * GAIN < 1:
        return Tuned(model, (), len(choices), 1.0)
    again = race([model, files[best - 1]])
    confirmed = float(np.median(again[0] / again[1]))
    if confirmed * GAIN < 1:
        return Tuned(model, (), len(choices), 1.0)
    return Tuned(files[best - 1], proposals[best - 1], len(choices), confirmed)
