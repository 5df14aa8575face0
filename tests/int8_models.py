"""One sparse int8 layer as a model for the kernels, the same layer in standard operators, and what it computes in plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from onnx import ModelProto, TensorProto, helper

from relrep_onnx.kernels import functions
from relrep_onnx.types import Array
from tests.kernel_models import OPSET, sparse_weight
from tests.models import build

X_SCALE: Final = 0.02
BOUNDS: Final = {"low": 100, "high": 180}
SEVEN_BITS: Final = 64
"""Weights up to here are exact in ONNX Runtime on every processor."""


@dataclass(frozen=True, eq=False)
class Int8Layer:
    """One operator: its weight int8[out, in, kh, kw] or [out, in], zero points, Conv's attributes."""

    weight: Array
    clips: bool = False
    window: dict[str, Any] = field(default_factory=dict)
    x_zero: int = 131
    y_zero: int = 117

    @property
    def family(self) -> functions.Int8Family:
        return "SparseQConv" if self.weight.ndim == 4 else "SparseQGemm"

    @property
    def parts(self) -> dict[str, Array]:
        """The stored tensors by name; the result spreads over the bytes."""
        rows = self.weight.shape[0]
        rng = np.random.default_rng(rows)
        w_scale = np.asarray(rng.uniform(0.005, 0.015, rows), np.float32)
        size = float(np.sqrt(np.square(self.weight.astype(np.float64)).reshape(rows, -1).sum(axis=1).mean()))
        values, gaps = functions.encode(self.weight)
        return {
            "x_scale": np.array(X_SCALE, np.float32),
            "x_zero_point": np.array(self.x_zero, np.uint8),
            "values": values,
            "gaps": gaps,
            "w_scale": w_scale,
            "y_scale": np.array(max(size, 1.0) * X_SCALE * 0.01 * 1.2, np.float32),
            "y_zero_point": np.array(self.y_zero, np.uint8),
            "bias": np.asarray(rng.integers(-2000, 2000, rows), np.int32),
        }

    @property
    def attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = {"weight_shape": list(self.weight.shape)}
        if self.family == "SparseQConv":
            attributes |= {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1, **self.window}
        return attributes | (BOUNDS if self.clips else {})

    def sparse(self, **changes: Any) -> ModelProto:
        """The model that holds the operator; `changes` replace stored tensors or attributes of the node."""
        stored, attributes = self.parts, self.attributes
        for name, value in changes.items():
            (stored if name in stored else attributes)[name] = value
        body = functions.int8_function(self.family, OPSET, clips=self.clips)
        node = helper.make_node(body.name, ["x", *functions.INT8_INPUTS[1:]], ["y"], domain=functions.DOMAIN, **attributes)
        return self._model([node], stored, functions=[body])

    def dense(self) -> ModelProto:
        """QLinearConv in ONNX Runtime; a product is a convolution of one place."""
        stored = self.parts
        weight = self.weight if self.weight.ndim == 4 else self.weight[:, :, None, None]
        stored |= {"w": weight, "w_zero": np.array(0, np.int8), "places": np.array([0, 0, 1, 1])}
        nodes = []
        x = "x"
        if self.weight.ndim == 2:
            stored |= {"as_image": np.array([-1, weight.shape[1], 1, 1]), "as_rows": np.array([-1, weight.shape[0]])}
            nodes.append(helper.make_node("Reshape", ["x", "as_image"], ["image"]))
            x = "image"
        inputs = [x, "x_scale", "x_zero_point", "w", "w_scale", "w_zero", "y_scale", "y_zero_point", "bias"]
        nodes.append(helper.make_node("QLinearConv", inputs, ["product"], **self.window))
        if self.weight.ndim == 2:
            nodes.append(helper.make_node("Reshape", ["product", "as_rows"], ["rows"]))
        if self.clips:
            stored |= {name: np.array(value, np.uint8) for name, value in BOUNDS.items()}
            nodes.append(helper.make_node("Clip", [nodes[-1].output[0], "low", "high"], ["clipped"]))
        return self._model(nodes, stored)

    def _model(self, nodes: list[Any], stored: dict[str, Array], **kwargs: Any) -> ModelProto:
        model = build(nodes, {"x": [f"d{i}" for i in range(self.weight.ndim)]}, [nodes[-1].output[0]], stored, **kwargs)
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
        return model

    def exact(self, x: Array) -> Array:
        """The result by plain sums of whole numbers."""
        p = self.parts
        w = self.weight.astype(np.int64)
        signed = x.astype(np.int64) - self.x_zero
        scale = p["w_scale"].astype(np.float64) * X_SCALE / float(p["y_scale"])
        if w.ndim == 2:
            sums = signed @ w.T + p["bias"]
        else:
            sums = _convolved(signed, w, self.attributes) + p["bias"][:, None, None]
            scale = scale[:, None, None]
        y = np.rint(sums * scale) + self.y_zero
        low, high = (BOUNDS["low"], BOUNDS["high"]) if self.clips else (0, 255)
        result: Array = np.clip(y, low, high).astype(np.uint8)
        return result


def _convolved(x: Array, w: Array, window: dict[str, Any]) -> Array:
    """A convolution one tap of the kernel at a time, int64."""
    (top, left, bottom, right), (sy, sx), (dy, dx) = window["pads"], window["strides"], window["dilations"]
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    kh, kw = w.shape[2:]
    height = (padded.shape[2] - (kh - 1) * dy - 1) // sy + 1
    width = (padded.shape[3] - (kw - 1) * dx - 1) // sx + 1
    rows, channels, groups = w.shape[0] // window["group"], w.shape[1], window["group"]
    sums = np.zeros((x.shape[0], w.shape[0], height, width), np.int64)
    for g in range(groups):
        own = padded[:, g * channels : (g + 1) * channels]
        for i in range(kh):
            for j in range(kw):
                taps = own[:, :, i * dy : i * dy + (height - 1) * sy + 1 : sy, j * dx : j * dx + (width - 1) * sx + 1 : sx]
                sums[:, g * rows : (g + 1) * rows] += np.einsum("nchw,rc->nrhw", taps, w[g * rows : (g + 1) * rows, :, i, j])
    return sums


def int8_weight(seed: int, shape: Sequence[int], density: float, *, block: int = 1, most: int = SEVEN_BITS) -> Array:
    """Whole numbers up to `most`; `block` neighbouring input channels share their positions."""
    kept = sparse_weight(seed, (-(-shape[1] // block), shape[0], *shape[2:]), density) != 0
    mask = np.repeat(kept, block, axis=0)[: shape[1]].swapaxes(0, 1)
    return np.where(mask, np.random.default_rng([seed, 1]).integers(-most, most + 1, shape), 0).astype(np.int8)


def random_bytes(seed: int, *shape: int) -> Array:
    """uint8, all values as likely."""
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
