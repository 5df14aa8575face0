"""Which nodes are quantized: layers with stored weights, and what their bytes reach.

A byte with one scale holds a layer's output well, and what is copied from it, pooled, summed with its like, bent by a function of
one number, or scaled by a gate between bounds.  Other arithmetic does not fit: in a sum with an attention mask of -10000 the
scores share a few levels, squares and variances have twice the digits, a bias of its own would lose its 32 bits.  So bytes
spread from the layers, node by node, as far as every activation that a node reads is one of theirs; the rest stays in float.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Set
from typing import Final

import numpy as np
from onnx import NodeProto, TensorProto

from relrep_onnx.export.sparse_layers import clip_bounds
from relrep_onnx.graph import Graph
from relrep_onnx.graph.filters import is_bank
from relrep_onnx.graph.index import captured, is_standard, subgraphs

WEIGHT_SLOTS: Final[Mapping[str, tuple[int, ...]]] = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (1,),
    "MatMul": (0, 1),
    "Gather": (0,),
}
"""Operators with stored weights, and which inputs those may be."""
FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16)
SAME: Final = frozenset(("Flatten", "MaxPool", "Pad", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"))
"""Copies of the first input's numbers."""
CURVES: Final = frozenset(("AveragePool", "Clip", "GlobalAveragePool", "LeakyRelu", "Relu", "Sigmoid"))
"""Functions and means of the first input's numbers, in bytes in ONNX Runtime."""
GATES: Final = frozenset(("Clip", "HardSigmoid", "Sigmoid"))
"""What gives a product's factor bounds."""
PASSED: Final = frozenset(("HardSigmoid", "Identity"))
"""Not quantized themselves, but what comes of bytes is as good for those behind."""


def wrong_nodes(graph: Graph) -> list[str]:
    """Names of layers that int8 would spoil: that the quantizer gets wrong, or ONNX Runtime (1.20 at least) then cannot run.

    These are ConvTranspose with groups, Gemm with a scaled bias or one that is not a number for each output, and MatMul with a
    stack of matrices; and Fourier and constant-Q transforms, whose loudest tone would leave few levels to the others.

    A node without a name gets one, in place, for the quantizer leaves nodes out by name.
    """
    names = []
    for place, node in enumerate(graph.model.graph.node):
        numbers = {item.name: item.f if item.name == "beta" else item.i for item in node.attribute}
        if node.op_type == "Conv":
            wrong = _is_transform(graph, node)
        elif node.op_type == "ConvTranspose":
            wrong = numbers.get("group", 1) > 1
        elif node.op_type == "Gemm" and len(node.input) > 2:
            weight, bias = graph.value(node.input[1]), graph.value(node.input[2])
            wrong = numbers.get("beta", 1) != 1 or bias is None or bias.ndim != 1
            wrong |= weight is not None and bias is not None and bias.size != weight.shape[0 if numbers.get("transB") else -1]
        elif node.op_type == "MatMul":
            wrong = any((value := graph.value(name)) is not None and value.ndim > 2 for name in node.input)
        else:
            continue
        if wrong:
            names.append(_named(node, place))
    return names


def unreached_nodes(graph: Graph, wrong: Collection[str]) -> list[str]:
    """Names, given in place where there are none, of nodes that no layer's bytes reach; `wrong` layers are among them."""
    captives = {name for node in graph.model.graph.node for inner in subgraphs(node) for name in captured(inner)}
    reached: set[str] = set()
    left = []
    for place, node in enumerate(graph.model.graph.node):
        if _named(node, place) not in wrong and _takes_bytes(graph, node, reached, captives):
            reached.update(node.output)
        else:
            left.append(node.name)
            if node.op_type in PASSED and reached.issuperset(node.input[:1]):
                reached.update(node.output)
    return left


def _is_transform(graph: Graph, node: NodeProto) -> bool:
    """Whether a convolution is a bank of windowed tones."""
    weight = graph.value(node.input[1])
    if weight is None:
        return False
    cols = math.prod(weight.shape[1:])
    return is_bank(weight.shape[2:], cols, lambda: weight.reshape(-1, cols).astype(np.float64))


def _takes_bytes(graph: Graph, node: NodeProto, reached: Collection[str], captives: Set[str]) -> bool:
    op = node.op_type if is_standard(node) else ""
    if op in WEIGHT_SLOTS:
        stored = [graph.tensors[name] for slot in WEIGHT_SLOTS[op] if (name := node.input[slot]) in graph.tensors]
        return any(tensor.data_type in FLOATS for tensor in stored)
    if op in ("Clip", "Relu") and not _may_go(graph, node, captives):
        return False
    if op in SAME | CURVES:
        return node.input[0] in reached
    if op == "Concat":
        return all(name in reached or name in graph.constant_names for name in node.input)
    if op == "Mul":
        gated = any(graph.producers[name].op_type in GATES for name in node.input if name in reached)
        return gated and all(name in reached for name in node.input)
    return op == "Add" and all(name in reached for name in node.input)


def _may_go(graph: Graph, node: NodeProto, captives: Set[str]) -> bool:
    """Whether the quantizer may take a Relu or Clip out, and clip what it reads instead, by the range of what it gives.

    Bytes always reach to 0.  Who else reads the one would get the other: the bodies of If and Loop, and who asks for an output.
    """
    if node.input[0] in graph.outputs or not captives.isdisjoint((node.input[0], node.output[0])):
        return False
    bounds = clip_bounds(graph, node) if node.op_type == "Clip" else (0.0, math.inf)
    return bounds is not None and bounds[0] <= 0 <= bounds[1] and bounds[0] < bounds[1]


def _named(node: NodeProto, place: int) -> str:
    node.name = node.name or f"relrep_floating_{place}"
    return node.name
