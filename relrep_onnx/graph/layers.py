"""Finding what can be pruned, and reading it: every weight ends up as a `Layer` or as a `Skipped` with its reason."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from relrep_onnx.graph.branches import with_shortcut
from relrep_onnx.graph.filters import is_bank
from relrep_onnx.graph.index import PASS_THROUGH, Constant, Graph, display_name, is_standard, number, subgraphs, with_bodies
from relrep_onnx.graph.operators import OPERATORS, Form, NotPrunable
from relrep_onnx.graph.stages import levels
from relrep_onnx.types import EXTREME, ConfigError, FloatArray, Layer, Selection, Skipped, Use, Window

# Older ONNX, such as 1.17, reads bfloat16 as numpy's float32, which would be written back as another type.
_BFLOAT16 = np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)).itemsize == 2
INTEGERS = (TensorProto.INT8, TensorProto.UINT8)
BROADCASTING_ADD = 7
"""The operator set since which Add broadcasts without being told how."""
FILTERS = "a bank of fixed filters (windowed tones), not learned"
QUANTIZED = "prune the float model and export it as int8 instead"
BODIES = {"If": "whose branches cannot be taken apart", "": "which feeds itself from one iteration to the next"}
"""Why a weight stays in a body that `flatten` left as it is: of `If`, and of other operators."""
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, *([TensorProto.BFLOAT16] if _BFLOAT16 else []))


@dataclass(frozen=True)
class _Found:
    """One node's weight before sharing is resolved."""

    node: NodeProto
    slot: int
    constant: Constant
    form: Form

    def same_reading(self, other: _Found) -> bool:
        """True where both nodes see the stored tensor as the same matrix and read their inputs in the same way."""
        return self._reading() == other._reading()

    def _reading(self) -> object:
        steps = [(step.op_type, _attributes(step), tuple(step.input[1:])) for step in self.constant.steps]
        return self.node.op_type, self.slot, _attributes(self.node), self.form.view, steps


def find_layers(
    graph: Graph, selection: Selection, refuse: Callable[[Layer], str | None] = lambda layer: None
) -> tuple[list[Layer], list[Skipped]]:
    """Prunable layers in graph order, and every other weight with the reason it stays.

    Args:
        graph: the model.
        selection: what the user wants.
        refuse: gives a reason where a layer must stay, such as a pattern it does not fit.

    Raises:
        ConfigError: an exclude or operator pattern matches nothing.
    """
    found, skipped = _weights(graph, selection)
    layers: list[Layer] = []
    for root, users in found.items():
        problem = _sharing_problem(graph, root, users)
        layer = _layer(graph, root, users, {layer.name for layer in layers}) if problem is None else None
        if layer is not None:
            problem = FILTERS if _holds_filters(graph, layer) else refuse(layer)
        if layer is not None and problem is None:
            layers.append(layer)
        else:
            skipped.extend(Skipped(display_name(u.node), u.node.op_type, problem or "") for u in users)
    layers, dependent = _independent(graph, layers)
    level, _ = levels(graph, layers)
    layers = [with_shortcut(graph, layer, level) for layer in layers]
    # Branches of `If` may hold copies of a node.
    return layers, list(dict.fromkeys([*skipped, *dependent, *_unreachable(graph, selection.min_size)]))


def _weights(graph: Graph, selection: Selection) -> tuple[dict[str, list[_Found]], list[Skipped]]:
    """Nodes whose weights may be pruned, by stored tensor, and those whose may not."""
    nodes = graph.model.graph.node
    excluded = _matching(selection.nodes_to_exclude, {display_name(n) for n in nodes} | set(graph.tensors), "nodes to exclude")
    wanted = _matching(selection.op_types, {n.op_type for n in nodes} & set(OPERATORS), "operator types")
    found: dict[str, list[_Found]] = {}
    skipped = []
    for node in nodes:
        try:
            one = _weight_of(graph, node)
            if one is None:
                continue
            if display_name(node) in excluded or one.constant.root in excluded:
                raise NotPrunable("excluded by name")
            if selection.op_types and node.op_type not in wanted:
                raise NotPrunable(f"operator type {node.op_type} was not asked for")
            size = one.form.rows * one.form.cols
            if size < selection.min_size:
                raise NotPrunable(f"{size} weights, fewer than the minimum of {selection.min_size}")
            found.setdefault(one.constant.root, []).append(one)
        except NotPrunable as reason:
            skipped.append(Skipped(display_name(node), node.op_type, str(reason)))
    return found, skipped


def _holds_filters(graph: Graph, layer: Layer) -> bool:
    """Whether a layer is a fixed filter bank."""
    if layer.op != "Conv" or not isinstance(layer.view, Window):
        return False
    return is_bank(layer.view.kernel, layer.cols, lambda: read_weight(graph, layer))


def read_weight(graph: Graph, layer: Layer) -> FloatArray:
    """The layer's effective weight (alpha included) as float64[rows, cols], in the order its inputs are sampled."""
    form, constant = locate(graph, layer)
    stored = graph.through(constant.steps, graph.stored(constant.root), cast=False).astype(np.float64)
    return np.ascontiguousarray(form.to_matrix(stored)) * form.scale


def count_zeros(graph: Graph, layers: Iterable[Layer]) -> dict[str, int]:
    """Zeros in each layer's weight, by layer name."""
    return {layer.name: layer.size - int(np.count_nonzero(read_weight(graph, layer))) for layer in layers}


def locate(graph: Graph, layer: Layer) -> tuple[Form, Constant]:
    """The form and the stored tensor of a layer that `find_layers` returned, in this graph or a stage of it."""
    found = _weight_of(graph, node_of(graph, layer, layer.uses[0].output))
    if found is None:
        raise KeyError(layer.name)
    return found.form, found.constant


def node_of(graph: Graph, layer: Layer, output: str) -> NodeProto:
    """The node of a layer that made `output` when `find_layers` saw the graph."""
    node = graph.producers[output]
    if node.op_type == layer.op:
        return node
    return graph.producers[node.input[0]]  # `write_layer` put an Add for the bias between the node and its output


def _weight_of(graph: Graph, node: NodeProto) -> _Found | None:
    """The weight a node holds; None where the node is of no interest; NotPrunable where it is but must stay."""
    operator = OPERATORS.get(node.op_type) if is_standard(node) else None
    if operator is None:
        return None
    if not node.output[0]:
        raise NotPrunable("nothing reads its output")
    constants = [(slot, graph.constant(node.input[slot])) for slot in operator.weight_slots if slot < len(node.input)]
    slot, constant = next(((s, c) for s, c in constants if c is not None), (0, None))
    if constant is None:
        raise NotPrunable(_why_computed(graph, [node.input[s] for s, _ in constants]))
    if operator.bias_slot is None and graph.opset < BROADCASTING_ADD:
        raise NotPrunable(f"operator set {graph.opset} has no Add that its bias could go into; convert the model to 7 or newer")
    operands = [s for s in operator.weight_slots if s != slot] or [0]
    if any(node.input[s] in graph.constant_names for s in operands if s < len(node.input)):
        raise NotPrunable("a constant expression: it has no activation")
    tensor = graph.tensors[constant.root]
    if tensor.data_type not in FLOATS:
        raise NotPrunable(f"weights of type {TensorProto.DataType.Name(tensor.data_type).lower()}")
    for step in constant.steps:
        if step.op_type == "Cast" and int(number(step, "to", 0)) not in FLOATS:
            raise NotPrunable("its weight is cast to integers")
    bias = operator.bias_slot
    if bias is not None and bias < len(node.input) and node.input[bias] and graph.value(node.input[bias]) is None:
        raise NotPrunable("its bias is computed at run time")
    shape = graph.through(constant.steps, np.empty(tuple(tensor.dims), np.bool_), cast=False).shape
    if 0 in shape:
        raise NotPrunable("an empty weight")
    return _Found(node, slot, constant, operator.form(node, shape, slot))


def _attributes(node: NodeProto) -> list[bytes]:
    return sorted(item.SerializeToString(deterministic=True) for item in node.attribute)


def _why_computed(graph: Graph, names: Sequence[str]) -> str:
    for name in names:
        node = graph.producers.get(name)
        while node is not None and node.op_type in PASS_THROUGH and node.input:
            node = graph.producers.get(node.input[0])
        if node is not None and node.op_type == "DequantizeLinear" and node.input[0] in graph.constant_names:
            return f"quantized weight (behind DequantizeLinear); {QUANTIZED}"
    if any(name in graph.constant_names for name in names):
        return "its weight is computed from constants; fold them first, for example with onnxsim"
    return "no constant operand: the weight is computed at run time"


def _sharing_problem(graph: Graph, root: str, users: Sequence[_Found]) -> str | None:
    mine = {max(user.node.output) for user in users}
    for node, slot in graph.readers(root):
        if node is None:
            return f"its weight {root!r} is also an output of the graph"
        if max(node.output) not in mine or slot != users[0].slot:
            return f"its weight {root!r} is also read by {display_name(node)!r} ({node.op_type})"
    if any(not users[0].same_reading(user) for user in users[1:]):
        return f"its weight {root!r} is read by several nodes in different ways"
    with np.errstate(invalid="ignore"):  # casts of signalling NaNs
        sizes = np.abs(graph.stored(root).astype(np.float64))
    if not (sizes <= EXTREME).all():  # NaN too
        return f"its weight {root!r} holds NaN, infinity or numbers beyond {EXTREME:g}"
    return None


def _layer(graph: Graph, root: str, users: Sequence[_Found], taken: set[str]) -> Layer:
    first = users[0]
    names = (display_name(first.node), first.node.output[0], *(f"{first.node.output[0]}_{n}" for n in range(2, len(taken) + 3)))
    return Layer(
        name=next(name for name in names if name not in taken),
        op=first.node.op_type,
        weight=root,
        shape=tuple(graph.tensors[root].dims),
        rows=first.form.rows,
        cols=first.form.cols,
        groups=first.form.groups,
        view=first.form.view,
        uses=tuple(Use(display_name(u.node), u.node.input[1 - u.slot], u.node.output[0]) for u in users),
        normalized=all(_feeds_batch_norm(graph, u.node.output[0]) for u in users),
    )


def _feeds_batch_norm(graph: Graph, output: str) -> bool:
    readers = [(node.op_type, slot) for node, slot in graph.consumers.get(output, [])]
    return readers == [("BatchNormalization", 0)] and output not in graph.outputs


def _independent(graph: Graph, layers: list[Layer]) -> tuple[list[Layer], list[Skipped]]:
    """Drops shared layers whose users feed each other: no single point in the pass could repair them."""
    skipped: list[Skipped] = []
    while (dependent := levels(graph, layers)[1]) is not None:
        layers = [layer for layer in layers if layer is not dependent]
        reason = f"its weight {dependent.weight!r} is shared by nodes that feed each other"
        skipped.extend(Skipped(use.node, dependent.op, reason) for use in dependent.uses)
    return layers, skipped


def _unreachable(graph: Graph, min_size: int) -> Iterator[Skipped]:
    """Weights outside the table's reach: other operators, control-flow bodies, model-local functions."""
    for node in graph.model.graph.node:
        yield from _unsupported(graph, node, min_size)
        yield from _in_bodies(graph, node, min_size)
    for function in graph.model.functions:
        where = f"inside the model-local function {function.name!r}"
        for node in with_bodies(function.node):
            if node.op_type in OPERATORS and is_standard(node):
                reason = f"{where}; inline the functions first, with onnx.inliner.inline_local_functions"
                yield Skipped(display_name(node), node.op_type, reason)


def _unsupported(graph: Graph, node: NodeProto, min_size: int) -> Iterator[Skipped]:
    if node.op_type in OPERATORS and is_standard(node):
        return
    large = [name for name in node.input if _stored_size(graph, name, FLOATS) >= min_size]
    whole = [name for name in node.input if _stored_size(graph, name, INTEGERS) >= min_size]
    if whole and ("Integer" in node.op_type or "QLinear" in node.op_type):
        yield from (Skipped(display_name(node), node.op_type, f"quantized weight {name!r}; {QUANTIZED}") for name in whole)
    elif large and not (is_standard(node) and node.op_type in PASS_THROUGH):
        yield Skipped(display_name(node), node.op_type, f"operator not supported; its constant {large[0]!r} stays")


def _in_bodies(graph: Graph, node: NodeProto, min_size: int, outside: str = "") -> Iterator[Skipped]:
    """What the graphs inside a node hold: all that `flatten` could not take out."""
    why = BODIES.get(node.op_type, BODIES[""])
    where = outside or f"inside the body of {display_name(node)!r} ({node.op_type}), {why}; export the model without it"
    for body in subgraphs(node):
        scope = graph.within(body)
        for inner in body.node:
            yield from _unsupported(scope, inner, min_size)
            try:
                if _weight_of(scope, inner) is not None:
                    yield Skipped(display_name(inner), inner.op_type, where)
            except NotPrunable as reason:
                yield Skipped(display_name(inner), inner.op_type, str(reason))
            yield from _in_bodies(scope, inner, min_size, where)


def _stored_size(graph: Graph, name: str, kinds: Collection[int]) -> int:
    constant = graph.constant(name)
    if constant is None or graph.tensors[constant.root].data_type not in kinds:
        return 0
    return int(np.prod(graph.tensors[constant.root].dims, dtype=np.int64))


def _matching(patterns: Sequence[str], names: set[str], what: str) -> set[str]:
    """Names that equal a pattern, or that it matches whole as a regular expression."""
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if name == pattern or re.fullmatch(pattern, name)}
        except re.error as error:
            raise ConfigError(f"{what}: {pattern!r} is no valid regular expression ({error})") from error
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or sorted(names)[:3]
            hint = f"near names: {', '.join(map(repr, near))}" if near else "the model has none at all"
            raise ConfigError(f"{what}: nothing is called {pattern!r}; {hint}")
        chosen |= hits
    return chosen
