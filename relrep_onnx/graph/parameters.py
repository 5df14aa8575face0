"""Stored tensors that may move after pruning: the weights of layers and their biases, as inputs of a graph and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

from onnx import ModelProto, TensorProto, helper, numpy_helper

from relrep_onnx.graph.index import Graph, refill, tensor_like
from relrep_onnx.graph.layers import locate, node_of
from relrep_onnx.graph.operators import OPERATORS
from relrep_onnx.graph.rewrite import following_add
from relrep_onnx.types import Array, Layer


@dataclass(frozen=True)
class Parameter:
    """One stored tensor by name, and the layer that it belongs to (the first, where several share it)."""

    tensor: str
    layer: str
    is_weight: bool


def parameters(graph: Graph, layers: Iterable[Layer]) -> list[Parameter]:
    """The weight and, where there is one, the bias of each layer, in graph order."""
    found: dict[str, Parameter] = {}
    for layer in layers:
        form, constant = locate(graph, layer)
        names = [(constant.root, True)]
        for use in layer.uses:
            node = node_of(graph, layer, use.output)
            slot, bias = OPERATORS[node.op_type].bias_slot, ""
            if slot is not None and slot < len(node.input):
                bias = node.input[slot]
            elif slot is None and (add := following_add(graph, node.output[0], form)) is not None:
                bias = add[0].input[add[1]]
            stored = graph.constant(bias) if bias else None
            if stored is not None:
                names.append((stored.root, False))
        for name, is_weight in names:
            found.setdefault(name, Parameter(name, layer.name, is_weight))
    return list(found.values())


def as_inputs(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """A copy of a model that takes stored tensors as inputs."""
    graph = Graph(model)
    copy = deepcopy(model)
    wanted = {name: graph.tensors[name] for name in names}
    given = {value.name for value in copy.graph.input}
    refill(copy.graph.initializer, [tensor for tensor in copy.graph.initializer if tensor.name not in wanted])
    refill(copy.graph.node, [node for node in copy.graph.node if wanted.keys().isdisjoint(node.output)])  # their Constant nodes
    copy.graph.input.extend(
        helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        for name, tensor in wanted.items()
        if name not in given
    )
    return copy


def with_tensors(model: ModelProto, values: Mapping[str, Array]) -> ModelProto:
    """A copy of a model with other values in its stored tensors, in their own dtypes.

    Raises:
        ModelError: a value does not fit the dtype.
    """
    copy = deepcopy(model)
    graph = Graph(copy)
    for name, value in values.items():
        tensor: TensorProto = graph.tensors[name]
        if not (numpy_helper.to_array(tensor) == value).all():
            tensor.CopyFrom(tensor_like(value, tensor, name))
    return copy
