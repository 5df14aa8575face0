"""Look-ups over one ONNX graph: who makes a tensor, who reads it, which constant is behind it.

A weight often sits behind a few nodes that only move or relabel its elements (`Identity`, `Cast`, `Transpose`, `Reshape`).
Each is a bijection on elements, so the weight a node sees and the tensor that is stored hold the same numbers in another order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from relrep_onnx.graph.tensors import is_outside, place_of, whole
from relrep_onnx.types import Array, ModelError

PASS_THROUGH: Final = frozenset({"Identity", "Cast", "Transpose", "Reshape"})
LONGEST_CHAIN: Final = 100
RANDOM: Final = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"})
STANDARD_DOMAINS: Final = ("", "ai.onnx")


def is_standard(node: NodeProto) -> bool:
    """True for an operator of the ONNX standard itself."""
    return node.domain in STANDARD_DOMAINS


def attribute(node: NodeProto, name: str, default: object = None) -> object:
    """The value of a node's attribute, or the default where it is absent."""
    for item in node.attribute:
        if item.name == name:
            return helper.get_attribute_value(item)
    return default


def ints(node: NodeProto, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """An attribute that is a list of integers."""
    value = attribute(node, name)
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) and value else default


def number(node: NodeProto, name: str, default: float) -> float:
    """An attribute that is one number."""
    value = attribute(node, name, default)
    return float(value) if isinstance(value, int | float) else default


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs a control-flow node holds."""
    for item in node.attribute:
        yield from graphs_in(item)


def graphs_in(item: AttributeProto) -> Iterable[GraphProto]:
    """The graphs an attribute holds."""
    if item.type == AttributeProto.GRAPH:
        return (item.g,)
    return item.graphs if item.type == AttributeProto.GRAPHS else ()


def captured(graph: GraphProto) -> set[str]:
    """Names that a subgraph reads from the graphs around it."""
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    needed: set[str] = set()
    for node in graph.node:
        needed |= set(reads(node)) - known
        known |= set(node.output)
    return (needed | {value.name for value in graph.output} - known) - {""}


def reads(node: NodeProto) -> list[str]:
    """Every tensor a node reads, captured names of its subgraphs included."""
    names = [name for name in node.input if name]
    for inner in subgraphs(node):
        names.extend(sorted(captured(inner)))
    return names


def with_bodies(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, each followed by those of the graphs inside it."""
    for node in nodes:
        yield node
        for inner in subgraphs(node):
            yield from with_bodies(inner.node)


def leading_to(nodes: Sequence[NodeProto], names: Iterable[str], stop: Set[str] = frozenset()) -> list[NodeProto]:
    """Those of the nodes that the tensors depend on, in their order; not beyond the tensors in `stop`."""
    wanted, chosen = set(names) - stop, []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            chosen.append(node)
            wanted |= set(reads(node)) - stop
    return chosen[::-1]


def defined(graph: GraphProto) -> Iterator[str]:
    """Names of the tensors that a graph itself makes or stores."""
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    yield from (name for node in graph.node for name in node.output if name)


def all_defined(graph: GraphProto) -> Iterator[str]:
    """The same with the graphs inside it."""
    yield from defined(graph)
    for node in with_bodies(graph.node):
        for inner in subgraphs(node):
            yield from defined(inner)


def refill(field: Any, items: Iterable[Any]) -> None:
    """Gives a repeated field of a message other items, which may be some of its own."""
    kept = list(items)
    del field[:]
    field.extend(kept)


def display_name(node: NodeProto) -> str:
    """A node's name, or its first output where it has none."""
    return node.name or next((name for name in node.output if name), node.op_type)


@dataclass(frozen=True)
class Constant:
    """A stored tensor and the pass-through nodes between it and its reader, in order."""

    root: str
    steps: tuple[NodeProto, ...]


class Graph:
    """A model with its look-ups; build a new one after changing nodes."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.tensors: dict[str, TensorProto] = {}
        self.producers: dict[str, NodeProto] = {}
        self.consumers: dict[str, list[tuple[NodeProto, int]]] = {}
        self._nodes: list[NodeProto] = []
        self._constant_names: set[str] | None = None
        for name in self._enter(model.graph):
            raise ModelError(f"two nodes write the tensor {name!r}; the graph is not valid ONNX")
        self.outputs = {value.name for value in model.graph.output}
        self.inputs = [value for value in model.graph.input if value.name not in self.tensors]

    def within(self, body: GraphProto) -> Graph:
        """Look-ups inside a subgraph, where names of the graphs around it are known too; readers and outputs are its own."""
        inner = copy.copy(self)
        inner.tensors, inner.producers, inner.consumers = dict(self.tensors), dict(self.producers), {}
        inner._nodes = list(self._nodes)
        inner._constant_names = None
        inner.outputs = {value.name for value in body.output}
        list(inner._enter(body))
        return inner

    def _enter(self, graph: GraphProto) -> Iterator[str]:
        """Takes a graph's names into the look-ups, and gives those that were taken."""
        self.tensors.update((tensor.name, tensor) for tensor in graph.initializer)
        self._nodes.extend(graph.node)
        for node in graph.node:
            for name in filter(None, node.output):
                if name in self.producers:
                    yield name
                self.producers[name] = node
            for slot, name in enumerate(node.input):
                if name:
                    self.consumers.setdefault(name, []).append((node, slot))
            for inner in subgraphs(node):
                for name in captured(inner):
                    self.consumers.setdefault(name, []).append((node, -1))
            if node.op_type == "Constant" and is_standard(node):
                value = attribute(node, "value")
                if isinstance(value, TensorProto):
                    self.tensors[node.output[0]] = value

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return max((o.version for o in self.model.opset_import if o.domain in STANDARD_DOMAINS), default=1)

    def constant(self, name: str) -> Constant | None:
        """The stored tensor behind `name`, or None where it is computed some other way, or behind too long a chain."""
        steps: list[NodeProto] = []
        while name not in self.tensors:
            if len(steps) == LONGEST_CHAIN:
                return None
            node = self.producers.get(name)
            if node is None or node.op_type not in PASS_THROUGH or not is_standard(node) or not node.input:
                return None
            if node.op_type == "Reshape" and self._reshape_target(node) is None:
                return None
            steps.append(node)
            name = node.input[0]
        return Constant(name, tuple(reversed(steps)))

    def value(self, name: str) -> Array | None:
        """The constant array a reader of `name` sees, or None where it is computed."""
        constant = self.constant(name)
        if constant is None:
            return None
        return self.through(constant.steps, self.stored(constant.root), cast=True)

    def stored(self, root: str) -> Array:
        """A stored tensor as an array."""
        try:
            return numpy_helper.to_array(whole(self.tensors[root]))
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"the stored tensor {root!r} cannot be read: {error}") from error

    def bytes_of(self, root: str) -> int:
        """Bytes of a stored tensor, without reading what is still in its file."""
        tensor = self.tensors[root]
        return place_of(tensor).length if is_outside(tensor) else self.stored(root).nbytes

    def through(self, steps: tuple[NodeProto, ...], array: Array, *, cast: bool) -> Array:
        """Applies pass-through nodes to an array; `cast=False` moves elements only (used on index arrays)."""
        for node in steps:
            try:
                array = self._step(node, array, cast)
            except (ValueError, TypeError, LookupError) as error:
                what = f"{display_name(node)!r} ({node.op_type})"
                raise ModelError(f"{what} does not fit the constant it reads: {error}; export the model anew") from error
        return array

    def _step(self, node: NodeProto, array: Array, cast: bool) -> Array:
        if node.op_type == "Transpose":
            return array.transpose(ints(node, "perm", tuple(reversed(range(array.ndim)))))
        if node.op_type == "Reshape":
            target = self._reshape_target(node)
            if target is None:
                raise ValueError("the shape it gives is not constant itself")
            copies = not attribute(node, "allowzero", 0)  # a 0 then means: as long as this axis was
            return array.reshape([array.shape[i] if size == 0 and copies else size for i, size in enumerate(target)])
        if node.op_type == "Cast" and cast:
            return array.astype(helper.tensor_dtype_to_np_dtype(int(number(node, "to", TensorProto.FLOAT))))
        return array

    def _reshape_target(self, node: NodeProto) -> tuple[int, ...] | None:
        if len(node.input) < 2:
            return ints(node, "shape", ())
        constant = self.constant(node.input[1])
        if constant is None or constant.steps:
            return None
        return tuple(int(size) for size in self.stored(constant.root).reshape(-1))

    def readers(self, root: str) -> list[tuple[NodeProto | None, int]]:
        """Nodes that read a stored tensor, looking through pass-through nodes; None stands for the graph's own outputs."""
        found: list[tuple[NodeProto | None, int]] = []
        waiting = [root]
        while waiting:
            name = waiting.pop(0)
            if name in self.outputs:
                found.append((None, -1))
            for node, slot in self.consumers.get(name, []):
                if node.op_type in PASS_THROUGH and is_standard(node) and slot == 0 and node.output:
                    waiting.append(node.output[0])
                else:
                    found.append((node, slot))
        return found

    @property
    def constant_names(self) -> set[str]:
        """Every tensor that depends on stored tensors only, not on the inputs."""
        if self._constant_names is None:
            known = set(self.tensors)
            for node in self._nodes:
                if node.op_type not in RANDOM and all(name in known for name in reads(node)):
                    known |= set(filter(None, node.output))
            self._constant_names = known
        return self._constant_names

    def fresh(self, base: str) -> str:
        """A name that neither a tensor nor a node has."""
        nodes = (node.name for node in with_bodies(self.model.graph.node))
        used = {*all_defined(self.model.graph), *self.tensors, *nodes}
        name, number = base, 1
        while name in used:
            number += 1
            name = f"{base}_{number}"
        return name


def tensor_like(array: Array, tensor: TensorProto, layer: str) -> TensorProto:
    """Encodes an array with a stored tensor's name and dtype; refuses values the dtype cannot hold."""
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array).astype(dtype)
        stored += stored.dtype.type(0)  # turns -0.0 into +0.0
    if not np.isfinite(stored.astype(np.float64)).all():
        worst = float(np.abs(array).max())
        raise ModelError(
            f"layer {layer!r}: a repaired value of magnitude {worst:.4g} does not fit {np.dtype(dtype).name}; "
            "use another repair or exclude the layer"
        )
    return onnx.numpy_helper.from_array(stored, tensor.name)
