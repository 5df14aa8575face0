"""The operators of the kernels as functions of standard ONNX operators, and weights as these operators store them.

    positions = CumSum(Cast(gaps));   W = Reshape(ScatterElements(zeros, positions, values), weight_shape)
    SparseConv[Add][Relu|Clip] = Conv(X, W, bias) [+ residual] [Relu | Clip]
    SparseGemm[Add][Relu|Clip] = X W^T + bias     [+ residual] [Relu | Clip]
    SparseQConv[Clip]          = QLinearConv(X, W, bias)                            [Clip], uint8 in and out, W int8
    SparseQGemm[Clip]          = round((X - x_zero) W^T + bias) * scale) + y_zero   [Clip]

A runtime that has the kernels runs them; one that does not inlines the function and folds the weight into a dense constant.
Positions count in the row-major weight; `gaps` are the distances between neighbours, the first from 0, in one byte each: a longer
distance is bridged by entries of gap 255 and value 0.  Bounds of the int8 Clip are bytes.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from relrep_onnx.types import Array

DOMAIN: Final = "relrep"

Family = Literal["SparseConv", "SparseGemm"]
Int8Family = Literal["SparseQConv", "SparseQGemm"]
Activation = Literal["", "Relu", "Clip"]
WIDEST: Final = 255
WINDOW: Final = ("strides", "pads", "dilations", "group")
INT8_INPUTS: Final = ("X", "x_scale", "x_zero_point", "values", "gaps", "w_scale", "y_scale", "y_zero_point", "bias")


def encode(weight: Array) -> tuple[Array, Array]:
    """The nonzeros of a weight, int8 or else float32: values[n] of that type and gaps uint8[n], n at least 1."""
    kind = np.int8 if weight.dtype == np.int8 else np.float32
    flat = np.ascontiguousarray(weight, kind).reshape(-1)
    positions = np.flatnonzero(flat)
    if positions.size == 0:
        return np.zeros(1, kind), np.zeros(1, np.uint8)
    gaps, at = gaps_of(positions)
    values = np.zeros(gaps.size, kind)
    values[at] = flat[positions]
    return values, gaps


def gaps_of(positions: Array) -> tuple[Array, Array]:
    """Rising positions as gaps uint8[n], and which of these are theirs: the others, all 255, bridge longer gaps."""
    steps = np.diff(positions, prepend=0)
    bridges = np.maximum(steps - 1, 0) // WIDEST
    at = np.cumsum(bridges + 1) - 1
    gaps = np.full(int((bridges + 1).sum()), WIDEST, np.uint8)
    gaps[at] = steps - WIDEST * bridges
    return gaps, at


def operator_name(family: Family, *, adds: bool, activation: Activation) -> str:
    """The operator's name, such as SparseConvAddRelu."""
    return f"{family}{'Add' if adds else ''}{activation}"


def function(family: Family, opset: int, *, adds: bool, activation: Activation) -> FunctionProto:
    """The exact dense computation of one operator."""
    inputs = ["X", "values", "gaps", "bias", *(["residual"] if adds else [])]
    nodes = _unpacking(TensorProto.FLOAT)
    names = ["weight_shape"]
    if family == "SparseConv":
        nodes.append(_windowed("Conv", ["X", "weight", "bias"]))
        names.extend(WINDOW)
    else:
        nodes += [
            helper.make_node("Transpose", ["weight"], ["columns"], perm=[1, 0]),
            helper.make_node("MatMul", ["X", "columns"], ["unbiased"]),
            helper.make_node("Add", ["unbiased", "bias"], ["product"]),
        ]
    last = "product"
    if adds:
        nodes.append(helper.make_node("Add", [last, "residual"], ["sum"]))
        last = "sum"
    if activation == "Clip":
        names += ["min", "max"]
        nodes += [_constant(name, "value_float", name, AttributeProto.FLOAT) for name in ("min", "max")]
    if activation:
        bounds = ["min", "max"] if activation == "Clip" else []
        nodes.append(helper.make_node(activation, [last, *bounds], ["Y"]))
    else:
        nodes[-1].output[0] = "Y"
    name = operator_name(family, adds=adds, activation=activation)
    return helper.make_function(DOMAIN, name, inputs, ["Y"], nodes, [helper.make_opsetid("", opset)], names)


def int8_function(family: Int8Family, opset: int, *, clips: bool) -> FunctionProto:
    """The exact dense computation of one int8 operator; a product's sums are int32, as those of QLinearConv."""
    nodes, names = _unpacking(TensorProto.INT8), ["weight_shape"]
    if family == "SparseQConv":
        nodes += [
            helper.make_node("Constant", [], ["w_zero"], value=helper.make_tensor("", TensorProto.INT8, [], [0])),
            _windowed(
                "QLinearConv",
                ["X", "x_scale", "x_zero_point", "weight", "w_scale", "w_zero", "y_scale", "y_zero_point", "bias"],
            ),
        ]
        names.extend(WINDOW)
    else:
        nodes += [
            helper.make_node("Transpose", ["weight"], ["columns"], perm=[1, 0]),
            helper.make_node("MatMulInteger", ["X", "columns", "x_zero_point"], ["unbiased"]),
            helper.make_node("Add", ["unbiased", "bias"], ["sum"]),
            helper.make_node("Cast", ["sum"], ["floating"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["x_scale", "w_scale"], ["scale"]),
            helper.make_node("Mul", ["floating", "scale"], ["scaled"]),
            helper.make_node("QuantizeLinear", ["scaled", "y_scale", "y_zero_point"], ["product"]),
        ]
    if clips:
        names += ["low", "high"]
        for name in ("low", "high"):
            nodes.append(_constant(f"{name}_wide", "value_int", name, AttributeProto.INT))
            nodes.append(helper.make_node("Cast", [f"{name}_wide"], [name], to=TensorProto.UINT8))
        nodes.append(helper.make_node("Clip", ["product", "low", "high"], ["Y"]))
    else:
        nodes[-1].output[0] = "Y"
    name = int8_operator_name(family, clips=clips)
    return helper.make_function(DOMAIN, name, INT8_INPUTS, ["Y"], nodes, [helper.make_opsetid("", opset)], names)


def int8_operator_name(family: Int8Family, *, clips: bool) -> str:
    """The operator's name, such as SparseQConvClip."""
    return f"{family}{'Clip' if clips else ''}"


def _unpacking(kind: int) -> list[NodeProto]:
    """Nodes that make `weight` of `values`, of this element type, and `gaps`."""
    return [
        _constant("shape", "value_ints", "weight_shape", AttributeProto.INTS),
        helper.make_node("Constant", [], ["axis"], value_int=0),
        helper.make_node("Constant", [], ["flat"], value_ints=[-1]),
        helper.make_node("ConstantOfShape", ["shape"], ["empty"], value=helper.make_tensor("", kind, [1], [0])),
        helper.make_node("Reshape", ["empty", "flat"], ["zeros"]),
        helper.make_node("Cast", ["gaps"], ["steps"], to=TensorProto.INT64),
        helper.make_node("CumSum", ["steps", "axis"], ["positions"]),
        helper.make_node("ScatterElements", ["zeros", "positions", "values"], ["scattered"]),
        helper.make_node("Reshape", ["scattered", "shape"], ["weight"]),
    ]


def _windowed(op: str, inputs: list[str]) -> NodeProto:
    """A convolution whose attributes are the function's."""
    conv = helper.make_node(op, inputs, ["product"])
    conv.attribute.extend(_reference(n, n, AttributeProto.INT if n == "group" else AttributeProto.INTS) for n in WINDOW)
    return conv


def _reference(name: str, to: str, kind: AttributeProto.AttributeType) -> AttributeProto:
    """An attribute whose value is an attribute of the function."""
    return AttributeProto(name=name, ref_attr_name=to, type=kind)


def _constant(output: str, name: str, to: str, kind: AttributeProto.AttributeType) -> NodeProto:
    node = helper.make_node("Constant", [], [output])
    node.attribute.append(_reference(name, to, kind))
    return node
