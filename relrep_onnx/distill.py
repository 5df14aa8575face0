"""One step of refinement as one ONNX model: the dense network, the sparse one, their distance, and its gradients.

    loss = mean over block ends of |f_s - f_d|^2 / |f_d|^2  +  mean over outputs of |y_s - y_d|^2 / |y_d|^2

Block ends are where a residual sum or a spatial reduction closes.  Nothing needs to be known about what the outputs mean.  Where
a node without a gradient rule stands before an output, the tensors it reads take the output's place, so the rest still moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from relrep_onnx.gradient import MEASURES, Reach, Trace, gradient_model, without_unused
from relrep_onnx.graph import (
    STANDARD_DOMAINS,
    Graph,
    Parameter,
    as_inputs,
    block_ends,
    display_name,
    parameters,
    raise_opset,
    reads,
    serialized,
)
from relrep_onnx.graph.index import refill
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Array, Feeds, Layer, ModelError

OPSET = 20
"""Operator set of the rules: older graphs are raised to it; newer ones stay, for the operators of the rules did not change."""
DENSE = "dense/"
LOSS = "loss/"
TINY = 1e-12
"""Keeps the distance of features that are all zero finite."""


@dataclass(frozen=True)
class Wall:
    """A node that gradients do not pass, and why."""

    node: str
    reason: str


@dataclass(frozen=True, eq=False)
class Distillation:
    """What moves, and what it is held against.

    `dense` and `sparse` are in the gradients' operator set, `sparse` with its parameters as inputs; `ends` and `outputs` are
    tensors of both.
    """

    dense: ModelProto
    sparse: ModelProto
    parameters: tuple[Parameter, ...]
    ends: tuple[str, ...]
    outputs: tuple[str, ...]
    walls: tuple[Wall, ...]
    sample_bytes: int
    """What the sparse network computes for one sample, all of which waits for the way back."""

    @property
    def names(self) -> list[str]:
        """The parameters' tensors."""
        return [p.tensor for p in self.parameters]

    @property
    def aims(self) -> tuple[str, ...]:
        """Block ends, then outputs."""
        return (*self.ends, *self.outputs)


def plan(dense: ModelProto, sparse: ModelProto, layers: Iterable[Layer], feeds: Feeds, runtime: RuntimeOptions) -> Distillation:
    """Finds what can be refined.

    Args:
        dense: the model the outputs are held against.
        sparse: the model to refine; its tensors have the dense one's names.
        layers: of the sparse model.
        feeds: one sample, or the smallest batch there is.
        runtime: how the sparse model is run on it once.

    Raises:
        ModelError: no parameter can be refined, or the graph cannot be raised to the gradients' operator set.
    """
    stored = Graph(sparse)
    found = [p for p in parameters(stored, layers) if stored.stored(p.tensor).dtype == np.float32]
    dense, sparse = (raise_opset(model, OPSET) for model in (dense, sparse))
    student = as_inputs(sparse, [p.tensor for p in found])
    reach, known = Reach(Graph(student)), Graph(dense).producers
    trace = traced(student, {**feeds, **{p.tensor: stored.stored(p.tensor) for p in found}}, runtime)
    moving = reach.dependents(p.tensor for p in found)
    shared = {name for name in moving if name in known and trace.dtypes.get(name) == np.float32}
    ends = [name for name in block_ends(reach.graph, trace.shapes) if name in shared]
    outputs = {value.name: None for value in sparse.graph.output if value.name in shared}
    walls = []
    for wall, names in _walls(reach, moving):
        walls.append(wall)
        outputs.update({name: None for name in names if name in shared})
    reached = reach.sources([*ends, *outputs])
    chosen = tuple(p for p in found if p.tensor in reached)
    if not chosen:
        reasons = "; ".join(f"{w.node}: {w.reason}" for w in walls[:3]) or "its outputs do not depend on its prunable layers"
        raise ModelError(f"nothing can be refined ({reasons})")
    kept = tuple(name for name in ends if name not in outputs)
    student = as_inputs(sparse, [p.tensor for p in chosen])
    return Distillation(dense, student, chosen, kept, tuple(outputs), tuple(walls), trace.nbytes(reach.graph.producers))


@dataclass(frozen=True)
class Outlook:
    """How far one layer's gradient would come from: `stopped` are the walls between it and the outputs."""

    layer: str
    reaches_outputs: bool
    stopped: tuple[Wall, ...]


def outlook(model: ModelProto, layers: Sequence[Layer]) -> list[Outlook]:
    """What refinement could do for each layer, without data.

    Raises:
        ModelError: the graph cannot be raised to the gradients' operator set.
    """
    weights = {p.layer: p.tensor for p in parameters(Graph(model), layers) if p.is_weight}
    graph = Graph(as_inputs(raise_opset(model, OPSET), weights.values()))
    reach = Reach(graph)
    moving = reach.dependents(weights.values())
    from_outputs = reach.sources(graph.outputs & moving)
    walls = _walls(reach, moving)
    behind = [(wall, reach.sources(moving.intersection(names))) for wall, names in walls]
    return [
        Outlook(name, weight in from_outputs, tuple(wall for wall, sources in behind if weight in sources))
        for name, weight in weights.items()
    ]


def _walls(reach: Reach, moving: set[str]) -> list[tuple[Wall, list[str]]]:
    """Nodes that gradients do not pass though what they read moves, and what they read; measuring a shape stops nothing."""
    found = []
    for node in reach.graph.model.graph.node:
        reason = reach.obstacle(node)
        if reason is not None and node.op_type not in MEASURES and not moving.isdisjoint(read := reads(node)):
            found.append((Wall(display_name(node), reason), read))
    return found


def opened(model: ModelProto, runtime: RuntimeOptions, what: str) -> Session:
    """A session of a model that refinement made.

    Raises:
        ModelError: it is too large for one message, or ONNX Runtime cannot load it.
    """
    return Session(serialized(model, what, "refinement is for smaller models"), runtime, what=what)


def showing(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """A copy whose outputs are these tensors, without what they do not need."""
    shown = deepcopy(model)
    refill(shown.graph.output, [ValueInfoProto(name=name) for name in names])
    return without_unused(shown)


def traced(model: ModelProto, feeds: Feeds, runtime: RuntimeOptions) -> Trace:
    """Shapes of every tensor of a model on a batch."""

    def run(exposed: ModelProto, given: Feeds, names: Sequence[str]) -> Mapping[str, Array]:
        return opened(exposed, runtime, "the sparse model with all its tensors").run(given, names)

    return Reach(Graph(model)).trace(feeds, run)


@dataclass(frozen=True, eq=False)
class Step:
    """The step for one shape of batch: its outputs are `loss`, then the gradients of the parameters in their order."""

    model: ModelProto
    loss: str
    gradients: tuple[str, ...]


def step(d: Distillation, trace: Trace) -> Step:
    """Builds the step; the trace is the sparse model's on that shape of batch."""
    nodes: list[NodeProto] = []
    shapes, dtypes = dict(trace.shapes), dict(trace.dtypes)

    def op(kind: str, name: str, inputs: Sequence[str], shape: tuple[int, ...]) -> str:
        node = helper.make_node(kind, list(inputs), [LOSS + name], name=LOSS + name)
        if kind.startswith("Reduce"):
            node.attribute.append(helper.make_attribute("keepdims", 0))
        nodes.append(node)
        shapes[LOSS + name], dtypes[LOSS + name] = shape, np.dtype(np.float32)
        return LOSS + name

    def distance(name: str) -> str:
        shape = trace.shapes[name]
        target = DENSE + name
        shapes[target], dtypes[target] = shape, np.dtype(np.float32)
        gap = op("Sub", f"{name}/gap", [name, target], shape)
        gaps = op("ReduceSum", f"{name}/gaps", [op("Mul", f"{name}/squares", [gap, gap], shape)], ())
        energy = op("ReduceSumSquare", f"{name}/energy", [target], ())
        return op("Div", f"{name}/distance", [gaps, op("Add", f"{name}/norm", [energy, LOSS + "tiny"], ())], ())

    parts = []
    for group, names in (("ends", d.ends), ("outputs", d.outputs)):
        if names:
            total = op("Sum", group, [distance(name) for name in names], ())
            parts.append(op("Mul", f"{group}/mean", [total, f"{LOSS}{group}/share"], ()))
    loss = op("Sum", "loss", parts, ())

    constants = {"tiny": TINY, **{f"{g}/share": 1 / len(n) for g, n in (("ends", d.ends), ("outputs", d.outputs)) if n}}
    model = deepcopy(d.sparse)
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.float32), LOSS + n) for n, v in constants.items())
    shapes.update({LOSS + n: () for n in constants})
    dtypes.update({LOSS + n: np.dtype(np.float32) for n in constants})
    model.graph.node.extend(nodes)
    built = gradient_model(model, loss, d.names, Trace(shapes, dtypes, trace.values))
    first, *gradients = (value.name for value in built.graph.output)
    return Step(_beside(built, d), first, tuple(gradients))


def _beside(built: ModelProto, d: Distillation) -> ModelProto:
    """The step with the dense network in front of it, which feeds it the features it aims at."""
    teacher = onnx.compose.add_prefix(showing(d.dense, d.aims), DENSE)
    shared = [helper.make_node("Identity", [i.name], [DENSE + i.name]) for i in Graph(d.dense).inputs]
    both = deepcopy(built)
    refill(both.graph.node, [*shared, *teacher.graph.node, *built.graph.node])
    both.graph.initializer.extend(teacher.graph.initializer)
    both.functions.extend(teacher.functions)
    both.ir_version = max(both.ir_version, 8)  # initializers need not be inputs, and functions may be local
    imports: dict[str, int] = {}
    for entry in (*teacher.opset_import, *built.opset_import):
        domain = "" if entry.domain in STANDARD_DOMAINS else entry.domain
        imports[domain] = max(entry.version, imports.get(domain, 1))
    refill(both.opset_import, [helper.make_opsetid(domain, version) for domain, version in imports.items()])
    return both
