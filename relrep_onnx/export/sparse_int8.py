"""The layers of a quantized model (QuantizeLinear / DequantizeLinear pairs) that could be sparse int8 operators.

    DequantizeLinear -> Conv -> [Relu | Clip] -> QuantizeLinear          becomes one SparseQConv[Clip]
    DequantizeLinear -> Gemm | MatMul -> [Relu | Clip] -> QuantizeLinear   becomes one SparseQGemm[Clip]

Rounding is monotone and 0 is a byte, so Relu and Clip are bounds of the rounded result.  Depthwise convolutions stay dense: a
channel of its own would fill a quarter of a dot product.

    DequantizeLinear -> MaxPool -> QuantizeLinear   behind such an operator becomes Transpose -> NhwcMaxPool -> Transpose

since ONNX Runtime's MaxPool of bytes is fast with the channels last only (docs/decisions/0031).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, helper

from relrep_onnx.export.sparse_layers import (
    Candidate,
    Operator,
    Shapes,
    clip_bounds,
    conv_window,
    find_neighbours,
    only_reader,
    work_of,
)
from relrep_onnx.graph import Graph
from relrep_onnx.graph.index import attribute, display_name, ints, is_standard, number
from relrep_onnx.kernels import functions
from relrep_onnx.types import Array

BLOCK: Final = 4
"""Input channels that a nonzero of the kernels holds."""
BYTE: Final = 255
SCALES_AGREE: Final = 1e-5
POOL_DOMAIN: Final = "com.microsoft"
POOL_ATTRIBUTES: Final = ("auto_pad", "ceil_mode", "kernel_shape", "pads", "strides")


@dataclass(frozen=True, eq=False)
class Quantized:
    """One side of a layer: the tensor of bytes, its scale and its zero point."""

    name: str
    scale: Array
    zero_point: Array


@dataclass(eq=False)
class Int8Layer(Candidate):
    """A quantized layer, its weight int8; `bounds` are those of the rounded result."""

    bias: Array
    weight_scale: Array
    x: Quantized
    y: Quantized
    window: dict[str, Any]
    bounds: tuple[int, int] | None

    @property
    def sources(self) -> tuple[str, ...]:
        """The activations it reads."""
        return (self.x.name,)

    @property
    def filled(self) -> float:
        """Share of the weight's blocks that are not zero."""
        channels = self.weight.shape[1]
        padded = np.pad(self.weight != 0, [(0, 0), (0, -channels % BLOCK), *[(0, 0)] * (self.weight.ndim - 2)])
        return float(padded.reshape(self.weight.shape[0], -1, BLOCK, *self.weight.shape[2:]).any(axis=2).mean())

    def operator(self, opset: int) -> Operator:
        """What it becomes, in a model of this opset."""
        family: functions.Int8Family = "SparseQConv" if self.nodes[0].op_type == "Conv" else "SparseQGemm"
        body = functions.int8_function(family, opset, clips=self.bounds is not None)
        values, gaps = functions.encode(self.weight)
        inputs: list[str | tuple[str, Array]] = [
            self.x.name,
            ("x_scale", self.x.scale),
            ("x_zero_point", self.x.zero_point),
            ("values", values),
            ("gaps", gaps),
            ("w_scale", self.weight_scale),
            ("y_scale", self.y.scale),
            ("y_zero_point", self.y.zero_point),
            ("bias", self.bias),
        ]
        bounds = {} if self.bounds is None else dict(zip(("low", "high"), self.bounds, strict=True))
        return Operator(body, inputs, {"weight_shape": self.weight.shape, **self.window, **bounds})


def int8_layers(model: ModelProto, shapes: Shapes) -> list[Int8Layer]:
    """All of a quantized model; none of one that is not."""
    graph = Graph(model)
    found = []
    for node in model.graph.node:
        if is_standard(node) and node.op_type in ("Conv", "Gemm", "MatMul"):
            layer = _layer(graph, node)
            if layer is not None:
                layer.work = work_of(layer, shapes, density=layer.filled, quads=False)
                found.append(layer)
    find_neighbours(graph, found, shapes)
    return found


def rewrite_pools(model: ModelProto, planar: Collection[str]) -> None:
    """Gives every MaxPool of bytes the operator with the channels last; `planar` names the tensors of bytes with them first."""
    graph, made = Graph(model), set(planar)
    for pool in [node for node in model.graph.node if is_standard(node) and node.op_type == "MaxPool"]:
        x = _source(graph, pool.input[0])
        rounding = only_reader(graph, pool.output[0])
        y = None if rounding is None or rounding.op_type != "QuantizeLinear" else _quantized(graph, rounding, rounding.output[0])
        if x is None or y is None or rounding is None or x.name not in made:
            continue
        plain = len(ints(pool, "kernel_shape", ())) == 2 and len(pool.output) == 1 and set(ints(pool, "dilations", (1,))) == {1}
        if not plain or (x.scale, x.zero_point) != (y.scale, y.zero_point):
            continue
        before, after = graph.fresh(f"{y.name}.before"), graph.fresh(f"{y.name}.after")
        window = [item for item in pool.attribute if item.name in POOL_ATTRIBUTES]
        last = helper.make_node("NhwcMaxPool", [before], [after], name=pool.name, domain=POOL_DOMAIN)
        last.attribute.extend(window)
        nodes = [
            helper.make_node("Transpose", [x.name], [before], perm=[0, 2, 3, 1]),
            last,
            helper.make_node("Transpose", [after], [y.name], perm=[0, 3, 1, 2]),
        ]
        place = list(model.graph.node).index(rounding)
        for node in reversed(nodes):
            model.graph.node.insert(place, node)
        for node in (pool, rounding):
            model.graph.node.remove(node)
        made.add(y.name)
    if made > set(planar) and POOL_DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(POOL_DOMAIN, 1))


def _layer(graph: Graph, node: NodeProto) -> Int8Layer | None:
    x = _source(graph, node.input[0])
    stored = _weight(graph, node)
    if x is None or stored is None:
        return None
    weight, scale = stored
    bias = _bias(graph, node, x.scale * scale)
    reach = np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(axis=1) * BYTE
    if bias is None or (reach + np.abs(bias.astype(np.int64)) > np.iinfo(np.int32).max).any():
        return None
    after = only_reader(graph, node.output[0])
    activation = after if after is not None and after.op_type in ("Relu", "Clip") else None
    rounding = after if activation is None else only_reader(graph, activation.output[0])
    y = None if rounding is None or rounding.op_type != "QuantizeLinear" else _quantized(graph, rounding, rounding.output[0])
    if rounding is None or y is None:
        return None
    bounds = None
    if activation is not None:
        bounds = _bounds(graph, activation, y)
        if bounds is None:
            return None
    nodes = [node, *([activation] if activation is not None else []), rounding]
    window = conv_window(node) if node.op_type == "Conv" else {}
    return Int8Layer(display_name(node), weight, nodes, bias, scale, x, y, window, bounds)


def _quantized(graph: Graph, node: NodeProto, name: str) -> Quantized | None:
    """The bytes that a QuantizeLinear gives or a DequantizeLinear takes, where one scale and a zero point are stored."""
    if not is_standard(node) or len(node.input) < 3:
        return None
    scale, zero = graph.value(node.input[1]), graph.value(node.input[2])
    if scale is None or zero is None or scale.size != 1 or scale.dtype != np.float32 or zero.dtype != np.uint8:
        return None
    return Quantized(name, scale.reshape(()), zero.reshape(()))


def _source(graph: Graph, name: str) -> Quantized | None:
    node = graph.producers.get(name)
    if node is None or node.op_type != "DequantizeLinear" or node.input[0] in graph.constant_names:
        return None
    return _quantized(graph, node, node.input[0])


def _dequantized(graph: Graph, name: str, kind: type[np.generic]) -> tuple[Array, Array, int] | None:
    """A stored tensor of whole numbers around 0, its scale, and the axis that a vector of scales goes along."""
    node = graph.producers.get(name)
    if node is None or node.op_type != "DequantizeLinear" or not is_standard(node):
        return None
    values, scale = graph.value(node.input[0]), graph.value(node.input[1])
    zero = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if values is None or scale is None or zero is None or values.dtype != kind or scale.dtype != np.float32 or zero.any():
        return None
    return values, scale, int(number(node, "axis", 1)) % max(values.ndim, 1)


def _weight(graph: Graph, node: NodeProto) -> tuple[Array, Array] | None:
    """The weight int8[out, in, ...] and its scale float32[out]."""
    found = _dequantized(graph, node.input[1], np.int8)
    if found is None:
        return None
    weight, scale, axis = found
    if node.op_type == "Conv":
        plain = attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID", b"")
        if weight.ndim != 4 or weight.shape[1] == 1 or not plain:
            return None
    elif weight.ndim != 2 or attribute(node, "transA", 0) or number(node, "alpha", 1.0) != 1:
        return None
    elif not attribute(node, "transB", 0):
        weight, axis = weight.T, 1 - axis
    if scale.size not in (1, len(weight)) or (scale.size > 1 and axis != 0) or not (scale > 0).all():
        return None
    return weight, np.broadcast_to(scale.reshape(-1), (len(weight),)).copy()


def _bias(graph: Graph, node: NodeProto, scale: Array) -> Array | None:
    """int32[out], zeros where there is none; `scale` is what a sum's unit means."""
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(scale.size, np.int32)
    found = _dequantized(graph, node.input[2], np.int32)
    if found is None or found[0].shape != scale.shape or number(node, "beta", 1.0) != 1:
        return None
    return found[0] if np.allclose(found[1], scale, rtol=SCALES_AGREE, atol=0) else None


def _bounds(graph: Graph, activation: NodeProto, y: Quantized) -> tuple[int, int] | None:
    """What a Relu or Clip with stored bounds leaves of the bytes."""
    zero = int(y.zero_point)
    if activation.op_type == "Relu":
        return zero, BYTE
    bounds = clip_bounds(graph, activation)
    if bounds is None:
        return None
    low, high = (int(np.clip(np.rint(np.float32(bound) / y.scale) + zero, 0, BYTE)) for bound in bounds)
    return low, high
