"""Gradients of arithmetic: y = f(a) and y = f(a, b) with broadcasting; every gradient is summed back to its operand's shape."""

from __future__ import annotations

import math

from onnx import NodeProto

from relrep_onnx.gradient.tape import Tape

Gradients = list[str | None]


def _pair(t: Tape, node: NodeProto, for_a: str, for_b: str) -> Gradients:
    shape = t.shape(node.output[0])
    return [t.sum_to(for_a, shape, node.input[0]), t.sum_to(for_b, shape, node.input[1])]


def add(t: Tape, node: NodeProto, g: str) -> Gradients:
    """A + b: g, g."""
    return _pair(t, node, g, g)


def sub(t: Tape, node: NodeProto, g: str) -> Gradients:
    """A - b: g, -g."""
    return _pair(t, node, g, t.neg(g))


def mul(t: Tape, node: NodeProto, g: str) -> Gradients:
    """A b: g b, g a."""
    a, b = node.input
    return _pair(t, node, t.mul(g, b), t.mul(g, a))


def div(t: Tape, node: NodeProto, g: str) -> Gradients:
    """A / b: g / b, -g y / b."""
    _, b = node.input
    share = t.div(g, b)
    return _pair(t, node, share, t.neg(t.mul(share, node.output[0])))


def power(t: Tape, node: NodeProto, g: str) -> Gradients:
    """a^b: g b a^(b - 1), g y log a."""
    a, b = node.input
    exponent = b if t.dtype(b) == t.dtype(a) else t.cast(b, a)
    slope = t.mul(exponent, t.op("Pow", a, t.sub(exponent, t.like(1, a))))
    return _pair(t, node, t.mul(g, slope), t.mul(g, t.mul(node.output[0], t.op("Log", a))))


def total(t: Tape, node: NodeProto, g: str) -> Gradients:
    """A + b + ...: g each."""
    return [t.sum_to(g, t.shape(node.output[0]), name) for name in node.input]


def extreme(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Max or min of a, b, ...: g to the operand that is y; ties share it."""
    y, zero, one = node.output[0], t.like(0, node.output[0]), t.like(1, node.output[0])
    chosen = [t.where(t.op("Equal", name, y), one, zero) for name in node.input]
    share = t.div(g, t.op("Sum", *chosen))
    return [t.sum_to(t.mul(share, c), t.shape(y), name) for c, name in zip(chosen, node.input, strict=True)]


def where(t: Tape, node: NodeProto, g: str) -> Gradients:
    """C ? a : b: g where c, g where not c."""
    c, a, b = node.input
    shape, zero = t.shape(node.output[0]), t.like(0, a)
    return [None, t.sum_to(t.where(c, g, zero), shape, a), t.sum_to(t.where(c, zero, g), shape, b)]


def negative(t: Tape, node: NodeProto, g: str) -> Gradients:
    """-a: -g."""
    return [t.neg(g)]


def absolute(t: Tape, node: NodeProto, g: str) -> Gradients:
    """|a|: g sign a."""
    return [t.mul(g, t.op("Sign", node.input[0]))]


def reciprocal(t: Tape, node: NodeProto, g: str) -> Gradients:
    """1 / a: -g y^2."""
    y = node.output[0]
    return [t.neg(t.mul(g, t.mul(y, y)))]


def sqrt(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Sqrt a: g / 2 y."""
    y = node.output[0]
    return [t.div(g, t.add(y, y))]


def exp(t: Tape, node: NodeProto, g: str) -> Gradients:
    """e^a: g y."""
    return [t.mul(g, node.output[0])]


def log(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Log a: g / a."""
    return [t.div(g, node.input[0])]


def sin(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Sin a: g cos a."""
    return [t.mul(g, t.op("Cos", node.input[0]))]


def cos(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Cos a: -g sin a."""
    return [t.neg(t.mul(g, t.op("Sin", node.input[0])))]


def erf(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Erf a: g 2 / sqrt(pi) exp(-a^2)."""
    a = node.input[0]
    return [t.mul(g, t.mul(t.like(2 / math.sqrt(math.pi), a), t.op("Exp", t.neg(t.mul(a, a)))))]
