"""Gradients of pooling and reducing: what was summed gets g, what was averaged a share of it, what was chosen gets it whole."""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto

from relrep_onnx.gradient.elementwise import Gradients
from relrep_onnx.gradient.tape import Tape
from relrep_onnx.gradient.windows import Windows
from relrep_onnx.graph.index import attribute, number


def _axes(t: Tape, node: NodeProto) -> list[int]:
    rank = t.rank(node.input[0])
    axes = t.ints(node, 1)
    if not axes:
        return [] if attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(axis % rank for axis in axes)


def _kept(t: Tape, node: NodeProto, axes: list[int]) -> list[int]:
    """The output's shape with the reduced axes still there."""
    return [1 if i in axes else n for i, n in enumerate(t.shape(node.input[0]))]


def reduce_sum(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Sum a: g everywhere."""
    shape = t.shape(node.input[0])
    return [t.expand(t.reshape(g, _kept(t, node, _axes(t, node))), shape)]


def reduce_mean(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Mean a: g / n everywhere."""
    axes, shape = _axes(t, node), t.shape(node.input[0])
    share = t.mul(g, t.like(1 / math.prod(shape[i] for i in axes), node.input[0]))
    return [t.expand(t.reshape(share, _kept(t, node, axes)), shape)]


def reduce_extreme(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Max or min of a: g to the elements that are y; ties share it."""
    return [_chosen(t, node, g, _axes(t, node))]


def _chosen(t: Tape, node: NodeProto, g: str, axes: list[int]) -> str:
    x, kept = node.input[0], _kept(t, node, axes)
    hit = t.op("Equal", x, t.reshape(node.output[0], kept))
    ones = t.where(hit, t.like(1, x), t.like(0, x))
    return t.mul(ones, t.div(t.reshape(g, kept), t.sum(ones, axes, keepdims=True)))


def global_average(t: Tape, node: NodeProto, g: str) -> Gradients:
    """The mean over all positions."""
    shape = t.shape(node.input[0])
    return [t.expand(t.mul(g, t.like(1 / math.prod(shape[2:]), node.input[0])), shape)]


def global_max(t: Tape, node: NodeProto, g: str) -> Gradients:
    """The maximum over all positions."""
    return [_chosen(t, node, g, list(range(2, t.rank(node.input[0]))))]


def average_pool(t: Tape, node: NodeProto, g: str) -> Gradients:
    """The mean of each window: g / n spread over the window again, each channel by itself."""
    x, y = node.input[0], node.output[0]
    windows = Windows.of(node, t.shape(x), t.shape(y))
    padded = bool(attribute(node, "count_include_pad", 0))
    share = t.div(g, t.like(windows.counts(include_pads=padded), x))
    batch, channels, *sides = t.shape(y)
    single = t.reshape(share, (batch * channels, 1, *sides))
    kernel = np.ones((1, 1, *windows.kernel))
    return [t.reshape(windows.back(t, single, t.like(kernel, x), kernel.shape, 1, x), t.shape(x))]


def max_pool(t: Tape, node: NodeProto, g: str) -> Gradients:
    """The maximum of each window: g at its place; overlapping windows add up."""
    x = node.input[0]
    size = math.prod(t.shape(x))
    places = t.reshape(_indices(t, node), (-1,))
    flat = t.op("ScatterElements", t.expand(t.like(0, x), (size,)), places, t.reshape(g, (-1,)), reduction="add")
    return [t.reshape(flat, t.shape(x))]


def _indices(t: Tape, node: NodeProto) -> str:
    """Where each maximum was, counted over the whole tensor in row-major order."""
    if len(node.output) > 1 and node.output[1] and not number(node, "storage_order", 0):
        return node.output[1]
    kept = {a.name: attribute(node, a.name) for a in node.attribute if a.name != "storage_order"}
    return t.ops("MaxPool", node.input[0], outputs=2, **kept)[1]
