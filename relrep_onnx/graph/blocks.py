"""Where a network's blocks end: the places whose features a sparse network should share with its dense one.

a residual sum closes:         y = Add(a, b), both computed; or the activation that alone reads it
a spatial reduction closes:    what a strided convolution, a pool or a mean over all positions reads
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from onnx import NodeProto

from relrep_onnx.graph.index import Graph, is_standard

ACTIVATIONS: Final = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "Gelu", "Sigmoid", "Tanh", "Elu"})
REDUCERS: Final = frozenset({"Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax"})


def block_ends(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Tensors where a block ends, in graph order.

    Args:
        graph: the graph.
        shapes: of its tensors on some batch; a tensor without one is no end.
    """
    constants = graph.constant_names
    ends: dict[str, None] = {}
    for node in graph.model.graph.node:
        if not is_standard(node) or not node.input or not node.output:
            continue
        if node.op_type == "Add" and constants.isdisjoint(node.input):
            ends[_activated(graph, node.output[0])] = None
        elif node.op_type in REDUCERS and _reduces(node, shapes):
            ends[node.input[0]] = None
    order = {name: i for i, node in enumerate(graph.model.graph.node) for name in node.output}
    return sorted((name for name in ends if name in order and name in shapes), key=order.__getitem__)


def _activated(graph: Graph, name: str) -> str:
    """The output of the activation that alone reads a tensor, or the tensor."""
    node, slot = graph.only_reader(name) or (None, 0)
    return node.output[0] if node is not None and slot == 0 and node.op_type in ACTIVATIONS else name


def _reduces(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether fewer positions come out than went in; axes 2 and on are positions where there are four or five."""
    before, after = (shapes.get(name, ()) for name in (node.input[0], node.output[0]))
    if len(before) < 4 or len(after) < 2:
        return False
    return math.prod(after[2:]) < math.prod(before[2:])
