"""What a gradient rule writes on: the nodes of the gradient graph, and the shapes of everything the forward graph computed.

Shapes are those of one kind of batch (`Trace`), so a rule is plain arithmetic on tuples, and nothing of the gradient graph has to
compute a shape.  A rule states every gradient it can; what nobody asked for is removed at the end (`reverse.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from onnx import NodeProto, TensorProto, helper, numpy_helper

from relrep_onnx.types import Array

PREFIX = "gradient/"
END = int(np.iinfo(np.int64).max)
"""As a bound of a slice: to the end, whatever the length."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Shape and dtype of every tensor of a graph on one kind of batch, and the values of those that depend on shapes only."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype[np.generic]]
    values: Mapping[str, Array]

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of some of the tensors together."""
        return sum(math.prod(self.shapes[name]) * self.dtypes[name].itemsize for name in names if name in self.shapes)


class Tape:
    """Collects the gradient graph.  Names of tensors are all that rules pass around."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self._gradients: dict[str, list[str]] = {}
        self._constants: dict[tuple[object, ...], str] = {}

    # What the forward graph is.

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a forward tensor."""
        return self._trace.shapes[name]

    def rank(self, name: str) -> int:
        """Number of its axes."""
        return len(self.shape(name))

    def dtype(self, name: str) -> np.dtype[np.generic]:
        """Its dtype."""
        return self._trace.dtypes[name]

    def ints(self, node: NodeProto, slot: int) -> list[int] | None:
        """The values of a node's input that depends on shapes only, such as axes; None where the node has none."""
        if len(node.input) <= slot or not node.input[slot]:
            return None
        return [int(v) for v in self._trace.values[node.input[slot]].reshape(-1)]

    # What a rule writes.

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Adds a node with several outputs."""
        number = len(self.nodes)
        names = [f"{PREFIX}{kind}_{number}" + f"_{i}" * (i > 0) for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"{PREFIX}{kind}_{number}", **attributes))
        return names

    def const(self, value: object, dtype: DTypeLike) -> str:
        """A stored tensor, kept once for equal values."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"{PREFIX}constant_{len(self._constants)}"
            self.tensors[name] = numpy_helper.from_array(array, name)
            self._constants[key] = name
        return self._constants[key]

    def like(self, value: object, name: str) -> str:
        """A stored tensor in the dtype of a forward tensor."""
        return self.const(value, self.dtype(name))

    def cast(self, a: str, like: str) -> str:
        """Cast to the dtype of a forward tensor."""
        return self.op("Cast", a, to=helper.np_dtype_to_tensor_dtype(self.dtype(like)))

    def add(self, a: str, b: str) -> str:
        """A + b."""
        return self.op("Add", a, b)

    def sub(self, a: str, b: str) -> str:
        """A - b."""
        return self.op("Sub", a, b)

    def mul(self, a: str, b: str) -> str:
        """A * b."""
        return self.op("Mul", a, b)

    def div(self, a: str, b: str) -> str:
        """A / b."""
        return self.op("Div", a, b)

    def neg(self, a: str) -> str:
        """-a."""
        return self.op("Neg", a)

    def where(self, condition: str, a: str, b: str) -> str:
        """A where the condition holds, else b."""
        return self.op("Where", condition, a, b)

    def transpose(self, a: str, perm: Sequence[int]) -> str:
        """Axes in another order."""
        return a if list(perm) == list(range(len(perm))) else self.op("Transpose", a, perm=list(perm))

    def reshape(self, a: str, shape: Sequence[int]) -> str:
        """The same elements in another shape."""
        return self.op("Reshape", a, self.const(list(shape), np.int64), allowzero=1)

    def expand(self, a: str, shape: Sequence[int]) -> str:
        """Broadcast to a shape."""
        return self.op("Expand", a, self.const(list(shape), np.int64))

    def sum(self, a: str, axes: Sequence[int], *, keepdims: bool = False) -> str:
        """Summed over axes."""
        return self.op("ReduceSum", a, self.const(list(axes), np.int64), keepdims=int(keepdims)) if axes else a

    def slice(self, a: str, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]) -> str:
        """A strided part."""
        return self.op("Slice", a, *(self.const(list(part), np.int64) for part in (starts, ends, axes, steps)))

    def pad(self, a: str, begins: Sequence[int], ends: Sequence[int], like: str) -> str:
        """Zeros around it; negative numbers crop."""
        cropped = [i for i, pair in enumerate(zip(begins, ends, strict=True)) if min(pair) < 0]
        if cropped:
            starts = [max(0, -begins[i]) for i in cropped]
            stops = [-max(0, -ends[i]) or END for i in cropped]
            a = self.slice(a, starts, stops, cropped, [1] * len(cropped))
        pads = [max(0, n) for n in (*begins, *ends)]
        return self.op("Pad", a, self.const(pads, np.int64), self.like(0, like)) if any(pads) else a

    def sum_to(self, a: str, shape: Sequence[int], target: str, seen: Sequence[int] | None = None) -> str:
        """The gradient of broadcasting: a value summed to the shape of a forward tensor, which was broadcast as `seen`."""
        goal = self.shape(target)
        if tuple(shape) == goal:
            return a
        seen = goal if seen is None else seen
        ahead = len(shape) - len(seen)
        axes = [i for i in range(len(shape)) if i < ahead or (seen[i - ahead] == 1 and shape[i] != 1)]
        return self.reshape(self.sum(a, axes), goal)

    # How gradients meet.

    def receive(self, name: str, gradient: str) -> None:
        """Another share of a forward tensor's gradient."""
        self._gradients.setdefault(name, []).append(gradient)

    def gradient(self, name: str) -> str | None:
        """The whole gradient of a forward tensor, or None where nothing reached it."""
        shares = self._gradients.get(name)
        if not shares:
            return None
        while len(shares) > 1:
            shares[:2] = [self.add(shares[0], shares[1])]
        return shares[0]
