"""One sparse layer as a model for the kernels, the same layer as plain ONNX, and sessions for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, helper

from relrep_onnx import kernels
from relrep_onnx.kernels import functions
from relrep_onnx.types import Array
from tests.models import build, random

BOUNDS: Final = {"min": -0.5, "max": 0.75}
OPSET: Final = 17
VARIABLE: Final = "RELREP_KERNELS_ISA"


@dataclass(frozen=True, eq=False)
class SparseLayer:
    """One operator: its weight float32[out, in, kh, kw] or [out, in], what is fused in, and Conv's attributes."""

    weight: Array
    adds: bool = False
    activation: functions.Activation = ""
    window: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> functions.Family:
        return "SparseConv" if self.weight.ndim == 4 else "SparseGemm"

    @property
    def bias(self) -> Array:
        return random(3, self.weight.shape[0])

    def _inputs(self) -> dict[str, Sequence[int | str]]:
        rank = self.weight.ndim
        dims = [f"d{i}" for i in range(rank)]
        return {"x": dims, **({"residual": [f"r{i}" for i in range(rank)]} if self.adds else {})}

    def sparse(self, **changes: Any) -> ModelProto:
        """The model that holds the operator; `changes` replace stored tensors (values, gaps, bias) or attributes of the node."""
        values, gaps = functions.encode(self.weight)
        stored = {"values": values, "gaps": gaps, "bias": self.bias}
        attributes: dict[str, Any] = {"weight_shape": list(self.weight.shape)}
        if self.family == "SparseConv":
            attributes |= {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1, **self.window}
        if self.activation == "Clip":
            attributes |= BOUNDS
        for name, value in changes.items():
            (stored if name in stored else attributes)[name] = value
        body = functions.function(self.family, OPSET, adds=self.adds, activation=self.activation)
        inputs = ["x", "values", "gaps", "bias", *(["residual"] if self.adds else [])]
        node = helper.make_node(body.name, inputs, ["y"], domain=functions.DOMAIN, **attributes)
        return build([node], self._inputs(), ["y"], stored, functions=[body])

    def dense(self) -> ModelProto:
        """The same layer in standard operators, written without the functions."""
        nodes: list[NodeProto] = []
        stored = {"w": self.weight, "b": self.bias}
        if self.family == "SparseConv":
            nodes.append(helper.make_node("Conv", ["x", "w", "b"], ["t0"], **self.window))
        else:
            nodes.append(helper.make_node("MatMul", ["x", "wt"], ["p"]))
            nodes.append(helper.make_node("Add", ["p", "b"], ["t0"]))
            stored = {"wt": np.ascontiguousarray(self.weight.T), "b": self.bias}
        if self.adds:
            nodes.append(helper.make_node("Add", [nodes[-1].output[0], "residual"], ["t1"]))
        if self.activation == "Relu":
            nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], ["t2"]))
        if self.activation == "Clip":
            stored |= {"low": np.array(BOUNDS["min"], np.float32), "high": np.array(BOUNDS["max"], np.float32)}
            nodes.append(helper.make_node("Clip", [nodes[-1].output[0], "low", "high"], ["t2"]))
        return build(nodes, self._inputs(), [nodes[-1].output[0]], stored)


def session(model: ModelProto | bytes, *, sparse: bool, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session of stock ONNX Runtime, with or without the library."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if sparse:
        kernels.register(options)
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def sparse_weight(seed: int, shape: Sequence[int], density: float, *, block: int = 1) -> Array:
    """Normal numbers, all zero but a share; `block` neighbouring output channels share their positions."""
    rng = np.random.default_rng([seed, *shape])
    kept = rng.random((-(-shape[0] // block), *shape[1:])) < density
    return np.where(np.repeat(kept, block, 0)[: shape[0]], rng.standard_normal(shape), 0).astype(np.float32)


def decoded(values: Array, gaps: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `functions.encode`."""
    flat = np.zeros(int(np.prod(shape)), values.dtype)
    flat[np.cumsum(gaps.astype(np.int64))] = values
    return flat.reshape(shape)


def close(got: Array, wanted: Array) -> bool:
    """Within 1e-4 of the largest value."""
    return got.shape == wanted.shape and bool(
        np.abs(got - wanted).max(initial=0) <= 1e-4 * max(1e-3, np.abs(wanted).max(initial=0))
    )
