"""What every export is made of: an order (what is asked for) in, a product (what goes to disk) out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from onnx import ModelProto

from relrep_onnx.runtime import RuntimeOptions
from relrep_onnx.types import Feeds

Values = Literal["float32", "float16", "int8"]
Target = Literal["amd64", "arm"]


@dataclass(frozen=True, eq=False)
class Order:
    """What is asked for besides the form.

    `values` is how `compact` stores the numbers and `sparse-ort` computes them, `target` the processor that `ort` and `int8` are
    made for; `calibration` gives the feeds that `int8` measures ranges with, in the same order each time, or is None where there
    are no samples.  `tune` lets `sparse-ort` time its candidates on this machine, on inputs of `shapes` where the model leaves
    them open.
    """

    values: Values = "float32"
    target: Target = "amd64"
    calibration: Callable[[], Iterable[Feeds]] | None = None
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    tune: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Product:
    """What an export made: a model, or the bytes of one in another format.

    `companions` are further files by suffix, `notes` what the user should know, and `tolerance` the relative L2 that its outputs
    may be away from its source's before the export counts as broken.  What has `kernels` is for sessions with the sparse kernels
    and for sessions without, and is compared in both.
    """

    content: ModelProto | bytes
    tolerance: float
    notes: tuple[str, ...] = ()
    companions: Mapping[str, bytes] = field(default_factory=dict)
    kernels: bool = False


Exporter = Callable[[ModelProto, Order], Product]
"""Makes the product of a model, which it never changes.  Raises `RelRepError` with the reason where it cannot."""

EXACT = 1e-5
"""Tolerance of forms that keep every bit of every weight: fusions may still round differently."""
