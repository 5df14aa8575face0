"""Layers of a pruned model as operators of the sparse kernels, in a file that runs without them as well.

Layers of a quantized model become int8 operators, those of any other float32 ones.  Each operator is a model-local function
whose body is the dense computation (`kernels.functions`).  Which layers are rewritten is decided on the whole network: predicted
times of layers (`kernels.costs`) plus what it costs to change the layout of every tensor that goes from a dense convolution, for
which ONNX Runtime has a layout of its own, to a sparse one or back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import itemgetter
from typing import Final

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from relrep_onnx.export.sparse_int8 import int8_layers, rewrite_pools
from relrep_onnx.export.sparse_layers import Candidate, float_layers, other_sizes
from relrep_onnx.graph import Graph, activation_shapes, raise_opset
from relrep_onnx.graph.batchnorm import fold_batchnorm
from relrep_onnx.graph.index import reads, refill
from relrep_onnx.kernels import functions
from relrep_onnx.kernels.costs import COSTS, INT8_COSTS, REFERENCE, Costs
from relrep_onnx.types import ConfigError

LEAST_OPSET: Final = 12
"""Constants that are a function's attributes, Clip of bytes."""
IR_VERSION: Final = 8
"""The first with functions inside a model."""
DENSEST: Final = 0.35
"""A layer of unknown shape is rewritten up to this density."""
GAIN: Final = 0.97
"""A plan must be predicted to take at most this share of the dense time."""
ROUNDING: Final = 1e-9
"""Microseconds: a flip that saves less is noise, and could come back for ever."""


@dataclass(frozen=True)
class Choice:
    """One layer that could be sparse, its density, and whether it becomes so."""

    layer: str
    density: float
    sparse: bool


def to_sparse_ort(
    model: ModelProto,
    *,
    instruction_set: str = REFERENCE,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    layers: Collection[str] | None = None,
) -> ModelProto:
    """The model with the layers that gain from it rewritten; the given one is not changed, and given back where none gains.

    Args:
        model: any ONNX model; one of an operator set older than 12 is raised to it.
        instruction_set: whose costs decide, as `kernels.instruction_sets()` names it.
        input_shapes: shapes of inputs whose open dimensions matter for the costs.
        layers: rewrites exactly these layers (by the names that `plan` gives) instead of asking the costs.

    Raises:
        ModelError: the operator set is older than 12 and cannot be raised.
        ConfigError: an unknown instruction set, or a layer that cannot be rewritten.
    """
    return with_choices(model, instruction_set=instruction_set, input_shapes=input_shapes, layers=layers)[0]


def with_choices(
    model: ModelProto,
    *,
    instruction_set: str = REFERENCE,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    layers: Collection[str] | None = None,
) -> tuple[ModelProto, tuple[Choice, ...]]:
    """What `to_sparse_ort` gives, and a choice for each layer that could be sparse; errors as there."""
    copy, candidates, choices = _prepared(model, instruction_set, input_shapes or {}, layers)
    names = {choice.layer for choice in choices if choice.sparse}
    chosen = [candidate for candidate in candidates if candidate.name in names]
    if not chosen:
        return model, choices  # folding BatchNormalization alone gains nothing
    for candidate in chosen:
        _rewrite(copy, candidate)
    rewrite_pools(copy, {candidate.nodes[-1].output[0] for candidate in chosen})
    _drop_unread(copy)
    copy.ir_version = max(copy.ir_version, IR_VERSION)
    return copy, choices


def plan(
    model: ModelProto,
    *,
    instruction_set: str = REFERENCE,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    caution: float = 1.0,
) -> tuple[Choice, ...]:
    """What `to_sparse_ort` would do with each layer that could be sparse; errors as there.

    `caution` multiplies what the sparse layers are predicted to take.
    """
    return _prepared(model, instruction_set, input_shapes or {}, None, caution)[2]


def _prepared(
    model: ModelProto,
    instruction_set: str,
    input_shapes: Mapping[str, tuple[int, ...]],
    layers: Collection[str] | None,
    caution: float = 1.0,
) -> tuple[ModelProto, Sequence[Candidate], tuple[Choice, ...]]:
    if instruction_set not in COSTS:
        raise ConfigError(f"no costs for the instruction set {instruction_set!r}; known: {', '.join(COSTS)}")
    copy = deepcopy(raise_opset(model, LEAST_OPSET))
    fold_batchnorm(copy)
    shapes = activation_shapes(copy, input_shapes, lambda _: None)
    quantized = int8_layers(copy, shapes)
    candidates = quantized or float_layers(copy, shapes, activation_shapes(copy, other_sizes(copy, input_shapes), lambda _: None))
    costs = (INT8_COSTS if quantized else COSTS)[instruction_set]
    names = {candidate.name for candidate in candidates}
    if layers is None:
        chosen = _choose(candidates, costs, caution)
    elif set(layers) <= names:
        chosen = set(layers)
    else:
        raise ConfigError(f"layers {sorted(set(layers) - names)} cannot be sparse; those that can: {sorted(names)}")
    return copy, candidates, tuple(Choice(c.name, c.density, c.name in chosen) for c in candidates)


def _choose(candidates: Sequence[Candidate], costs: Costs, caution: float) -> set[str]:
    """The set of sparse layers with the least predicted time, found by flipping single layers from three starting points."""
    known = [c for c in candidates if c.work is not None]
    gains = {c.name: costs.dense_time(c.work) - caution * costs.sparse_time(c.work) for c in known if c.work is not None}

    links: dict[str, list[tuple[str, float]]] = {name: [] for name in gains}
    for c in known:
        for other, size in c.neighbours.items():
            links[c.name].append((other, size))
            if other in links:
                links[other].append((c.name, size))

    def saved_by(name: str, chosen: set[str]) -> float:
        """What flipping one layer saves."""
        crossings = sum(size if (name in chosen) == (other in chosen) else -size for other, size in links[name])
        return (-gains[name] if name in chosen else gains[name]) - costs.reorder * crossings / 1e6

    best, most = set[str](), 0.0
    for start in (gains, [name for name, gain in gains.items() if gain > 0]):
        current, saved = set[str](), 0.0
        for name in start:
            saved += saved_by(name, current)
            current.add(name)
        while gains:
            change, flipped = max(((saved_by(name, current), name) for name in gains), key=itemgetter(0))
            if change <= ROUNDING:
                break
            saved += change
            current ^= {flipped}
        if saved > most:
            best, most = current, saved
    dense = sum(costs.dense_time(c.work) for c in known if c.work is not None)
    if most < (1 - GAIN) * dense:
        best = set()
    return best | {c.name for c in candidates if c.work is None and c.density <= DENSEST}


def _rewrite(model: ModelProto, candidate: Candidate) -> None:
    graph = Graph(model)
    operator = candidate.operator(graph.opset)
    if operator.body.name not in {f.name for f in model.functions if f.domain == functions.DOMAIN}:
        model.functions.append(operator.body)
    if functions.DOMAIN not in {o.domain for o in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(functions.DOMAIN, 1))
    names = []
    for source in operator.inputs:
        if isinstance(source, tuple):
            what, array = source
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), graph.fresh(f"{candidate.name}.{what}"))
            model.graph.initializer.append(tensor)
            source = tensor.name
        names.append(source)
    output = candidate.nodes[-1].output[0]
    node = helper.make_node(
        operator.body.name, names, [output], name=candidate.nodes[0].name, domain=functions.DOMAIN, **operator.attributes
    )
    place = next(i for i, n in enumerate(model.graph.node) if n.output[:1] == [output])
    model.graph.node.insert(place, node)
    for member in candidate.nodes:
        model.graph.node.remove(member)


def _drop_unread(model: ModelProto) -> None:
    """Removes constants that nothing reads any more, the nodes that made them, and types of tensors that are gone.

    An initializer of old models is an input as well; that entry goes too.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    signature = {value.name for value in model.graph.input} - stored | {value.name for value in model.graph.output}
    while True:
        read = signature | {name for node in model.graph.node for name in reads(node)}
        unread = [node for node in model.graph.node if not set(node.output) & read and (node.op_type == "Constant" or node.input)]
        if not unread:
            break
        for node in unread:
            model.graph.node.remove(node)
    refill(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in read])
    refill(model.graph.input, [value for value in model.graph.input if value.name in read or value.name not in stored])
    made = read | {name for node in model.graph.node for name in node.output}
    refill(model.graph.value_info, [value for value in model.graph.value_info if value.name in made])
