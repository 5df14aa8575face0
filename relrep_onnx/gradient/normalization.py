"""Gradients of normalizations; BatchNormalization as it is at inference: its mean and variance are constants."""

from __future__ import annotations

import math

from onnx import NodeProto

from relrep_onnx.gradient.elementwise import Gradients
from relrep_onnx.gradient.tape import Tape
from relrep_onnx.graph.index import integer, number


def batch_normalization(t: Tape, node: NodeProto, g: str) -> Gradients:
    """S (x - m) / d + b, d = sqrt(v + eps): g s / d, sum g (x - m) / d, sum g."""
    x, scale, _, mean, variance = node.input
    rank = t.rank(x)
    column = (t.shape(x)[1], *(1,) * (rank - 2))
    others = [0, *range(2, rank)]
    inverse = t.op("Reciprocal", t.op("Sqrt", t.add(variance, t.like(number(node, "epsilon", 1e-5), variance))))
    slope = t.reshape(t.mul(scale, inverse), column)
    unit = t.mul(t.sub(x, t.reshape(mean, column)), t.reshape(inverse, column))
    return [t.mul(g, slope), t.sum(t.mul(g, unit), others), t.sum(g, others), None, None]


def layer_normalization(t: Tape, node: NodeProto, g: str) -> Gradients:
    """S u + b, u = (x - mean) / d over the last axes: (h - mean h - u mean(h u)) / d with h = g s; sum g u; sum g."""
    x, scale = node.input[:2]
    rank = t.rank(x)
    axes = list(range(integer(node, "axis", -1) % rank, rank))
    shape = t.shape(x)
    count = t.like(1 / math.prod(shape[i] for i in axes), x)

    def mean(value: str) -> str:
        return t.mul(t.sum(value, axes, keepdims=True), count)

    centred = t.sub(x, mean(x))
    spread = t.op("Sqrt", t.add(mean(t.mul(centred, centred)), t.like(number(node, "epsilon", 1e-5), x)))
    unit = t.div(centred, spread)
    h = t.mul(g, scale)
    for_x = t.div(t.sub(t.sub(h, mean(h)), t.mul(unit, mean(t.mul(h, unit)))), spread)
    gradients: Gradients = [for_x, t.sum_to(t.mul(g, unit), shape, scale)]
    if len(node.input) > 2 and node.input[2]:
        gradients.append(t.sum_to(g, shape, node.input[2]))
    return gradients
