"""Gradients of what only moves, copies or relabels elements: the same moves back, sums where elements were copied."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import numpy as np
from onnx import NodeProto

from relrep_onnx.gradient.elementwise import Gradients
from relrep_onnx.gradient.tape import Tape
from relrep_onnx.graph.index import integer, ints


def relabel(t: Tape, node: NodeProto, g: str) -> Gradients:
    """The same elements in another shape (Reshape, Flatten, Squeeze, Unsqueeze)."""
    return [t.reshape(g, t.shape(node.input[0]))]


def same(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Identity; Dropout as it is at inference."""
    return [g]


def cast(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Another float type."""
    return [t.cast(g, node.input[0])]


def transpose(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Axes in another order: the inverse order."""
    rank = t.rank(node.input[0])
    perm = ints(node, "perm", tuple(reversed(range(rank))))
    return [t.transpose(g, [int(i) for i in np.argsort(perm)])]


def expand(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Broadcasting: the sum."""
    return [t.sum_to(g, t.shape(node.output[0]), node.input[0])]


def concat(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Each input gets its part."""
    axis = integer(node, "axis", 0)
    edges = [0, *accumulate(t.shape(name)[axis] for name in node.input)]
    return [t.slice(g, [start], [end], [axis], [1]) for start, end in pairwise(edges)]


def split(t: Tape, node: NodeProto, g: str) -> Gradients:
    """The parts joined; zeros for parts that nothing depends on."""
    parts = []
    for name in node.output:
        gradient = t.gradient(name)
        parts.append(gradient or t.expand(t.like(0, node.input[0]), t.shape(name)))
    return [t.op("Concat", *parts, axis=integer(node, "axis", 0))]


def cut(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Slice: the part back in its place, zeros around it and between strides."""
    shape = list(t.shape(node.input[0]))
    starts, ends = (t.ints(node, slot) or [] for slot in (1, 2))
    axes = t.ints(node, 3) or list(range(len(starts)))
    steps = t.ints(node, 4) or [1] * len(starts)
    now = list(t.shape(node.output[0]))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        at = axis % len(shape)
        places = range(shape[at])[start:end:step]  # the bounds mean what they mean in Python
        if step < 0:
            g = t.slice(g, [-1], [np.iinfo(np.int64).min], [at], [-1])
            places = places[::-1]
        stride = abs(step)
        if stride > 1:
            spread = [*now[: at + 1], 1, *now[at + 1 :]]
            after = [0] * len(spread)
            after[at + 1] = stride - 1
            g = t.pad(t.reshape(g, spread), [0] * len(spread), after, node.input[0])
            now[at] *= stride
            g = t.reshape(g, now)
        before, behind = [0] * len(shape), [0] * len(shape)
        before[at] = places.start if len(places) else 0
        behind[at] = shape[at] - now[at] - before[at]
        g = t.pad(g, before, behind, node.input[0])
        now[at] = shape[at]
    return [g]


def pad(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Zeros around it: the middle; what was cropped gets zeros."""
    shape = t.shape(node.input[0])
    pads = t.ints(node, 1) or []
    axes = [axis % len(shape) for axis in t.ints(node, 3) or range(len(shape))]
    before, behind = [0] * len(shape), [0] * len(shape)
    for i, axis in enumerate(axes):
        before[axis], behind[axis] = -pads[i], -pads[i + len(axes)]
    return [t.pad(g, before, behind, node.input[0])]


def gather(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Rows by index: each row gets the sum of its copies."""
    x, index = node.input
    shape = t.shape(x)
    axis = integer(node, "axis", 0) % len(shape)
    before, length, after = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    count = math.prod(t.shape(index))
    updates = t.transpose(t.reshape(g, (before, count, after)), (1, 0, 2))
    flat = t.reshape(t.op("Cast", index, to=7), (count, 1))
    places = t.where(t.op("Less", flat, t.const(0, np.int64)), t.add(flat, t.const(length, np.int64)), flat)
    zeros = t.expand(t.like(0, x), (length, before, after))
    summed = t.op("ScatterND", zeros, places, updates, reduction="add")
    return [t.reshape(t.transpose(summed, (1, 0, 2)), shape), None]
