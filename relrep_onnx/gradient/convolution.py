"""Gradients of convolutions.

For y = w * x: the input's gradient spreads g back through the same windows; the weight's is, for each position of the kernel,
the product of g with what that position read; the bias's is the sum of g.  A transposed convolution is the same with x and g in
each other's place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx import NodeProto

from relrep_onnx.gradient.elementwise import Gradients
from relrep_onnx.gradient.tape import Tape
from relrep_onnx.gradient.windows import Windows
from relrep_onnx.graph.index import integer


def conv(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Y = w * x + b."""
    x, w = node.input[:2]
    group = integer(node, "group", 1)
    windows = Windows.of(node, t.shape(x), t.shape(node.output[0]), t.shape(w)[2:])
    back = windows.back(t, g, w, t.shape(w), group, x)
    return [back, _products(t, windows, x, g, t.shape(x)[0], t.shape(w), group, x), *_bias(t, node, g)]


def conv_transpose(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Y = w transposed * x + b: backwards it is a convolution of g."""
    x, w = node.input[:2]
    group = integer(node, "group", 1)
    windows = Windows.behind_transposed(node, t.shape(x), t.shape(node.output[0]), t.shape(w)[2:])
    padded = t.pad(g, [0, 0, *windows.begins], [0, 0, *windows.ends], x)
    forth = t.op("Conv", padded, w, strides=list(windows.strides), dilations=list(windows.dilations), group=group)
    return [forth, _products(t, windows, g, x, t.shape(x)[0], t.shape(w), group, x), *_bias(t, node, g)]


def _bias(t: Tape, node: NodeProto, g: str) -> Gradients:
    if len(node.input) < 3 or not node.input[2]:
        return []
    return [t.sum(g, [0, *range(2, t.rank(node.output[0]))])]


def _products(t: Tape, windows: Windows, x: str, g: str, batch: int, shape: Sequence[int], group: int, like: str) -> str:
    """The weight's gradient [out, in / group, *kernel], from x [batch, in, *inputs] and g [batch, out, *outputs].

    One product per position of the kernel.  Where outputs have fewer positions than channels, all samples make one long product
    together; elsewhere each has its own, and they are summed (docs/decisions/0009).
    """
    rows, inner, *kernel = shape
    folded = 1
    if math.prod(windows.outputs) * group < rows:
        axes = [1, 0, *range(2, 2 + len(kernel))]
        x, g = t.transpose(x, axes), t.transpose(g, axes)
        batch, folded = 1, batch
    grads, reads = windows.flat(t, x, g, ((batch, group, inner), (batch, group, rows // group)), folded, like)
    sums = []
    for read in reads:
        product = t.op("MatMul", grads, t.transpose(read, [0, 1, 3, 2]))
        sums.append(t.reshape(t.sum(product, [0]), (rows, inner, 1)))
    return t.reshape(t.op("Concat", *sums, axis=2) if len(sums) > 1 else sums[0], shape)
