"""Folding: BatchNormalization behind a convolution becomes part of its weight and bias.

    a = scale / sqrt(variance + epsilon);   W' = a W (per output channel);   b' = a (b - mean) + shift

Zeros stay zeros.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from relrep_onnx.graph.index import Graph, attribute, is_standard, number
from relrep_onnx.types import Array


def fold_batchnorm(model: ModelProto) -> None:
    """Folds every BatchNormalization that is the only reader of a convolution with constant weights, in place."""
    graph = Graph(model)
    folded: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "BatchNormalization" or not is_standard(node) or attribute(node, "training_mode", 0):
            continue
        conv = graph.producers.get(node.input[0])
        if conv is None or conv.op_type != "Conv" or not is_standard(conv) or len(list(filter(None, node.output))) != 1:
            continue
        if node.input[0] in graph.outputs or len(graph.consumers[node.input[0]]) != 1:
            continue
        weight, bias = graph.value(conv.input[1]), graph.value(conv.input[2]) if len(conv.input) > 2 else None
        values = [graph.value(name) for name in node.input[1:5]]
        scale, shift, mean, variance = values
        if weight is None or weight.dtype != np.float32 or (bias is None and len(conv.input) > 2):
            continue
        if scale is None or shift is None or mean is None or variance is None:
            continue
        factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + number(node, "epsilon", 1e-5))
        before = np.zeros(weight.shape[0]) if bias is None else bias.astype(np.float64)
        _store(graph, conv, 1, weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), f"{conv.input[1]}.folded")
        _store(graph, conv, 2, factor * (before - mean) + shift, f"{conv.input[1]}.folded_bias")
        conv.output[0] = node.output[0]
        folded.append(node)
    for node in folded:
        model.graph.node.remove(node)


def _store(graph: Graph, conv: NodeProto, slot: int, value: Array, name: str) -> None:
    tensor = numpy_helper.from_array(np.ascontiguousarray(value, np.float32), graph.fresh(name))
    graph.model.graph.initializer.append(tensor)
    graph.tensors[tensor.name] = tensor
    if slot == len(conv.input):
        conv.input.append(tensor.name)
    else:
        conv.input[slot] = tensor.name
