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
            "conv": Line(0.0, 24.7, 1135.9, 0.0),
            "pointwise": Line(0.0, 24.0, 99.1, 29.9),
            "depthwise": Line(0.0, 52.5, 56.3, 50.6),
            "product": Line(44.2, 29.7, 0.0, 0.0),
        },
        single={
            "conv": Line(10.9, 72.3, 0.0, 265.6),
            "pointwise": Line(27.0, 53.5, 93.9, 29.6),
            "depthwise": Line(14.1, 21.4, 0.0, 790.7),
            "product": Line(50.2, 52.2, 0.0, 0.0),
        },
        quad={
            "conv": Line(2.7, 46.3, 0.0, 1287.0),
            "pointwise": Line(14.7, 39.6, 118.3, 47.0),
            "depthwise": Line(14.1, 21.4, 0.0, 790.7),
            "product": Line(24.7, 39.1, 0.0, 316.8),
        },
        reorder=329.8,
    ),
}
INT8_COSTS: Final[Mapping[str, Costs]] = {
    "avx2": Costs(
        dense={
            "conv": Line(2.1, 12.0, 515.2, 515.2),
            "pointwise": Line(9.1, 12.6, 328.7, 21.0),
            "product": Line(11.3, 11.2, 0.0, 0.0),
        },
        single={
            "conv": Line(7.0, 17.9, 185.0, 185.0),
            "pointwise": Line(13.9, 19.2, 208.4, 10.9),
            "product": Line(22.2, 12.3, 0.0, 503.5),
        },
        quad={},
        reorder=199.2,
    ),
}
"""The same for QLinearConv and the int8 operators (`--fit --int8`); these know no quads, and depthwise layers stay dense."""
