"""How far a gradient gets: which nodes it passes, which stop it and why, and what every tensor looks like on a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto

from relrep_onnx.gradient.table import RULES
from relrep_onnx.gradient.tape import Trace
from relrep_onnx.graph.index import RANDOM, Graph, is_standard, reads, refill
from relrep_onnx.types import Array, Feeds

MEASURES = frozenset({"Shape", "Size"})


class Reach:
    """A graph as gradients see it: walls, and tensors that depend on shapes only."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.static = set(graph.tensors)
        for node in graph.model.graph.node:
            measured = node.op_type in MEASURES and is_standard(node)
            if measured or (node.op_type not in RANDOM and self.static.issuperset(reads(node))):
                self.static.update(filter(None, node.output))

    def obstacle(self, node: NodeProto) -> str | None:
        """Why no gradient passes a node, or None where one does."""
        rule = RULES.get(node.op_type) if is_standard(node) else None
        if rule is None:
            kind = node.op_type if is_standard(node) else f"{node.domain}.{node.op_type}"
            return f"no gradient rule for {kind}"
        moving = [node.input[slot] for slot in rule.shaping if slot < len(node.input) and node.input[slot] not in self.static]
        if any(moving):
            return f"its {next(filter(None, moving))!r} depends on data"
        return rule.refuses(node)

    def dependents(self, wrt: Iterable[str]) -> set[str]:
        """Tensors that depend on others by nodes that gradients pass; those others included."""
        found = set(wrt)
        for node in self.graph.model.graph.node:
            if not found.isdisjoint(node.input) and self.obstacle(node) is None:
                found.update(filter(None, node.output))
        return found

    def sources(self, losses: Iterable[str]) -> set[str]:
        """Tensors that a gradient of others gets to; those others included."""
        found = set(losses)
        for node in reversed(self.graph.model.graph.node):
            if not found.isdisjoint(node.output) and self.obstacle(node) is None:
                found.update(filter(None, node.input))
        return found

    def trace(self, feeds: Feeds, run: Callable[[ModelProto, Feeds, Sequence[str]], Mapping[str, Array]]) -> Trace:
        """Shapes of every tensor on a batch, by running the graph once with all of them as outputs.

        Args:
            feeds: the inputs by name.
            run: runs a model on them and gives the named outputs.
        """
        exposed = deepcopy(self.graph.model)
        names = [name for node in exposed.graph.node for name in node.output if name]
        refill(exposed.graph.output, [ValueInfoProto(name=name) for name in names])
        seen = {**feeds, **{name: self.graph.stored(name) for name in self.graph.tensors}, **run(exposed, feeds, names)}
        arrays = {name: np.asarray(value) for name, value in seen.items() if not isinstance(value, list | dict)}
        values = {name: array for name, array in arrays.items() if name in self.static and array.dtype.kind in "iu"}
        shapes = {name: array.shape for name, array in arrays.items()}
        return Trace(shapes, {name: array.dtype for name, array in arrays.items()}, values)
