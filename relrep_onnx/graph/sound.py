"""What the other rooms may rely on, checked once when a model is loaded.

Names are text, stored tensors have one each and hold what their shapes say, attributes have types, nodes have outputs and come in
an order in which they can run.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Final

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, defs, numpy_helper

from relrep_onnx.graph.external import stored_tensors
from relrep_onnx.graph.index import STANDARD_DOMAINS, display_name, is_standard, reads, refill, subgraphs, with_bodies
from relrep_onnx.graph.tensors import is_outside, place_of
from relrep_onnx.memory import free_memory
from relrep_onnx.types import ModelError

_BITS = {
    **dict.fromkeys(("UINT8", "INT8", "BOOL", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("UINT16", "INT16", "FLOAT16", "BFLOAT16"), 16),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    "COMPLEX128": 128,
    "UINT4": 4,
    "INT4": 4,
    "FLOAT4E2M1": 4,
    "UINT2": 2,
    "INT2": 2,
    "FLOAT6E2M3": 6,
    "FLOAT6E3M2": 6,
}
"""Of one element in `raw_data`."""
_FIELDS = {"FLOAT": "float_data", "COMPLEX64": "float_data", "DOUBLE": "double_data", "COMPLEX128": "double_data",
           "INT64": "int64_data", "UINT32": "uint64_data", "UINT64": "uint64_data", "STRING": "string_data"}  # fmt: skip
"""Where elements lie that are not in `raw_data`; all others in `int32_data`."""
_DEEPEST: Final = 100
"""Calls of model-local functions inside one another, as in ONNX itself, which older versions followed until the stack ended."""
_LARGEST: Final = 1_000_000
"""Nodes of a model with its functions in the place of their calls; a few functions could make any number."""
_TYPES = frozenset(AttributeProto.AttributeType.values()) - {AttributeProto.UNDEFINED}


def make_sound(model: ModelProto) -> tuple[str, ...]:
    """Checks a model, makes its sparse initializers dense, and puts its nodes in order; returns notes on what it changed.

    Raises:
        ModelError: what is wrong with the model.
    """
    for name in _names(model):
        if not isinstance(name, str):  # bytes are what protobuf gives for what is no UTF-8
            raise ModelError(f"the name {name!r} in the model is not valid UTF-8; export the model anew")
    for tensor in stored_tensors(model):
        _check_tensor(tensor)
    for node in _nodes(model):
        _check_node(node)
    _check_calls(model)
    opset = max((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), default=1)
    for node in with_bodies(model.graph.node):
        _check_inputs(node, min(max(opset, 1), defs.onnx_opset_version()))
    return (*_densify(model.graph), *(note for graph in _graphs(model) for note in _once(graph)), *_in_order(model.graph))


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    yield from with_bodies(model.graph.node)
    for function in model.functions:
        yield from with_bodies(function.node)


def _graphs(model: ModelProto) -> Iterator[GraphProto]:
    yield model.graph
    for node in _nodes(model):
        yield from subgraphs(node)


def _names(model: ModelProto) -> Iterator[object]:
    for node in _nodes(model):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output, *(item.name for item in node.attribute))
    for tensor in stored_tensors(model):
        yield tensor.name
    for graph in _graphs(model):
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield from (value.name, *(dim.dim_param for dim in value.type.tensor_type.shape.dim))
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
    yield from (entry.domain for entry in model.opset_import)


def _check_tensor(tensor: TensorProto) -> None:
    kind = next((name for name, number in TensorProto.DataType.items() if number == tensor.data_type), str(tensor.data_type))
    if kind not in _BITS and kind != "STRING":
        raise ModelError(f"the stored tensor {tensor.name!r} has the unknown type {kind}; export the model anew")
    dims, count = list(tensor.dims), math.prod(tensor.dims)
    if min(dims, default=0) < 0:
        raise ModelError(f"the stored tensor {tensor.name!r} has the shape {dims}; export the model anew")
    if is_outside(tensor) or tensor.HasField("raw_data"):
        held = place_of(tensor).length if is_outside(tensor) else len(tensor.raw_data)
        needed, unit = -(-count * _BITS.get(kind, 0) // 8), "bytes"
    else:
        field = getattr(tensor, _FIELDS.get(kind, "int32_data"))
        packed = -(-count * _BITS[kind] // 8) if _BITS.get(kind, 8) < 8 else count
        held, needed, unit = len(field), packed * (2 if kind.startswith("COMPLEX") else 1), "values"
    if held != needed:
        raise ModelError(
            f"the stored tensor {tensor.name!r} holds {held} {unit}, but its shape {dims} and type {kind.lower()} need {needed}; "
            "export the model anew"
        )


def _check_node(node: NodeProto) -> None:
    for item in node.attribute:
        if item.type not in _TYPES:
            raise ModelError(f"the attribute {item.name!r} of {display_name(node)!r} has no known type; export the model anew")
    if not any(node.output):
        raise ModelError(f"the node {display_name(node)!r} ({node.op_type}) has no output; export the model anew")


def _check_inputs(node: NodeProto, opset: int) -> None:
    if is_standard(node) and defs.has(node.op_type, opset, ""):
        least = defs.get_schema(node.op_type, opset, "").min_input
        if len(node.input) < least:
            what = f"the node {display_name(node)!r} ({node.op_type}) has {len(node.input)} inputs"
            raise ModelError(f"{what}, and its operator needs {least}; export the model anew")


def _check_calls(model: ModelProto) -> None:
    """Refuses functions that call themselves, or that stand for more nodes than could be looked at."""
    calls = {
        (f.domain, f.name, f.overload): [(n.domain, n.op_type, n.overload) for n in with_bodies(f.node)] for f in model.functions
    }
    depth, size = dict.fromkeys(calls, 0), dict.fromkeys(calls, 0)
    try:
        for function in TopologicalSorter(calls).static_order():
            nodes = calls.get(function, [])
            depth[function] = 1 + max((depth[callee] for callee in nodes), default=-1)
            size[function] = max(1, sum(size[callee] for callee in nodes))
    except CycleError as error:
        raise ModelError(f"the model-local function {error.args[1][0][1]!r} calls itself; export the model anew") from error
    deepest = max(depth.values(), default=0)
    total = sum(size.get((n.domain, n.op_type, n.overload), 1) for n in with_bodies(model.graph.node)) if calls else 0
    if deepest > _DEEPEST or total > _LARGEST:
        what = f"call each other {deepest} deep and make {total} nodes; {_DEEPEST} and {_LARGEST} are the most"
        raise ModelError(f"the model-local functions {what}; export the model anew")


def _densify(graph: GraphProto) -> Iterator[str]:
    """Turns sparse initializers into dense ones: most tools, ONNX Runtime's own among them, drop or break sparse ones."""
    for sparse in graph.sparse_initializer:
        graph.initializer.append(_dense(sparse))
        yield f"the sparse initializer {sparse.values.name!r} was made dense"
    del graph.sparse_initializer[:]


def _once(graph: GraphProto) -> Iterator[str]:
    """Leaves out copies of stored tensors: ONNX wants each name once, and not all readers would take the same one."""
    kept: dict[str, TensorProto] = {}
    copies = []
    for tensor in graph.initializer:
        if kept.setdefault(tensor.name, tensor) is not tensor:
            copies.append(tensor)
            if kept[tensor.name] != tensor:
                raise ModelError(f"two different stored tensors are called {tensor.name!r}; export the model anew")
    if copies:
        refill(graph.initializer, kept.values())
    yield from (f"the stored tensor {name!r} was there more than once" for name in dict.fromkeys(t.name for t in copies))


def _dense(sparse: SparseTensorProto) -> TensorProto:
    name, shape = sparse.values.name, tuple(sparse.dims)
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    size = math.prod(shape)
    if min(shape, default=0) < 0 or size * values.itemsize > free_memory():
        raise ModelError(f"the sparse initializer {name!r}, shape {list(shape)}, does not fit into memory; export it anew")
    try:
        if indices.ndim == 2:
            indices = np.ravel_multi_index(tuple(indices.T), shape)
        dense = np.zeros(size, values.dtype)
        dense[indices] = values
    except (ValueError, IndexError, TypeError) as error:
        raise ModelError(f"the indices of the sparse initializer {name!r} do not fit: {error}; export the model anew") from error
    return numpy_helper.from_array(dense.reshape(shape), name)


def _in_order(graph: GraphProto) -> Iterator[str]:
    """Puts nodes behind those they read, as ONNX wants and ONNX Runtime does by itself; what is in order stays as it is."""
    makers = {name: number for number, node in enumerate(graph.node) for name in node.output if name}
    before = [{makers[name] for name in reads(node) if name in makers} for node in graph.node]
    if all(max(needs, default=-1) < number for number, needs in enumerate(before)):
        return
    waiting = Counter({number: len(needs) for number, needs in enumerate(before)})
    readers: dict[int, list[int]] = {}
    for number, needs in enumerate(before):
        for need in needs:
            readers.setdefault(need, []).append(number)
    ready = deque(number for number in range(len(before)) if not waiting[number])
    order: list[int] = []
    while ready:
        order.append(ready.popleft())
        for reader in readers.get(order[-1], []):
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    if len(order) < len(before):
        stuck = next(number for number in range(len(before)) if waiting[number])
        raise ModelError(f"the graph has a cycle through or before {display_name(graph.node[stuck])!r}; export the model anew")
    refill(graph.node, [graph.node[number] for number in order])
    yield "the nodes were not in an order in which they can run, and were sorted"
