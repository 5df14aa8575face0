"""Cutting a graph into stages, so that networks advance together and every node runs once.

A tensor's level is the number of pruned layers on the longest path to it.  Stage k holds the nodes whose inputs are of level k at
most, and the layers whose activations are then ready; a layer's own node runs in stage k + 1, after its weight was repaired.
Only the tensors that later stages read are kept between stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import EncodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, helper

from relrep_onnx.graph.index import Graph, leading_to, reads
from relrep_onnx.graph.tensors import whole
from relrep_onnx.types import Layer, ModelError

BETWEEN: Final = "what the model computes between two pruned layers"
SPLIT: Final = "split the largest tensor that is stored there"
"""How messages call a stage, and what to do where it is over 2 GB."""


@dataclass(frozen=True)
class Stage:
    """Nodes in graph order, the live tensors they read, those they add, and those alive afterwards."""

    nodes: tuple[NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    alive: frozenset[str]
    layers: tuple[Layer, ...]


def levels(graph: Graph, layers: Sequence[Layer]) -> tuple[dict[str, int], Layer | None]:
    """Level of every computed tensor; or, second, a shared layer whose users depend on each other (levels then mean nothing)."""
    uses = {use.output: layer for layer in layers for use in layer.uses}
    own: dict[str, int] = {layer.name: 0 for layer in layers}
    shared = [layer for layer in layers if len(layer.uses) > 1]
    for _ in range(len(shared) + 2):
        level: dict[str, int] = {}
        for node in graph.model.graph.node:
            here = max((level.get(name, 0) for name in reads(node)), default=0)
            layer = uses.get(node.output[0]) if node.output else None
            if layer is not None:
                here = max(here, own[layer.name]) + 1
            level.update(dict.fromkeys(filter(None, node.output), here))
        moved = []
        for layer in layers:
            ready = max(level.get(use.activation, 0) for use in layer.uses)
            if ready > own[layer.name]:
                own[layer.name] = ready
                if len(layer.uses) > 1:
                    moved.append(layer)
        if not moved:
            return level, None
    # Shared layers behind the culprit keep moving too; they would be fine without it.
    return level, next((layer for layer in moved if _feeds_itself(graph, layers, layer)), moved[0])


def _feeds_itself(graph: Graph, layers: Sequence[Layer], layer: Layer) -> bool:
    """True where one use of a layer depends on another: directly, or because other shared layers wait for all their uses."""
    reached = {use.output for use in layer.uses}
    before = 0
    while before != len(reached):
        before = len(reached)
        for node in graph.model.graph.node:
            if any(name in reached for name in reads(node)):
                reached |= set(filter(None, node.output))
        for other in layers:
            if any(use.activation in reached for use in other.uses):
                reached |= {use.output for use in other.uses}
    return any(use.activation in reached for use in layer.uses)


def plan_stages(graph: Graph, layers: Sequence[Layer]) -> list[Stage]:
    """Stages in order, up to the last layer's activation; nodes after it need not run.

    Layers must be those of `find_layers`: with some of them left out, a shortcut could come too late.
    """
    level, dependent = levels(graph, layers)
    if dependent is not None:
        raise ModelError(f"the users of the shared weight {dependent.weight!r} depend on each other")
    ready = {layer.name: max(level.get(use.activation, 0) for use in layer.uses) for layer in layers}
    last = max(ready.values(), default=-1)
    members: list[list[NodeProto]] = [[] for _ in range(last + 1)]
    needs = {la.name: {*(use.activation for use in la.uses), *filter(None, [la.shortcut])} for la in layers}
    for node in leading_to(graph.model.graph.node, set().union(*needs.values()), graph.constant_names):
        members[max(level[name] for name in node.output if name)].append(node)
    last_reader: dict[str, int] = {}
    for k, nodes in enumerate(members):
        for node in nodes:
            last_reader.update(dict.fromkeys(reads(node), k))
    activations: list[set[str]] = [set() for _ in members]
    for layer in layers:
        activations[ready[layer.name]].update(needs[layer.name])
    stages = []
    born: dict[str, int] = {value.name: -1 for value in graph.inputs}
    for k, nodes in enumerate(members):
        made = [name for node in nodes for name in node.output if name]
        wanted = {name for node in nodes for name in reads(node)} & set(born)
        born.update(dict.fromkeys(made, k))
        later = set().union(*activations[k:])
        alive = frozenset(name for name in born if last_reader.get(name, -1) > k or name in later)
        stages.append(
            Stage(
                nodes=tuple(nodes),
                inputs=tuple(sorted(wanted)),
                outputs=tuple(name for name in made if name in alive),
                alive=alive,
                layers=tuple(layer for layer in layers if ready[layer.name] == k),
            )
        )
    return stages


def stage_model(graph: Graph, stage: Stage, types: Mapping[str, str]) -> ModelProto:
    """The stage as a model of its own; `types` gives each live input's type as ONNX Runtime spells it.

    Raises:
        ModelError: one of its stored tensors is over 2 GB.
    """
    nodes = _with_constants(graph, stage.nodes)
    needed = {name for node in nodes for name in reads(node)}
    inner = GraphProto(name="stage")
    inner.node.extend(nodes)
    try:
        inner.initializer.extend(whole(tensor) for tensor in graph.model.graph.initializer if tensor.name in needed)
    except EncodeError as error:
        raise ModelError(f"{BETWEEN} is over 2 GB: {SPLIT}") from error
    inner.input.extend(ValueInfoProto(name=name, type=_type_proto(types[name])) for name in stage.inputs)
    inner.output.extend(ValueInfoProto(name=name) for name in stage.outputs)
    return helper.make_model(
        inner,
        opset_imports=graph.model.opset_import,
        functions=graph.model.functions,
        # Below 4 every initializer must also be an input; the stage needs no such thing.
        ir_version=max(4, graph.model.ir_version),
    )


def _with_constants(graph: Graph, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Adds the constant nodes that the given ones read, directly or not, in graph order."""
    wanted = {name for node in nodes for name in reads(node)}
    chosen = {max(node.output) for node in nodes}  # output names are unique; the largest one is never empty
    result = []
    for node in reversed(graph.model.graph.node):
        constant = any(name in wanted for name in node.output) and all(
            name in graph.constant_names for name in node.output if name
        )
        if max(node.output, default="") in chosen or constant:
            result.append(node)
            wanted |= set(reads(node))
    return result[::-1]


def _type_proto(text: str) -> TypeProto:
    """Parses ONNX Runtime's spelling of a type, such as `tensor(float)` or `seq(tensor(int64))`."""
    kind, _, inner = text.partition("(")
    inner = inner.removesuffix(")")
    proto = TypeProto()
    if kind == "tensor" and inner in _ELEMENTS:
        proto.tensor_type.elem_type = _ELEMENTS[inner]
    elif kind == "seq":
        proto.sequence_type.elem_type.CopyFrom(_type_proto(inner))
    elif kind == "optional":
        proto.optional_type.elem_type.CopyFrom(_type_proto(inner))
    else:
        raise ModelError(f"a value of type {text!r} crosses from one layer to the next; such graphs are not supported")
    return proto


_ELEMENTS = {name.lower(): number for name, number in TensorProto.DataType.items()}
