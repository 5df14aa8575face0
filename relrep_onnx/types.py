"""The shared vocabulary: frozen dataclasses and the error classes; no logic beyond validation.

Symbols: a layer's weight is seen as a matrix ``[rows, cols]``; ``rows`` are output channels, ``cols`` the inputs one output
channel reads (for a convolution C_in / groups * kernel size).  Sparsity is the fraction of zeros, in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FloatArray = NDArray[Any]
BoolArray = NDArray[np.bool_]
Feeds = Mapping[str, Array]
Unit = Literal["weights", "macs", "latency"]
MOST: Final = 10**9
"""Of samples, of a size, of passes: more are taken for a slip, and would leave the integers that others count with."""
THREADS: Final = 1024
"""ONNX Runtime takes minutes to start thousands of them."""
EXTREME: Final = 1e18
"""Weights and activations beyond this are taken for broken: their products leave float32's range."""


class Progress(Protocol):
    """Called with what is running, steps done, steps in all, and perhaps a note on how it goes."""

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Takes note of it."""


class RelRepError(Exception):
    """Base of every error this package raises on purpose; the message says what is wrong and what to do."""


class ModelError(RelRepError):
    """The model file cannot be read, run or written."""


class CalibrationError(RelRepError):
    """The calibration data does not fit the model."""


class BudgetError(RelRepError):
    """No allocation meets the asked budget; the message says what is possible."""


class VerificationError(RelRepError):
    """A written model missed a gate."""


class ConfigError(RelRepError):
    """A setting is wrong or cannot apply."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a model; `type` as ONNX Runtime spells it. Symbolic dimensions are names, unknown ones None."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @property
    def dtype(self) -> np.dtype[np.generic] | None:
        """The numpy dtype, or None for strings and everything that is no tensor."""
        kind, _, inner = self.type.removesuffix(")").partition("(")
        names = {"float": "float32", "double": "float64"}
        try:
            return np.dtype(names.get(inner, inner)) if kind == "tensor" and inner != "string" else None
        except TypeError:  # bfloat16 and other types numpy does not have
            return None


@dataclass(frozen=True)
class Window:
    """How a (transposed) convolution reads its input; one entry per spatial axis, pads as begins then ends."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Contraction:
    """How a matrix product reads its input: the activation's contracted axis, and the weight's own batch dimensions."""

    axis: int
    batch: tuple[int, ...] = ()


@dataclass(frozen=True)
class Use:
    """One node that reads a layer's weight: its display name, its input and its (unique) first output."""

    node: str
    activation: str
    output: str


@dataclass(frozen=True)
class Layer:
    """One prunable weight.  It holds no arrays: `graph.read_weight` gives the matrix float64[rows, cols].

    `normalized` says that its output goes straight into a BatchNormalization, which makes the scale of its rows free.
    `shortcut` is the other operand of the residual sum that the layer's branch ends in, where it is known before the layer.
    """

    name: str
    op: str
    weight: str
    shape: tuple[int, ...]
    rows: int
    cols: int
    groups: int
    view: Window | Contraction
    uses: tuple[Use, ...]
    normalized: bool = False
    shortcut: str | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.cols

    @property
    def kernel(self) -> int:
        """Positions of a convolution's kernel; 1 for a matrix product."""
        return math.prod(self.view.kernel) if isinstance(self.view, Window) else 1

    @property
    def channels(self) -> int:
        """Input channels that one output channel reads; in the matrix, each has its kernel positions side by side."""
        return self.cols // self.kernel


@dataclass(frozen=True)
class Skipped:
    """A weight that stays as it is, and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """Which weights may be pruned.  Patterns are exact names or regular expressions that match a whole name."""

    min_size: int = 1024
    nodes_to_exclude: tuple[str, ...] = ()
    op_types: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """A global sparsity over the prunable layers, in weights or in multiply-accumulates (MACs), with per-layer bounds."""

    sparsity: float
    unit: Unit = "weights"
    floor: float = 0.0
    ceiling: float = 1.0
    layers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, value in [
            ("sparsity", self.sparsity),
            ("minimum layer sparsity", self.floor),
            ("maximum layer sparsity", self.ceiling),
            *((f"sparsity of layer {name!r}", value) for name, value in self.layers.items()),
        ]:
            if not (math.isfinite(value) and 0.0 <= value <= 1.0):
                raise ConfigError(f"the {what} is {value}; give a fraction between 0 and 1, such as 0.8 for 80 %")
        if self.floor > self.ceiling:
            raise ConfigError(f"the minimum layer sparsity {self.floor} is above the maximum {self.ceiling}; swap them")
        if self.unit not in get_args(Unit):
            raise ConfigError(f"the budget unit is {self.unit!r}; it must be 'weights', 'macs' or 'latency'")


@dataclass(frozen=True, eq=False)
class RepairedLayer:
    """What is written back: weight float[rows, cols] with exact zeros, and float64[rows] to add to the bias.

    `residual` float64[rows] is E|yd - ys|^2 that is left on the moments the repair was given; `notes` say what was unusual.
    """

    weight: FloatArray
    bias_shift: FloatArray
    residual: FloatArray
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ScoreCurve:
    """Distortion of one layer's output against its sparsity, from its input moments alone.

    `raw` is E|yd - ys|^2 per output position, summed over channels, after pruning; `residual` the same after repair;
    `signal` is the summed variance of yd.  Arrays are float64[points]; `sparsity` ascends in (0, 1].  `damage` is the squared
    relative error of the model's outputs when this layer alone is pruned to `probe` and repaired; NaN where not measured.
    """

    layer: str
    size: int
    signal: float
    sparsity: FloatArray
    raw: FloatArray
    residual: FloatArray
    probe: float = math.nan
    damage: float = math.nan

    @property
    def rr(self) -> FloatArray:
        """Relative Repairability, residual / raw; NaN where pruning does no damage."""
        defined = self.raw > 0
        return np.where(defined, self.residual / np.where(defined, self.raw, 1.0), np.nan)

    def _at(self, values: FloatArray, sparsity: float) -> float:
        return float(np.interp(sparsity, np.append(0.0, self.sparsity), np.append(0.0, values)))

    def raw_at(self, sparsity: float) -> float:
        """Raw distortion, interpolated linearly (0 at sparsity 0)."""
        return self._at(self.raw, sparsity)

    def residual_at(self, sparsity: float) -> float:
        """Residual distortion, interpolated linearly (0 at sparsity 0)."""
        return self._at(self.residual, sparsity)

    def rr_at(self, sparsity: float) -> float:
        """RR at a sparsity: NaN at 0, where it is undefined, and where pruning does no damage."""
        raw = self.raw_at(sparsity)
        return self.residual_at(sparsity) / raw if raw > 0 else math.nan

    def snr_db(self, sparsity: float) -> float:
        """Signal-to-noise ratio of the repaired output in decibels."""
        noise = self.residual_at(sparsity)
        if noise <= 0:
            return math.inf
        return 10 * math.log10(self.signal / noise) if self.signal > 0 else -math.inf
