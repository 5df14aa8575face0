"""The layers of a floating-point model that could be sparse operators, with all that such an operator takes in.

Conv [-> Add] [-> Relu | Clip]                        becomes one SparseConv[Add][Relu|Clip]
Gemm | MatMul [-> Add bias] [-> Add] [-> Relu | Clip]   becomes one SparseGemm[Add][Relu|Clip]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from onnx import FunctionProto, ModelProto, NodeProto

from relrep_onnx.graph import Graph
from relrep_onnx.graph.index import attribute, display_name, ints, is_standard, number, reads
from relrep_onnx.graph.operators import OPERATORS, NotPrunable
from relrep_onnx.kernels import functions
from relrep_onnx.kernels.costs import Kind, Work
from relrep_onnx.types import Array, Contraction

QUAD_FILL: Final = 1.33
"""As in the kernels: up to how many weights per nonzero four output channels are computed together."""
STEP: Final = 64
"""A size that a network halves and doubles again still fits it when it is longer by this."""
LARGEST: Final = float(np.finfo(np.float32).max)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Operator:
    """What replaces a layer: the function, its inputs (names, or arrays to store, by what they are), its node's attributes."""

    body: FunctionProto
    inputs: Sequence[str | tuple[str, Array]]
    attributes: Mapping[str, Any]


@dataclass(eq=False)
class Candidate(ABC):
    """A layer that could be sparse: its nodes (the product first), its work where shapes are known, and its neighbours.

    `neighbours` are the convolutions whose results reach it without another in between, with the elements that travel.
    """

    name: str
    weight: Array
    nodes: list[NodeProto]
    work: Work | None = field(default=None, kw_only=True)
    neighbours: dict[str, float] = field(default_factory=dict, kw_only=True)

    @property
    def density(self) -> float:
        """Share of nonzeros."""
        return float(np.count_nonzero(self.weight)) / self.weight.size

    @property
    def sources(self) -> tuple[str, ...]:
        """The activations it reads."""
        return (self.nodes[0].input[0],)

    @abstractmethod
    def operator(self, opset: int) -> Operator:
        """What it becomes, in a model of this opset."""


@dataclass(eq=False)
class FloatLayer(Candidate):
    """A floating-point layer; `attributes` are those of its operator besides the weight's shape."""

    bias: Array
    attributes: dict[str, Any]
    residual: str = ""
    activation: functions.Activation = ""

    @property
    def sources(self) -> tuple[str, ...]:
        """The activations it reads."""
        return tuple(filter(None, (self.nodes[0].input[0], self.residual)))

    def operator(self, opset: int) -> Operator:
        """What it becomes, in a model of this opset."""
        family: functions.Family = "SparseConv" if self.nodes[0].op_type == "Conv" else "SparseGemm"
        body = functions.function(family, opset, adds=bool(self.residual), activation=self.activation)
        values, gaps = functions.encode(self.weight)
        x, *residual = self.sources
        inputs: list[str | tuple[str, Array]] = [x, ("values", values), ("gaps", gaps), ("bias", self.bias), *residual]
        return Operator(body, inputs, {"weight_shape": self.weight.shape, **self.attributes})


def other_sizes(model: ModelProto, given: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's inputs in which open dimensions are longer than in `given`, by as much only where they share a name."""
    steps: dict[object, int] = {}
    sizes = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        known = given.get(value.name, tuple(dim.dim_value or 1 for dim in dims))
        longer = [
            0 if dim.HasField("dim_value") else steps.setdefault(dim.dim_param or (value.name, axis), (len(steps) + 1) * STEP)
            for axis, dim in enumerate(dims)
        ]
        sizes[value.name] = tuple(size + step for size, step in zip(known, longer, strict=True))
    return sizes


def float_layers(model: ModelProto, shapes: Shapes, others: Shapes) -> list[FloatLayer]:
    """All of a model whose BatchNormalization is folded; works and neighbours as far as shapes are known.

    `others` are the shapes at `other_sizes`: the kernels add a residual of the output's shape only, at any batch.
    """
    graph = Graph(model)
    found: list[FloatLayer] = []
    taken: set[str] = set()  # outputs of nodes that a candidate holds
    for node in model.graph.node:
        if not is_standard(node) or (set(node.output) & taken):
            continue
        candidate = _convolution(graph, node) if node.op_type == "Conv" else _product(graph, node)
        if candidate is None:
            continue
        _take_followers(graph, candidate, (shapes, others), taken)
        quads = _shares_positions(candidate.weight)
        candidate.work = work_of(candidate, shapes, density=candidate.density, quads=quads)
        taken.update(name for member in candidate.nodes for name in member.output)
        found.append(candidate)
    find_neighbours(graph, found, shapes)
    return found


def _constant(graph: Graph, node: NodeProto, slot: int) -> Array | None:
    """A float32 constant input."""
    value = graph.value(node.input[slot]) if slot < len(node.input) and node.input[slot] else None
    return value if value is not None and value.dtype == np.float32 and np.isfinite(value).all() else None


def _convolution(graph: Graph, node: NodeProto) -> FloatLayer | None:
    weight, bias = _constant(graph, node, 1), _constant(graph, node, 2)
    if weight is None or weight.ndim != 4 or (bias is None and len(node.input) > 2 and node.input[2]):
        return None
    if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    bias = np.zeros(weight.shape[0], np.float32) if bias is None else bias
    return FloatLayer(display_name(node), weight, [node], bias, conv_window(node))


def conv_window(node: NodeProto) -> dict[str, Any]:
    """Strides, pads, dilations and groups of a 2-D convolution."""
    return {
        "strides": ints(node, "strides", (1, 1)),
        "pads": ints(node, "pads", (0, 0, 0, 0)),
        "dilations": ints(node, "dilations", (1, 1)),
        "group": int(number(node, "group", 1)),
    }


def _product(graph: Graph, node: NodeProto) -> FloatLayer | None:
    if node.op_type not in ("Gemm", "MatMul"):
        return None
    weight = _constant(graph, node, 1)
    if weight is None or weight.ndim != 2 or graph.value(node.input[0]) is not None:
        return None
    try:
        form = OPERATORS[node.op_type].form(node, weight.shape, 1)
    except NotPrunable:
        return None
    if form.view != Contraction(-1):
        return None
    bias: Array = np.zeros(form.rows, np.float32)
    if len(node.input) > 2 and node.input[2]:
        given = _constant(graph, node, 2)
        if given is None or not (given.size == 1 or given.shape[-1] == given.size == bias.size):
            return None
        bias = bias + given.reshape(-1) * np.float32(form.bias_scale)
    return FloatLayer(display_name(node), form.to_matrix(weight) * np.float32(form.scale), [node], bias, {})


def only_reader(graph: Graph, name: str) -> NodeProto | None:
    """The one node that reads a tensor, where there is one and nothing else sees it."""
    readers = graph.consumers.get(name, [])
    if name in graph.outputs or len(readers) != 1 or readers[0][1] < 0 or not is_standard(readers[0][0]):
        return None
    return readers[0][0]


def _take_followers(graph: Graph, candidate: FloatLayer, sizes: Sequence[Shapes], taken: set[str]) -> None:
    """Extends a candidate by a constant Add (products), a residual Add, and an activation."""

    def following() -> NodeProto | None:
        node = only_reader(graph, candidate.nodes[-1].output[0])
        return None if node is None or node.output[0] in taken else node

    node = following()
    if node is not None and node.op_type == "Add" and candidate.nodes[0].op_type != "Conv":
        own = candidate.nodes[-1].output[0]
        shift = _constant(graph, node, 1 - list(node.input).index(own))
        rank = max(1, len(sizes[0].get(own, ())))  # a shift of more axes would give the sum more
        if shift is not None and shift.ndim <= rank and shift.shape[-1:] == (shift.size,) == candidate.bias.shape:
            candidate.bias = candidate.bias + shift.reshape(-1)
            candidate.nodes.append(node)
            node = following()
    if node is not None and node.op_type == "Add" and len(set(node.input)) == 2:
        own = candidate.nodes[-1].output[0]
        other = node.input[1 - list(node.input).index(own)]
        same = all(own in shapes and shapes[own] == shapes.get(other) for shapes in sizes)
        if same and other not in graph.constant_names:
            candidate.residual = other
            candidate.nodes.append(node)
            node = following()
    if node is not None and node.op_type == "Relu":
        candidate.activation = "Relu"
        candidate.nodes.append(node)
    elif node is not None and node.op_type == "Clip":
        bounds = clip_bounds(graph, node)
        if bounds is not None:
            candidate.activation = "Clip"
            candidate.attributes |= {"min": max(bounds[0], -LARGEST), "max": min(bounds[1], LARGEST)}
            candidate.nodes.append(node)


def clip_bounds(graph: Graph, clip: NodeProto) -> tuple[float, float] | None:
    """A Clip's bounds, infinite where it has none; None where they are not stored, or out of order."""
    bounds = [-math.inf, math.inf]
    for slot, name in enumerate(list(clip.input)[1:3]):
        value = graph.value(name) if name else None
        if value is not None:
            bounds[slot] = float(value.reshape(()))
        elif name:
            return None
    low, high = bounds
    return (low, high) if low <= high else None  # NaN neither


def work_of(candidate: Candidate, shapes: Shapes, *, density: float, quads: bool) -> Work | None:
    """What a layer computes for one sample, where shapes are known."""
    node, weight = candidate.nodes[0], candidate.weight
    into, out = shapes.get(node.input[0]), shapes.get(node.output[0])
    if into is None or out is None:
        return None
    kind: Kind = "product"
    if node.op_type == "Conv":
        kind = "depthwise" if weight.shape[1] == 1 else "pointwise" if weight.shape[2:] == (1, 1) else "conv"
    outputs = float(np.prod(out))
    return Work(kind, outputs * weight[0].size, outputs, float(np.prod(into)), density, quads)


def _shares_positions(weight: Array) -> bool:
    """Whether the kernels compute four output channels together."""
    matrix = weight.reshape(weight.shape[0], -1) != 0
    if matrix.shape[0] % 4 or (weight.ndim == 4 and weight.shape[1] == 1):
        return False
    shared = np.count_nonzero(matrix.reshape(-1, 4, matrix.shape[1]).any(axis=1))
    return bool(4 * shared <= QUAD_FILL * np.count_nonzero(matrix))


def find_neighbours(graph: Graph, candidates: Sequence[Candidate], shapes: Shapes) -> None:
    """Fills in the neighbours of every convolution."""
    owner = {name: c for c in candidates for member in c.nodes for name in member.output}

    def sources(name: str) -> set[str]:
        found, seen, waiting = set(), set(), [name]
        while waiting:
            name = waiting.pop()
            if name in owner:
                found.add(owner[name].name)
            elif name in graph.producers and name not in seen:
                seen.add(name)
                waiting.extend(reads(graph.producers[name]))
        return found

    convolutions = {c.name for c in candidates if c.nodes[0].op_type == "Conv"}
    for candidate in candidates:
        if candidate.name not in convolutions:
            continue
        for name in candidate.sources:
            for source in (sources(name) & convolutions) - {candidate.name}:
                candidate.neighbours[source] = float(np.prod(shapes.get(name, (0,))))
