"""Gradients of matrix products: for y = a b they are g b^T and a^T g."""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto

from relrep_onnx.gradient.elementwise import Gradients
from relrep_onnx.gradient.tape import Tape
from relrep_onnx.graph.index import attribute, number


def _swap(t: Tape, name: str, rank: int) -> str:
    """The last two axes swapped; ONNX Runtime fuses it into the product."""
    return t.transpose(name, [*range(rank - 2), rank - 1, rank - 2])


def matmul(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Batched products; an operand that was broadcast gets the sum, a vector counts as a matrix with one row or column."""
    a, b = node.input
    left, right = t.shape(a), t.shape(b)
    if len(right) == 2 and len(left) > 2:
        return [t.op("MatMul", g, _swap(t, b, 2)), _flat(t, a, g, left, right)]
    rows = left if len(left) > 1 else (1, *left)
    cols = right if len(right) > 1 else (*right, 1)
    batch = np.broadcast_shapes(rows[:-2], cols[:-2])
    shape = (*batch, rows[-2], cols[-1])
    g = g if t.shape(node.output[0]) == shape else t.reshape(g, shape)
    a_seen, b_seen = (x if t.shape(x) == s else t.reshape(x, s) for x, s in ((a, rows), (b, cols)))
    for_a = t.op("MatMul", g, _swap(t, b_seen, len(cols)))
    for_b = t.op("MatMul", _swap(t, a_seen, len(rows)), g)
    return [t.sum_to(for_a, (*batch, *rows[-2:]), a, rows), t.sum_to(for_b, (*batch, *cols[-2:]), b, cols)]


def _flat(t: Tape, a: str, g: str, left: tuple[int, ...], right: tuple[int, ...]) -> str:
    """a^T g for one matrix b: all batches as rows of one product."""
    count = math.prod(left[:-1])
    rows, grads = t.reshape(a, (count, left[-1])), t.reshape(g, (count, right[-1]))
    return t.op("MatMul", _swap(t, rows, 2), grads)


def gemm(t: Tape, node: NodeProto, g: str) -> Gradients:
    """Alpha op(a) op(b) + beta c."""
    a, b = node.input[:2]
    turned_a, turned_b = (bool(attribute(node, name, 0)) for name in ("transA", "transB"))
    alpha, beta = number(node, "alpha", 1.0), number(node, "beta", 1.0)
    scaled = {"alpha": alpha}
    if turned_a:
        for_a = t.op("Gemm", b, g, transA=int(turned_b), transB=1, **scaled)
    else:
        for_a = t.op("Gemm", g, b, transB=int(not turned_b), **scaled)
    if turned_b:
        for_b = t.op("Gemm", g, a, transA=1, transB=int(turned_a), **scaled)
    else:
        for_b = t.op("Gemm", a, g, transA=int(not turned_a), **scaled)
    if len(node.input) < 3 or not node.input[2]:
        return [for_a, for_b]
    for_c = g if beta == 1 else t.mul(g, t.like(beta, a))
    return [for_a, for_b, t.sum_to(for_c, t.shape(node.output[0]), node.input[2])]
