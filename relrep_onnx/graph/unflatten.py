"""The way back from a flat model: what happened to layers outside happens to those inside the branches of `If`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from relrep_onnx.graph.flatten import Flat, Path
from relrep_onnx.graph.index import Graph, defined, reads, refill


def unflatten(flat: Flat, sparse: ModelProto) -> ModelProto:
    """The original model with all that happened to the layers of the flat one.

    Args:
        flat: what `flatten` gave.
        sparse: a copy of its model with layers rewritten.
    """
    if flat.model is flat.original:
        return sparse
    before, after = Graph(flat.model), Graph(sparse)
    layers = {output: _rewritten(after, output, before.producers[output].op_type) for output in flat.gates}
    gone = set(defined(flat.model.graph)) - set(defined(flat.original.graph))
    for nodes in layers.values():
        gone |= {name for node in nodes for name in node.output}
        gone |= {name for node in nodes for name in node.input if name in after.tensors and name not in before.tensors}
    branching = {home.path[0][0] for home in flat.homes.values()}
    old = {name: node for node in flat.original.graph.node for name in branching.intersection(node.output)}
    model = deepcopy(sparse)
    kept = [node for node in model.graph.node if gone.isdisjoint(node.output)]
    refill(model.graph.node, [next((old[name] for name in node.output if name in old), node) for node in kept])
    refill(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name not in gone])
    for name, home in flat.homes.items():
        if name in after.tensors and after.tensors[name] != before.tensors.get(name):
            stored = _stored(_body(model.graph, home.path), home.name)
            own = stored.name
            stored.CopyFrom(after.tensors[name])
            stored.name = own
    for output, nodes in layers.items():
        home = flat.homes[output]
        _put_back(_body(model.graph, home.path), home.name, before.producers[output], nodes, after)
    return model


def _rewritten(graph: Graph, output: str, op_type: str) -> list[NodeProto]:
    """A layer's node, and the Add that `write_layer` may have put behind it."""
    last = graph.producers[output]
    return [last] if last.op_type == op_type else [graph.producers[last.input[0]], last]


def _put_back(body: GraphProto, output: str, before: NodeProto, rewritten: Sequence[NodeProto], after: Graph) -> None:
    """Changes the node that makes `output` in a branch as a layer's node was changed outside."""
    position, node = next((n, node) for n, node in enumerate(body.node) if output in node.output)
    layer, *adds = rewritten
    read = list(node.input)
    node.input.extend([""] * (len(layer.input) - len(read)))
    fresh = [(slot, name) for slot, name in enumerate(layer.input) if name not in before.input]
    for slot, name in fresh:
        node.input[slot] = name
    refill(node.attribute, layer.attribute)
    biases = [name for _, name in fresh]
    nodes = list(body.node)
    for add in adds:
        node.output[0] = layer.output[0]
        biases.append(add.input[1])
        nodes.insert(position + 1, helper.make_node("Add", list(add.input), [output], name=add.name))
    nodes[position:position] = [helper.make_node("Constant", [], [name], value=after.tensors[name]) for name in biases]
    wanted = {name for inner in nodes for name in reads(inner)} | {value.name for value in body.output}
    unread = set(read) - wanted
    refill(body.initializer, [tensor for tensor in body.initializer if tensor.name not in unread])
    refill(body.node, [inner for inner in nodes if inner.op_type != "Constant" or unread.isdisjoint(inner.output)])


def _body(graph: GraphProto, path: Path) -> GraphProto:
    """The branch at the end of a path."""
    for first, name in path:
        node = next(node for node in graph.node if first in node.output)
        graph = next(item.g for item in node.attribute if item.name == name)
    return graph


def _stored(body: GraphProto, name: str) -> TensorProto:
    """A tensor that a branch stores."""
    for tensor in body.initializer:
        if tensor.name == name:
            return tensor
    node = next(node for node in body.node if name in node.output)
    return next(item.t for item in node.attribute if item.name == "value")
