"""Gradients of activations, from their output where that is cheaper than from their input."""

from __future__ import annotations

import math

from onnx import NodeProto

from relrep_onnx.gradient.elementwise import Gradients
from relrep_onnx.gradient.tape import Tape
from relrep_onnx.graph.index import attribute, integer, number


def relu(t: Tape, node: NodeProto, g: str) -> Gradients:
    """max(a, 0): g where y > 0; ONNX Runtime is ten times slower at Where, and at Sign."""
    y = node.output[0]
    return [t.mul(g, t.cast(t.op("Greater", y, t.like(0, y)), y))]


def leaky_relu(t: Tape, node: NodeProto, g: str) -> Gradients:
    """A or alpha a: g or alpha g."""
    a, alpha = node.input[0], number(node, "alpha", 0.01)
    return [t.where(t.op("Less", a, t.like(0, a)), t.mul(g, t.like(alpha, a)), g)]


def clip(t: Tape, node: NodeProto, g: str) -> Gradients:
    """min(max(a, low), high): g where y is a."""
    a = node.input[0]
    return [t.where(t.op("Equal", a, node.output[0]), g, t.like(0, a))]


def sigmoid(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Sigmoid a: g y (1 - y)."""
    y = node.output[0]
    return [t.mul(g, t.sub(y, t.mul(y, y)))]


def tanh(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Tanh a: g (1 - y^2)."""
    y = node.output[0]
    return [t.mul(g, t.sub(t.like(1, y), t.mul(y, y)))]


def _between(t: Tape, value: str, like: str) -> str:
    """Whether 0 < value < 1."""
    return t.op("And", t.op("Greater", value, t.like(0, like)), t.op("Less", value, t.like(1, like)))


def hard_sigmoid(t: Tape, node: NodeProto, g: str) -> Gradients:
    """clip(alpha a + beta, 0, 1): alpha g inside."""
    y = node.output[0]
    return [t.where(_between(t, y, y), t.mul(g, t.like(number(node, "alpha", 0.2), y)), t.like(0, y))]


def hard_swish(t: Tape, node: NodeProto, g: str) -> Gradients:
    """A h, h = clip(a / 6 + 1 / 2, 0, 1): g (h + a h')."""
    a = node.input[0]
    h = t.op("HardSigmoid", a, alpha=1 / 6, beta=0.5)
    slope = t.where(_between(t, h, a), t.mul(a, t.like(1 / 6, a)), t.like(0, a))
    return [t.mul(g, t.add(h, slope))]


def gelu(t: Tape, node: NodeProto, g: str) -> Gradients:
    """A F(a), F the normal distribution or its tanh approximation: g (F + a F')."""
    a = node.input[0]
    half, one = t.like(0.5, a), t.like(1, a)
    square = t.mul(a, a)
    if attribute(node, "approximate", b"none") == b"tanh":
        rate, cubic = math.sqrt(2 / math.pi), 0.044715
        inner = t.mul(t.mul(a, t.like(rate, a)), t.add(one, t.mul(square, t.like(cubic, a))))
        bend = t.op("Tanh", inner)
        inner_slope = t.mul(t.like(rate, a), t.add(one, t.mul(square, t.like(3 * cubic, a))))
        slope = t.mul(half, t.mul(t.sub(one, t.mul(bend, bend)), inner_slope))
    else:
        bend = t.op("Erf", t.mul(a, t.like(math.sqrt(0.5), a)))
        slope = t.mul(t.like(1 / math.sqrt(2 * math.pi), a), t.op("Exp", t.neg(t.mul(half, square))))
    return [t.mul(g, t.add(t.mul(half, t.add(one, bend)), t.mul(a, slope)))]


def _axis(node: NodeProto) -> list[int]:
    return [integer(node, "axis", -1)]


def softmax(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Softmax a: y (g - sum g y)."""
    y = node.output[0]
    return [t.mul(y, t.sub(g, t.sum(t.mul(g, y), _axis(node), keepdims=True)))]


def log_softmax(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Log softmax a: g - e^y sum g."""
    return [t.sub(g, t.mul(t.op("Exp", node.output[0]), t.sum(g, _axis(node), keepdims=True)))]
