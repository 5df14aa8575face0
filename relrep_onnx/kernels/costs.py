"""Predicted times of one layer, dense in ONNX Runtime and in the sparse kernels, on one thread.

    microseconds = call + mac * multiply-adds (millions) + out * outputs (millions) + into * inputs (millions)

The multiply-adds of the sparse kernels are those with nonzeros.  `tools/bench/kernels.py --fit` measures a grid of layers and
prints the rows of `COSTS`, fitted by non-negative least squares on relative errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["conv", "pointwise", "depthwise", "product"]


@dataclass(frozen=True)
class Line:
    """Microseconds per call, and per million multiply-adds, outputs and inputs."""

    call: float
    mac: float
    out: float
    into: float

    def microseconds(self, macs: float, outputs: float, inputs: float) -> float:
        """The predicted time."""
        return self.call + (self.mac * macs + self.out * outputs + self.into * inputs) / 1e6


@dataclass(frozen=True)
class Work:
    """What one layer does for one sample: multiply-adds if dense, outputs, inputs; density; four channels share positions."""

    kind: Kind
    macs: float
    outputs: float
    inputs: float
    density: float
    quads: bool


@dataclass(frozen=True)
class Costs:
    """One instruction set: dense and sparse lines by kind, and changing a tensor's layout (microseconds per million elements)."""

    dense: Mapping[Kind, Line]
    single: Mapping[Kind, Line]
    quad: Mapping[Kind, Line]
    reorder: float

    def dense_time(self, work: Work) -> float:
        """Microseconds of ONNX Runtime's dense operator."""
        return self.dense[work.kind].microseconds(work.macs, work.outputs, work.inputs)

    def sparse_time(self, work: Work) -> float:
        """Microseconds of the sparse kernel."""
        line = (self.quad if work.quads else self.single)[work.kind]
        return line.microseconds(work.macs * work.density, work.outputs, work.inputs)


REFERENCE: Final = "avx2"
COSTS: Final[Mapping[str, Costs]] = {
    "avx2": Costs(
        dense={
            "conv": Line(0.0, 27.9, 144.3, 0.0),
            "pointwise": Line(0.0, 25.5, 3.0, 20.0),
            "depthwise": Line(29.7, 47.9, 5.3, 0.0),
            "product": Line(44.5, 29.1, 0.0, 0.0),
        },
        single={
            "conv": Line(3.3, 69.9, 0.0, 489.6),
            "pointwise": Line(20.9, 54.2, 78.6, 30.9),
            "depthwise": Line(189.7, 90.9, 0.0, 146.0),
            "product": Line(41.1, 70.6, 0.0, 0.0),
        },
        quad={
            "conv": Line(7.7, 45.4, 124.6, 383.7),
            "pointwise": Line(6.4, 40.4, 137.8, 15.8),
            "depthwise": Line(189.7, 90.9, 0.0, 146.0),
            "product": Line(14.6, 47.7, 0.0, 0.0),
        },
        reorder=423.5,
    ),
}
INT8_COSTS: Final[Mapping[str, Costs]] = {
    "avx2": Costs(
        dense={
            "conv": Line(5.0, 20.0, 100.0, 0.0),
            "pointwise": Line(5.0, 20.0, 100.0, 20.0),
            "product": Line(5.0, 20.0, 0.0, 0.0),
        },
        single={
            "conv": Line(5.0, 15.0, 100.0, 100.0),
            "pointwise": Line(5.0, 15.0, 100.0, 100.0),
            "product": Line(5.0, 40.0, 0.0, 0.0),
        },
        quad={},
        reorder=100.0,
    ),
}
"""The same for QLinearConv and the int8 operators, which keep depthwise layers dense and know no quads."""
