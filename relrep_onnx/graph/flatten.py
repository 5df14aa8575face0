"""Layers out of the branches of `If`: a model that means the same, in which calibration can reach them, and the way back.

    If(c) {then: a = f(x), b = W a, y = g(b)} {else: y = h(x)}

      =  a = If(c) {then: f(x)} {else: no rows};  b = W a;  y = If(c) {then: g(b)} {else: h(x)}

A product of no rows has no rows, so a layer outside sees the samples of its own branch only.  What a branch computes on the way
to several layers is computed for each of them: nothing else has to cross from one `If` to the next, where its type would have to
be known.  Branches inside branches come out in the same way, from the inside.  Bodies of `Loop` and `Scan` stay, for a layer
there feeds itself from one iteration to the next; so do branches that draw random numbers, which must be drawn once, and those of
operator sets before 11, where both branches must give the same shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from relrep_onnx.graph.index import (
    RANDOM,
    Graph,
    all_defined,
    defined,
    display_name,
    is_standard,
    leading_to,
    reads,
    refill,
    subgraphs,
)
from relrep_onnx.graph.operators import OPERATORS, Form, NotPrunable
from relrep_onnx.graph.rewrite import following_add, seen_type
from relrep_onnx.types import Array, Window

DIFFERENT_SHAPES: Final = 11
"""The operator set since which the branches of `If` may give different shapes."""

Path = tuple[tuple[str, str], ...]
"""From the outermost graph to a branch: of each `If` on the way its first output, and the attribute that holds the branch."""


@dataclass(frozen=True)
class Home:
    """Where a tensor is in the original model: in which branch, and what it is called there."""

    path: Path
    name: str


@dataclass(frozen=True)
class Gate:
    """A bool tensor of the flat model that says whether a branch runs, and what messages call the branch."""

    tensor: str
    branch: str


@dataclass(frozen=True, eq=False)
class Flat:
    """A model without layers inside `If`, and the one it was made of.

    `homes` are those of the tensors that came out of branches, `gates` those of the layers that did, by their outputs.
    """

    model: ModelProto
    original: ModelProto
    homes: Mapping[str, Home] = field(default_factory=dict)
    gates: Mapping[str, Gate] = field(default_factory=dict)


def flatten(model: ModelProto) -> Flat:
    """Takes layers out of the branches of `If`; a model without such layers stays the one it is."""
    scope = Graph(model)
    if scope.opset < DIFFERENT_SHAPES or not any(_holds_layers(scope, node) for node in model.graph.node):
        return Flat(model, model)
    flat = deepcopy(model)
    lift = _Lift(flat.graph)
    lift.graph(flat.graph, Graph(flat), ())
    _name_nodes_apart(flat.graph, {node.name for node in model.graph.node}, set(defined(model.graph)))
    return Flat(flat, model, lift.homes, lift.gates)


def _is_if(node: NodeProto) -> bool:
    return node.op_type == "If" and is_standard(node)


def _branches(node: NodeProto) -> list[AttributeProto]:
    """What holds the branches of an `If`."""
    return [item for item in node.attribute if item.name in ("then_branch", "else_branch") and item.HasField("g")]


def _holds_layers(scope: Graph, node: NodeProto) -> bool:
    """True for an `If` with a layer that can come out of a branch, or of a branch inside one."""
    if not _is_if(node) or _must_stay(node):
        return False
    bodies = [(item.g, scope.within(item.g)) for item in _branches(node)]
    return any(_layer(inner, n) is not None or _holds_layers(inner, n) for body, inner in bodies for n in body.node)


def _must_stay(node: NodeProto) -> bool:
    bodies = list(subgraphs(node))
    return node.op_type in RANDOM or any(b.sparse_initializer or any(_must_stay(n) for n in b.node) for b in bodies)


def _layer(scope: Graph, node: NodeProto) -> tuple[int, Array, NodeProto | None] | None:
    """The slot of a layer's activation, one without samples, and the Add of its bias if it has one; None for other nodes."""
    operator = OPERATORS.get(node.op_type) if is_standard(node) else None
    slots = [slot for slot in operator.weight_slots if slot < len(node.input)] if operator else []
    constant = next(((slot, found) for slot in slots if (found := scope.constant(node.input[slot])) is not None), None)
    if operator is None or constant is None or not node.output[0]:
        return None
    slot, weight = constant
    slot_of_bias = operator.bias_slot
    if slot_of_bias is not None and any(scope.constant(name) is None for name in node.input[slot_of_bias:] if name):
        return None  # what computes the bias stays in the branch
    activation = next((s for s in operator.weight_slots if s != slot), 0)
    if scope.constant(node.input[activation]) is not None:
        return None
    tensor = scope.tensors[weight.root]
    shape = scope.through(weight.steps, np.empty(tuple(tensor.dims), np.bool_), cast=False).shape
    if 0 in shape:
        return None
    try:
        form = operator.form(node, shape, slot)
        empty = _no_rows(form, seen_type(weight, tensor.data_type))
    except (NotPrunable, ValueError):  # a ValueError where attributes do not fit each other
        return None
    add = following_add(scope, node.output[0], form) if operator.bias_slot is None else None
    bias = scope.value(add[0].input[add[1]]) if add is not None else None
    own = add[0] if add is not None and bias is not None and bias.size == form.rows else None  # the same for all positions
    return activation, empty, own


def _no_rows(form: Form, kind: int) -> Array:
    view, dtype = form.view, helper.tensor_dtype_to_np_dtype(kind)
    if isinstance(view, Window):
        kernel, pads = np.array(view.kernel), np.array(view.pads).reshape(2, -1).sum(axis=0)
        spatial = (kernel - 1) * np.array(view.dilations) + 1 + pads  # enough for one output
        return np.zeros((0, form.groups * form.cols // int(kernel.prod()), *spatial.tolist()), dtype)
    return np.zeros((*view.batch, 0, form.cols) if view.axis == -1 else (*view.batch, form.cols, 0), dtype)


class _Lift:
    """What one `flatten` knows: which names are taken, and where everything comes from."""

    def __init__(self, graph: GraphProto) -> None:
        self.homes: dict[str, Home] = {}
        self.gates: dict[str, Gate] = {}
        self._names = Counter(all_defined(graph))

    def graph(self, graph: GraphProto, scope: Graph, path: Path) -> None:
        """Takes layers out of all branches of a graph, in place."""
        nodes: list[NodeProto] = []
        for node in graph.node:
            for item in _branches(node) if _holds_layers(scope, node) else ():
                first = next(filter(None, node.output))
                here = (*path, (self.homes[first].name if first in self.homes else first, item.name))
                self._name_apart(item.g, here)
                self.graph(item.g, scope.within(item.g), here)
                nodes.extend(self._branch(node, item.name, item.g, scope.within(item.g)))
            nodes.append(node)
        refill(graph.node, nodes)

    def _name_apart(self, body: GraphProto, path: Path) -> None:
        """Gives tensors of a branch names that no other graph of the model has."""
        names = {}
        for name in defined(body):
            names[name] = self._fresh(name) if self._names[name] > 1 else name
            self.homes[names[name]] = Home(path, name)
        _rename(body, {old: new for old, new in names.items() if old != new})

    def _fresh(self, base: str) -> str:
        number = 2
        while f"{base}_{number}" in self._names:
            number += 1
        self._names[f"{base}_{number}"] = 1
        return f"{base}_{number}"

    def _branch(self, node: NodeProto, attribute: str, body: GraphProto, scope: Graph) -> Iterator[NodeProto]:
        """What stands in front of an `If` for one of its branches; the branch keeps the rest."""
        yield from (helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in body.initializer)
        layers: list[tuple[NodeProto, int, Array, NodeProto | None]] = []
        rest: list[NodeProto] = []
        biases: set[str] = set()
        for inner in body.node:
            if (found := _layer(scope, inner)) is not None:
                layers.append((inner, *found))
                biases.update(found[2].output if found[2] is not None else ())
            elif not biases.isdisjoint(inner.output):
                continue
            elif scope.constant(inner.output[0]) is not None:
                yield inner
            else:
                rest.append(inner)
        gates: dict[str, str] = {}
        for layer, slot, empty, add in layers:
            output = layer.output[0]
            gate = self.gates.get(output, Gate("", f"the {attribute.removesuffix('_branch')} branch of {display_name(node)!r}"))
            if gate.tensor not in gates:
                made = self._gate(node, attribute, rest, gate.tensor)
                gates[gate.tensor] = made.output[0]
                yield made
            part = self._part(node, attribute, rest, layer.input[slot], empty)
            layer.input[slot] = part.output[0]
            yield part
            for moved in (layer, *filter(None, [add])):
                self.gates[moved.output[0]] = Gate(gates[gate.tensor], gate.branch)
                yield moved
        self._finish(body, rest)

    def _gate(self, node: NodeProto, attribute: str, rest: Sequence[NodeProto], inner: str) -> NodeProto:
        """Whether a branch runs, and in it the branch that the tensor `inner` is about, if it is about one."""
        if inner:
            return self._part(node, attribute, rest, inner, np.array(False))
        operator = "Identity" if attribute == "then_branch" else "Not"
        return helper.make_node(operator, [node.input[0]], [self._fresh(f"{node.input[0]}_{attribute}")])

    def _part(self, node: NodeProto, attribute: str, rest: Sequence[NodeProto], wanted: str, empty: Array) -> NodeProto:
        """An `If` that gives one tensor of a branch, or something empty where the other branch runs."""
        here, there, output = (self._fresh(wanted) for _ in range(3))
        run = [*leading_to(rest, {wanted}), helper.make_node("Identity", [wanted], [here])]
        other = [helper.make_node("Constant", [], [there], value=numpy_helper.from_array(empty))]
        gated = helper.make_node("If", [node.input[0]], [output], name=self._fresh(display_name(node)))
        other_attribute = "else_branch" if attribute == "then_branch" else "then_branch"
        for name, nodes, result in ((attribute, run, here), (other_attribute, other, there)):
            body = helper.make_graph(nodes, name, [], [ValueInfoProto(name=result)])
            gated.attribute.append(helper.make_attribute(name, body))
        return gated

    def _finish(self, body: GraphProto, rest: Sequence[NodeProto]) -> None:
        """Leaves in a branch what leads to its outputs, or nowhere."""
        read = {name for inner in body.node for name in reads(inner)}
        ends = {name for inner in rest if read.isdisjoint(inner.output) for name in inner.output}
        made = {name for inner in rest for name in inner.output}
        nodes = leading_to(rest, {value.name for value in body.output} | ends)
        for value in body.output:
            if value.name not in made:
                nodes.append(helper.make_node("Identity", [value.name], [self._fresh(value.name)]))
                value.name = nodes[-1].output[0]
        del body.initializer[:], body.value_info[:]
        refill(body.node, nodes)


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Renames tensors in a graph and, where they mean the same ones, in the graphs inside it."""
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for value in graph.output:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]
        for inner in subgraphs(node):
            own = set(defined(inner))
            _rename(inner, {old: new for old, new in names.items() if old not in own})


def _name_nodes_apart(graph: GraphProto, taken: set[str], own: set[str]) -> None:
    """Gives nodes that came in new names where another node has theirs: ONNX Runtime wants no two of the same."""
    for node in graph.node:
        if node.name and own.isdisjoint(node.output):
            base, number = node.name, 1
            while node.name in taken:
                number += 1
                node.name = f"{base}_{number}"
            taken.add(node.name)
