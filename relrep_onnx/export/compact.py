"""`compact`: weights stored as gaps and values, unpacked by standard operators when the file is loaded.

A tensor w of n elements, k of them not zero, at i_1 < i_2 < ... in row-major order:

    gaps uint8[m]     i_1, i_2 - i_1, ...; one over 255 is cut into 255s, each with a value of zero
    values [m]        the elements there
    w = Reshape(ScatterElements(zeros[n], CumSum(Cast(gaps)), values), shape)

All inputs are constants, so ONNX Runtime computes w once while it loads the model.  With values of 2 or 1 bytes a Cast follows
them, and with int8 a Mul by one scale per channel, of the axis that loses least: `DequantizeLinear` would stay in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from relrep_onnx.export.forms import EXACT, Order, Product, Values
from relrep_onnx.graph import Graph, detach, raise_opset
from relrep_onnx.graph.index import all_defined, leading_to, refill
from relrep_onnx.kernels.functions import gaps_of
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Array, VerificationError

LEAST_OPSET: Final = 11
"""CumSum and ScatterElements."""
LEAST_SIZE: Final = 256
"""Elements of a tensor that is worth a look: below, the nodes alone take more bytes."""
LEVELS: Final = 127
"""Of int8 values, on each side of zero."""
SAFE: Final = 0.99
"""Of the largest number: the scale of the rest may be rounded up."""
TOLERANCE: Final[Mapping[Values, float]] = {"float32": EXACT, "float16": 0.01, "int8": 0.1}
KINDS: Final = frozenset({"float32", "float16", "float64", "int8", "uint8"})


@dataclass(frozen=True, eq=False)
class Packed:
    """One tensor's way to be stored: `values` as they go to disk, and the array that readers will see."""

    gaps: Array
    values: Array
    scale: Array | None
    result: Array


def compact(model: ModelProto, order: Order) -> Product:
    """Packs every stored tensor that gets smaller by it.

    Raises:
        VerificationError: ONNX Runtime unpacks a tensor to other bits than were packed.
        ModelError: the operator set is older than 11 and cannot be raised.
    """
    copy = deepcopy(raise_opset(model, LEAST_OPSET))
    graph = Graph(copy)
    writer = _Writer(graph)
    expected: dict[str, Array] = {}
    notes = []
    for name, tensor in graph.tensors.items():
        array = graph.stored(name)
        if array.size < LEAST_SIZE or array.dtype.name not in KINDS:
            continue
        values = order.values
        if not fits(array, values):
            notes.append(f"tensor {name!r} holds values beyond {values}; it keeps its own type")
            values = "float32"
        packed = pack(array, values)
        nodes, tensors = writer.unpacking(name, packed)
        added = sum(item.ByteSize() + 4 for item in (*nodes, *tensors))
        if added < tensor.ByteSize():
            expected[name] = packed.result
            writer.keep(nodes, tensors)
    if not expected:
        notes.append("nothing is sparse enough to get smaller; the file is the dense one")
        return Product(model, EXACT, tuple(notes))
    detach(copy, expected)
    refill(copy.graph.node, [*writer.nodes, *copy.graph.node])
    copy.graph.initializer.extend(writer.tensors)
    copy.ir_version = max(copy.ir_version, 4)  # initializers that are no inputs
    check_unpacking(copy, expected, order.runtime)
    return Product(copy, TOLERANCE[order.values], tuple(notes))


def fits(array: Array, values: Values) -> bool:
    """Whether floats can be stored as these values: none is NaN, or beyond float16, or near the end of its own type (int8)."""
    if array.dtype.kind != "f" or values == "float32":
        return True
    limit = np.finfo(np.float16).max if values == "float16" else SAFE * np.finfo(min(array.dtype, np.dtype(np.float32))).max
    return bool(np.abs(array).max(initial=0) <= limit)


def pack(array: Array, values: Values = "float32") -> Packed:
    """Gaps and values of an array; what is not zero by its bits is kept, -0.0 and NaN too.

    Args:
        array: float[...], or int8 or uint8, which always keep their type.
        values: the type to store floats in, which they must fit; float32 stands for the array's own.
    """
    scale = None
    if array.dtype.kind == "f" and values == "int8":
        stored, scale = to_int8(array)
        result = np.multiply(stored.astype(array.dtype), scale, dtype=array.dtype)
    elif array.dtype.kind == "f" and values == "float16" and array.dtype.itemsize > 2:
        stored = array.astype(np.float16)
        result = stored.astype(array.dtype)
    else:
        stored = result = array
    flat = np.ascontiguousarray(stored).reshape(-1)
    places = np.flatnonzero(flat.view(f"u{flat.dtype.itemsize}"))
    gaps, at = gaps_of(places)
    kept = np.zeros(len(gaps), flat.dtype)
    kept[at] = flat[places]
    return Packed(gaps, kept, scale, result)


def to_int8(array: Array) -> tuple[Array, Array]:
    """Rounds to int8 symmetrically, with one scale for all or for each index of one axis, whichever leaves the smallest error.

    Returns:
        int8 of the array's shape, and the scales, in the array's type, of a shape that broadcasts against it.
    """
    exact = array.astype(np.float64)
    axes = range(array.ndim)
    least, best = np.inf, (array, array)
    for kept in (None, *axes):
        peak = np.abs(exact).max(axis=tuple(axis for axis in axes if axis != kept), keepdims=True, initial=0.0)
        # An axis as long as half the tensor would store a scale per weight.
        if kept is not None and peak.size * 8 > array.size:
            continue
        scale = (peak / LEVELS).astype(array.dtype)
        scale[scale == 0] = 1  # nothing there, or so little that its scale underflows
        rounded = np.clip(np.rint(exact / scale), -LEVELS, LEVELS)
        error = float(((rounded * scale - exact) ** 2).sum())
        if error < least:
            least, best = error, (rounded.astype(np.int8), scale)
    return best


class _Writer:
    """Makes the unpacking nodes; those that tensors can share are made once."""

    def __init__(self, graph: Graph) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        names = {*all_defined(graph.model.graph), *graph.tensors}
        prefixes = ("unpack" + "_" * more for more in count())
        self._prefix = next(prefix for prefix in prefixes if not any(name.startswith(prefix) for name in names))
        self._made = 0
        self._shared: set[str] = set()

    def unpacking(self, name: str, packed: Packed) -> tuple[list[NodeProto], list[TensorProto]]:
        """Nodes that compute the tensor `name`, and the tensors they read."""
        result = packed.result
        base = f"{self._prefix}{self._made}"
        nodes: list[NodeProto] = []
        tensors: list[TensorProto] = []

        def store(suffix: str, array: Array) -> str:
            tensors.append(numpy_helper.from_array(array, base + suffix))
            return base + suffix

        def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
            nodes.append(helper.make_node(op, inputs, [output], **attributes))
            return output

        def shared(key: str, array: Array) -> str:
            common = f"{self._prefix}_{key}"
            if common not in self._shared and all(tensor.name != common for tensor in tensors):
                tensors.append(numpy_helper.from_array(array, common))
            return common

        size, kind = result.size, result.dtype
        if not len(packed.gaps):
            shape = shared("shape_" + "_".join(map(str, result.shape)), np.array(result.shape, np.int64))
            add("ConstantOfShape", [shape], name, value=numpy_helper.from_array(np.zeros(1, kind)))
            return nodes, tensors
        index = np.dtype(np.int32 if size < 2**31 else np.int64)
        wide = int(helper.np_dtype_to_tensor_dtype(index))
        steps = add("Cast", [store("g", packed.gaps)], base + "s", to=wide)
        places = add("CumSum", [steps, shared("axis", np.array(0, np.int32))], base + "p")
        values = store("v", packed.values)
        if packed.values.dtype != kind:
            values = add("Cast", [values], base + "c", to=int(helper.np_dtype_to_tensor_dtype(kind)))
        zeros = f"{self._prefix}_zeros_{kind.name}_{size}"
        if zeros not in self._shared:
            length = shared(f"shape_{size}", np.array([size], np.int64))
            add("ConstantOfShape", [length], zeros, value=numpy_helper.from_array(np.zeros(1, kind)))
        plain = packed.scale is None
        flat = plain and result.ndim == 1
        target = add("ScatterElements", [zeros, places, values], name if flat else base + "f", axis=0)
        if not flat:
            shape = shared("shape_" + "_".join(map(str, result.shape)), np.array(result.shape, np.int64))
            target = add("Reshape", [target, shape], name if plain else base + "r")
        if packed.scale is not None:
            add("Mul", [target, store("m", packed.scale)], name)
        return nodes, tensors

    def keep(self, nodes: list[NodeProto], tensors: list[TensorProto]) -> None:
        """Takes over what `unpacking` made last."""
        made = [*(tensor.name for tensor in tensors), *(node.output[0] for node in nodes)]
        self._shared.update(name for name in made if name.startswith(f"{self._prefix}_"))
        self.nodes.extend(nodes)
        self.tensors.extend(tensors)
        self._made += 1


def check_unpacking(model: ModelProto, expected: Mapping[str, Array], runtime: RuntimeOptions) -> None:
    """Lets ONNX Runtime unpack the tensors, and compares every bit.

    Raises:
        VerificationError: naming the first tensor that differs.
    """
    nodes = leading_to(model.graph.node, expected)
    names = {name for node in nodes for name in node.input}
    part = helper.make_graph(
        nodes,
        "unpacking",
        [],
        [
            helper.make_tensor_value_info(name, int(helper.np_dtype_to_tensor_dtype(array.dtype)), array.shape)
            for name, array in expected.items()
        ],
        [tensor for tensor in model.graph.initializer if tensor.name in names],
    )
    small = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    given = Session(small.SerializeToString(), runtime, what="the unpacking").run({})
    for name, array in expected.items():
        if given[name].dtype != array.dtype or given[name].tobytes() != np.ascontiguousarray(array).tobytes():
            raise VerificationError(
                f"tensor {name!r}: ONNX Runtime unpacks other values than were packed; nothing was written. Use another --to form"
            )
