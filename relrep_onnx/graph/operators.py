"""The operator table: where weight, activation and bias are, and how a stored weight becomes the matrix [rows, cols].

Every prunable operator is a matrix product in disguise, y = W x + b with W [rows, cols]:

    Conv           x = one input patch                          W = reshape(weight, [C_out, C_in/g * k])
    ConvTranspose  x = one patch of the zero-stuffed input      W = flipped kernel with its channel axes swapped per group
    Gemm           x = one row of A (or column, transA)         W = alpha * B^T (or B, transB)
    MatMul         x = one row of the other operand             W = the constant, contracted axis last; batch dims are groups

Nothing outside this file knows these conventions.  A new operator is one function and one row of `OPERATORS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from onnx import NodeProto

from relrep_onnx.graph.index import attribute, integer, ints, number
from relrep_onnx.types import Array, Contraction, Window


class NotPrunable(Exception):
    """Why one node's weight cannot be pruned; becomes a `Skipped` entry."""


@dataclass(frozen=True)
class Form:
    """One node's weight as a matrix.

    `to_matrix` only reshapes, transposes and flips, so applied to an index array it gives the permutation that writes back.
    A bias of shape [rows] is reshaped to `bias_shape` to broadcast against the output (Conv and ConvTranspose: plain [rows]).
    """

    rows: int
    cols: int
    groups: int
    view: Window | Contraction
    to_matrix: Callable[[Array], Array]
    bias_shape: tuple[int, ...]
    scale: float = 1.0
    bias_scale: float = 1.0


@dataclass(frozen=True)
class Operator:
    """Input slots of an operator that can hold the weight, its bias slot (None: a following Add), and its form.

    `form(node, weight shape as the node sees it, weight slot)` raises `NotPrunable` with the reason.
    """

    weight_slots: tuple[int, ...]
    bias_slot: int | None
    form: Callable[[NodeProto, tuple[int, ...], int], Form]


def _window(node: NodeProto, kernel: tuple[int, ...], *, transposed: bool) -> Window:
    axes = len(kernel)
    if axes not in (1, 2, 3):
        raise NotPrunable(f"{axes} spatial axes; 1 to 3 are supported")
    auto_pad = attribute(node, "auto_pad", b"NOTSET")
    strides, dilations = ints(node, "strides", (1,) * axes), ints(node, "dilations", (1,) * axes)
    pads = ints(node, "pads", (0,) * (2 * axes))
    if (len(strides), len(dilations), len(pads)) != (axes, axes, 2 * axes) or min(strides + dilations) < 1:
        raise NotPrunable(f"strides {strides}, dilations {dilations} or pads {pads} that do not fit a kernel of {axes} axes")
    return Window(
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad.decode(errors="replace") if isinstance(auto_pad, bytes) else str(auto_pad),
        transposed=transposed,
        output_padding=ints(node, "output_padding", (0,) * axes) if transposed else (),
        output_shape=ints(node, "output_shape", ())[-axes:] if transposed else (),
    )


def _groups(node: NodeProto, shape: tuple[int, ...]) -> int:
    groups = integer(node, "group", 1)
    if groups < 1 or shape[0] % groups:
        raise NotPrunable(f"{groups} groups do not divide a weight of shape {list(shape)}")
    return groups


def _conv(node: NodeProto, shape: tuple[int, ...], slot: int) -> Form:
    if len(shape) < 3:
        raise NotPrunable(f"a weight of rank {len(shape)} is no convolution kernel")
    groups, rows, cols = _groups(node, shape), shape[0], math.prod(shape[1:])
    if groups > 1 and shape[1] == 1:
        raise NotPrunable("depthwise convolution: few weights, large damage")

    def to_matrix(weight: Array) -> Array:
        return weight.reshape(rows, cols)

    return Form(rows, cols, groups, _window(node, shape[2:], transposed=False), to_matrix, (rows,))


def _conv_transpose(node: NodeProto, shape: tuple[int, ...], slot: int) -> Form:
    if len(shape) < 3:
        raise NotPrunable(f"a weight of rank {len(shape)} is no convolution kernel")
    groups, kernel = _groups(node, shape), shape[2:]
    inputs, outputs = shape[0] // groups, shape[1]
    if groups > 1 and (inputs == 1 or outputs == 1):
        raise NotPrunable("depthwise convolution: few weights, large damage")
    rows, cols = groups * outputs, inputs * math.prod(kernel)

    def to_matrix(weight: Array) -> Array:
        flipped = np.flip(weight, tuple(range(2, weight.ndim))).reshape(groups, inputs, outputs, *kernel)
        return flipped.swapaxes(1, 2).reshape(rows, cols)

    return Form(rows, cols, groups, _window(node, kernel, transposed=True), to_matrix, (rows,))


def _gemm(node: NodeProto, shape: tuple[int, ...], slot: int) -> Form:
    if slot != 1:
        raise NotPrunable("the constant is the first operand of Gemm; only the second is supported")
    if len(shape) != 2:
        raise NotPrunable(f"a weight of rank {len(shape)} is no matrix")
    alpha = number(node, "alpha", 1.0)
    if alpha == 0.0:
        raise NotPrunable("alpha is 0: the weight has no effect")
    transposed = bool(attribute(node, "transB", 0))
    rows, cols = shape if transposed else shape[::-1]

    def to_matrix(weight: Array) -> Array:
        return weight if transposed else weight.T

    axis = 0 if attribute(node, "transA", 0) else -1
    beta = number(node, "beta", 1.0)
    return Form(rows, cols, 1, Contraction(axis), to_matrix, (rows,), scale=alpha, bias_scale=beta)


def _matmul(node: NodeProto, shape: tuple[int, ...], slot: int) -> Form:
    if len(shape) < 2:
        raise NotPrunable("a one-dimensional operand of MatMul")
    batch, right = shape[:-2], slot == 1
    groups = math.prod(batch)
    cols, out = shape[-2:] if right else shape[:-3:-1]
    rows = groups * out

    def to_matrix(weight: Array) -> Array:
        return (weight.swapaxes(-1, -2) if right else weight).reshape(rows, cols)

    bias_shape = (*batch, *((1,) if batch else ()), out) if right else (*batch, out, 1)
    return Form(rows, cols, groups, Contraction(-1 if right else -2, batch), to_matrix, bias_shape)


OPERATORS: Final[Mapping[str, Operator]] = {
    "Conv": Operator((1,), 2, _conv),
    "ConvTranspose": Operator((1,), 2, _conv_transpose),
    "Gemm": Operator((1, 0), 2, _gemm),
    "MatMul": Operator((1, 0), None, _matmul),
}
