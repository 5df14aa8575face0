"""The form `sparse-ort`: layers of a pruned model as operators of the sparse kernels, in a file that runs without them as well.

    Conv [-> BatchNormalization] [-> Add] [-> Relu | Clip]        becomes one SparseConv[Add][Relu|Clip]
    Gemm | MatMul [-> Add bias] [-> Add] [-> Relu | Clip]         becomes one SparseGemm[Add][Relu|Clip]

Each operator is a model-local function whose body is the dense computation (`kernels.functions`).  Which layers are rewritten is
decided on the whole network: predicted times of layers (`kernels.costs`) plus what it costs to change the layout of every tensor
that goes from a dense convolution, which ONNX Runtime keeps in blocks of channels, to a sparse one or back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from relrep_onnx.graph import Graph, activation_shapes
from relrep_onnx.graph.batchnorm import fold_batchnorm
from relrep_onnx.graph.index import attribute, display_name, ints, is_standard, number, reads
from relrep_onnx.kernels import functions
from relrep_onnx.kernels.costs import COSTS, REFERENCE, Costs, Kind, Work
from relrep_onnx.types import Array, ConfigError, ModelError

OLDEST_OPSET: Final = 12
IR_VERSION: Final = 8
"""The first with functions inside a model."""
DENSEST: Final = 0.35
"""A layer of unknown shape is rewritten up to this density."""
GAIN: Final = 0.97
"""A plan must be predicted to take at most this share of the dense time."""
QUAD_FILL: Final = 1.33
"""As in the kernels: up to how many weights per nonzero four output channels are computed together."""
LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(eq=False)
class Candidate:
    """A layer that could be sparse: its nodes (the product first), and what the operator would be."""

    name: str
    weight: Array
    bias: Array
    nodes: list[NodeProto]
    attributes: dict[str, Any]
    residual: str = ""
    activation: functions.Activation = ""
    work: Work | None = None
    neighbours: dict[str, float] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Share of nonzeros."""
        return float(np.count_nonzero(self.weight)) / self.weight.size


@dataclass(frozen=True)
class Choice:
    """One layer's prediction in microseconds (None where a shape is not known), and whether it becomes sparse."""

    layer: str
    density: float
    dense_us: float | None
    sparse_us: float | None
    sparse: bool


def to_sparse_ort(
    model: ModelProto,
    *,
    instruction_set: str = REFERENCE,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    layers: Collection[str] | None = None,
) -> ModelProto:
    """The model with the layers that gain from it rewritten; the given one is not changed.

    Args:
        model: any ONNX model of opset 12 or newer.
        instruction_set: whose costs decide, as `kernels.instruction_sets()` names it.
        input_shapes: shapes of inputs whose open dimensions matter for the costs.
        layers: rewrites exactly these layers (by the names that `plan` gives) instead of asking the costs.

    Raises:
        ModelError: the opset is too old.
        ConfigError: an unknown instruction set, or a layer that cannot be rewritten.
    """
    copy, candidates, choices = _prepared(model, instruction_set, input_shapes or {}, layers)
    chosen = {choice.layer for choice in choices if choice.sparse}
    for candidate in candidates:
        if candidate.name in chosen:
            _rewrite(copy, candidate)
    if chosen:
        _drop_unread(copy)
        copy.ir_version = max(copy.ir_version, IR_VERSION)
    return copy


def plan(
    model: ModelProto,
    *,
    instruction_set: str = REFERENCE,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    caution: float = 1.0,
) -> tuple[Choice, ...]:
    """What `to_sparse_ort` would do with each layer that could be sparse; errors as there.

    `caution` multiplies what the sparse layers are predicted to take before the choice, not the predictions given back.
    """
    return _prepared(model, instruction_set, input_shapes or {}, None, caution)[2]


def _prepared(
    model: ModelProto,
    instruction_set: str,
    input_shapes: Mapping[str, tuple[int, ...]],
    layers: Collection[str] | None,
    caution: float = 1.0,
) -> tuple[ModelProto, list[Candidate], tuple[Choice, ...]]:
    if instruction_set not in COSTS:
        raise ConfigError(f"no costs for the instruction set {instruction_set!r}; known: {', '.join(COSTS)}")
    copy = ModelProto()
    copy.CopyFrom(model)
    if Graph(copy).opset < OLDEST_OPSET:
        raise ModelError(
            f"the model is of opset {Graph(copy).opset}; the sparse operators need {OLDEST_OPSET} or newer: convert it with "
            "onnx.version_converter.convert_version, or export it anew"
        )
    fold_batchnorm(copy)
    candidates = _candidates(copy, activation_shapes(copy, input_shapes, lambda _: None))
    names = {candidate.name for candidate in candidates}
    if layers is None:
        chosen = _choose(candidates, COSTS[instruction_set], caution)
    elif set(layers) <= names:
        chosen = set(layers)
    else:
        raise ConfigError(f"layers {sorted(set(layers) - names)} cannot be sparse; those that can: {sorted(names)}")
    return copy, candidates, tuple(_choice(c, COSTS[instruction_set], c.name in chosen) for c in candidates)


def _choice(candidate: Candidate, costs: Costs, sparse: bool) -> Choice:
    work = candidate.work
    dense = None if work is None else costs.dense_time(work)
    return Choice(candidate.name, candidate.density, dense, None if work is None else costs.sparse_time(work), sparse)


def _choose(candidates: Sequence[Candidate], costs: Costs, caution: float) -> set[str]:
    """The set of sparse layers with the least predicted time, found by flipping single layers from three starting points."""
    known = [c for c in candidates if c.work is not None]
    gains = {c.name: costs.dense_time(c.work) - caution * costs.sparse_time(c.work) for c in known if c.work is not None}

    def saved(chosen: set[str]) -> float:
        crossings = sum(size for c in known for other, size in c.neighbours.items() if (c.name in chosen) != (other in chosen))
        return sum(gains[name] for name in chosen) - costs.reorder * crossings / 1e6

    best: set[str] = set()
    for start in (set(gains), {name for name, gain in gains.items() if gain > 0}):
        current = start
        while True:
            flipped = max((current ^ {name} for name in gains), key=saved, default=current)
            if saved(flipped) <= saved(current):
                break
            current = flipped
        if saved(current) > saved(best):
            best = current
    dense = sum(costs.dense_time(c.work) for c in known if c.work is not None)
    if saved(best) < (1 - GAIN) * dense:
        best = set()
    return best | {c.name for c in candidates if c.work is None and c.density <= DENSEST}


# ------------------------------------------------------------------------------------------------------------ finding layers


def _candidates(model: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> list[Candidate]:
    graph = Graph(model)
    found: list[Candidate] = []
    taken: set[str] = set()  # outputs of nodes that a candidate holds
    for node in model.graph.node:
        if not is_standard(node) or (set(node.output) & taken):
            continue
        candidate = _convolution(graph, node) if node.op_type == "Conv" else _product(graph, node)
        if candidate is None:
            continue
        _take_followers(graph, candidate, shapes, taken)
        candidate.work = _work(candidate, shapes)
        taken.update(name for member in candidate.nodes for name in member.output)
        found.append(candidate)
    _find_neighbours(graph, found, shapes)
    return found


def _constant(graph: Graph, node: NodeProto, slot: int) -> Array | None:
    """A float32 constant input."""
    value = graph.value(node.input[slot]) if slot < len(node.input) and node.input[slot] else None
    return value if value is not None and value.dtype == np.float32 and np.isfinite(value).all() else None


def _convolution(graph: Graph, node: NodeProto) -> Candidate | None:
    weight, bias = _constant(graph, node, 1), _constant(graph, node, 2)
    if weight is None or weight.ndim != 4 or (bias is None and len(node.input) > 2 and node.input[2]):
        return None
    if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    window = {
        "strides": ints(node, "strides", (1, 1)),
        "pads": ints(node, "pads", (0, 0, 0, 0)),
        "dilations": ints(node, "dilations", (1, 1)),
        "group": int(number(node, "group", 1)),
    }
    return Candidate(display_name(node), weight, np.zeros(weight.shape[0], np.float32) if bias is None else bias, [node], window)


def _product(graph: Graph, node: NodeProto) -> Candidate | None:
    if node.op_type not in ("Gemm", "MatMul"):
        return None
    weight = _constant(graph, node, 1)
    if weight is None or weight.ndim != 2 or graph.value(node.input[0]) is not None:
        return None
    if node.op_type == "MatMul":
        return Candidate(display_name(node), weight.T, np.zeros(weight.shape[1], np.float32), [node], {})
    if attribute(node, "transA", 0):
        return None
    weight = (weight if attribute(node, "transB", 0) else weight.T) * np.float32(number(node, "alpha", 1.0))
    bias: Array = np.zeros(weight.shape[0], np.float32)
    if len(node.input) > 2 and node.input[2]:
        given = _constant(graph, node, 2)
        if given is None or given.size not in (1, bias.size) or given.shape[-1:] not in ((), (1,), bias.shape):
            return None
        bias = bias + given.reshape(-1) * np.float32(number(node, "beta", 1.0))
    return Candidate(display_name(node), weight, bias, [node], {})


def _only_reader(graph: Graph, name: str) -> NodeProto | None:
    readers = graph.consumers.get(name, [])
    if name in graph.outputs or len(readers) != 1 or readers[0][1] < 0 or not is_standard(readers[0][0]):
        return None
    return readers[0][0]


def _take_followers(graph: Graph, candidate: Candidate, shapes: Mapping[str, tuple[int, ...]], taken: set[str]) -> None:
    """Extends a candidate by a constant Add (products), a residual Add, and an activation."""

    def following() -> NodeProto | None:
        node = _only_reader(graph, candidate.nodes[-1].output[0])
        return None if node is None or node.output[0] in taken else node

    node = following()
    if node is not None and node.op_type == "Add" and candidate.nodes[0].op_type != "Conv":
        slot = 1 - list(node.input).index(candidate.nodes[-1].output[0])
        shift = _constant(graph, node, slot)
        if shift is not None and shift.size == candidate.bias.size and shift.shape[-1:] == candidate.bias.shape:
            candidate.bias = candidate.bias + shift.reshape(-1)
            candidate.nodes.append(node)
            node = following()
    if node is not None and node.op_type == "Add" and len(set(node.input)) == 2:
        other = node.input[1 - list(node.input).index(candidate.nodes[-1].output[0])]
        same = shapes.get(other) is not None and shapes.get(other) == shapes.get(node.output[0])
        if same and other not in graph.constant_names:
            candidate.residual = other
            candidate.nodes.append(node)
            node = following()
    if node is not None and node.op_type == "Relu":
        candidate.activation = "Relu"
        candidate.nodes.append(node)
    elif node is not None and node.op_type == "Clip":
        bounds = [graph.value(name) if name else None for name in list(node.input)[1:3]]
        if all(b is not None or not name for b, name in zip(bounds, list(node.input)[1:3], strict=True)):
            low, high = (float(b.reshape(())) if b is not None else None for b in [*bounds, None, None][:2])
            candidate.activation = "Clip"
            candidate.attributes |= {"min": -LARGEST if low is None else low, "max": LARGEST if high is None else high}
            candidate.nodes.append(node)


def _work(candidate: Candidate, shapes: Mapping[str, tuple[int, ...]]) -> Work | None:
    node, weight = candidate.nodes[0], candidate.weight
    into, out = shapes.get(node.input[0]), shapes.get(node.output[0])
    if into is None or out is None:
        return None
    kind: Kind = "product"
    if node.op_type == "Conv":
        kind = "depthwise" if weight.shape[1] == 1 else "pointwise" if weight.shape[2:] == (1, 1) else "conv"
    outputs = float(np.prod(out))
    matrix = weight.reshape(weight.shape[0], -1)
    quads = False
    if matrix.shape[0] % 4 == 0 and kind != "depthwise":
        shared = np.count_nonzero((matrix != 0).reshape(-1, 4, matrix.shape[1]).any(axis=1))
        quads = bool(4 * shared <= QUAD_FILL * np.count_nonzero(matrix))
    return Work(kind, outputs * matrix.shape[1], outputs, float(np.prod(into)), candidate.density, quads)


def _find_neighbours(graph: Graph, candidates: Sequence[Candidate], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """For every convolution the convolutions whose results reach it without another in between, and the elements that travel."""
    owner = {name: c for c in candidates for member in c.nodes for name in member.output}

    def sources(name: str, seen: set[str]) -> set[str]:
        if name in owner:
            return {owner[name].name}
        node = graph.producers.get(name)
        if name in seen or node is None:
            return set()
        seen.add(name)
        return {source for other in reads(node) for source in sources(other, seen)}

    convolutions = {c.name for c in candidates if c.nodes[0].op_type == "Conv"}
    for candidate in candidates:
        if candidate.name not in convolutions:
            continue
        for name in filter(None, (candidate.nodes[0].input[0], candidate.residual)):
            for source in (sources(name, set()) & convolutions) - {candidate.name}:
                candidate.neighbours[source] = float(np.prod(shapes.get(name, (0,))))


# ------------------------------------------------------------------------------------------------------------------- writing


def _rewrite(model: ModelProto, candidate: Candidate) -> None:
    graph = Graph(model)
    convolution = candidate.nodes[0].op_type == "Conv"
    family: functions.Family = "SparseConv" if convolution else "SparseGemm"
    body = functions.function(family, graph.opset, adds=bool(candidate.residual), activation=candidate.activation)
    if body.name not in {f.name for f in model.functions if f.domain == functions.DOMAIN}:
        model.functions.append(body)
    if functions.DOMAIN not in {o.domain for o in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(functions.DOMAIN, 1))
    values, gaps = functions.encode(candidate.weight)
    names = []
    for what, array in (("values", values), ("gaps", gaps), ("bias", candidate.bias)):
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), graph.fresh(f"{candidate.name}.{what}"))
        model.graph.initializer.append(tensor)
        names.append(tensor.name)
    node = helper.make_node(
        body.name,
        [candidate.nodes[0].input[0], *names, *filter(None, [candidate.residual])],
        [candidate.nodes[-1].output[0]],
        name=candidate.name,
        domain=functions.DOMAIN,
        weight_shape=candidate.weight.shape,
        **candidate.attributes,
    )
    place = next(i for i, n in enumerate(model.graph.node) if n.output[:1] == candidate.nodes[-1].output[:1])
    model.graph.node.insert(place, node)
    for member in candidate.nodes:
        model.graph.node.remove(member)


def _drop_unread(model: ModelProto) -> None:
    """Removes constants that nothing reads any more, the nodes that made them, and types of tensors that are gone."""
    signature = {value.name for value in (*model.graph.input, *model.graph.output)}
    while True:
        read = signature | {name for node in model.graph.node for name in reads(node)}
        unread = [node for node in model.graph.node if not set(node.output) & read and (node.op_type == "Constant" or node.input)]
        if not unread:
            break
        for node in unread:
            model.graph.node.remove(node)
    _keep(model.graph.initializer, read)
    made = read | {name for node in model.graph.node for name in node.output}
    _keep(model.graph.value_info, made)


def _keep(items: Any, names: set[str]) -> None:
    """Removes what is not named from a repeated field."""
    kept = [item for item in items if item.name in names]
    del items[:]
    items.extend(kept)
