"""Writing back: repaired weights into the tensors they came from, bias shifts into the place the operator has for them.

The stored weight keeps its name, dtype, shape and place.  A bias shift is added to the bias that is there; a bias that several
nodes share, or that has to grow, becomes a tensor of its own; one that does not exist is created.  What nothing reads any more
is removed, so a file grows by its new biases only.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import numpy as np
from onnx import ModelProto, NodeProto, StringStringEntryProto, TensorProto, helper, numpy_helper

from relrep_onnx.graph.index import PASS_THROUGH, Constant, Graph, display_name, is_standard, number, refill, tensor_like
from relrep_onnx.graph.layers import locate, node_of, read_weight
from relrep_onnx.graph.operators import OPERATORS, Form
from relrep_onnx.types import Array, FloatArray, Layer, ModelError, RepairedLayer


def write_layer(model: ModelProto, layer: Layer, repaired: RepairedLayer, before: FloatArray | None = None) -> None:
    """Writes one repaired layer into a model (the whole one, or a stage of it), in place.

    `before` is the layer's weight in the dense model, for a model that `without_data` left without it.

    Raises:
        ModelError: a value does not fit the tensor's dtype.
    """
    graph = Graph(model)
    form, constant = locate(graph, layer)
    if not np.array_equal(read_weight(graph, layer) if before is None else before, repaired.weight):
        tensor = graph.tensors[constant.root]
        places = np.arange(layer.size, dtype=np.int64).reshape(tuple(tensor.dims))
        order = form.to_matrix(graph.through(constant.steps, places, cast=False)).reshape(-1)
        stored = np.empty(layer.size, np.float64)
        stored[order] = repaired.weight.reshape(-1) / form.scale
        written = tensor_like(stored.reshape(tuple(tensor.dims)), tensor, layer.name)
        _check_casts(graph, constant, written, layer)
        tensor.CopyFrom(written)
    if repaired.bias_shift.any():
        kind = seen_type(constant, graph.tensors[constant.root].data_type)
        for use in layer.uses:
            _shift_bias(Graph(model), layer, use.output, form, repaired.bias_shift, kind)


def with_layer(model: ModelProto, layer: Layer, repaired: RepairedLayer) -> ModelProto:
    """A copy of the model with one layer repaired."""
    copy = deepcopy(model)
    write_layer(copy, layer, repaired)
    return copy


def as_stored(graph: Graph, repaired: RepairedLayer, layer: Layer) -> RepairedLayer:
    """The same layer with its weight in half the memory, where writing rounds it to float32 in any case."""
    form, constant = locate(graph, layer)
    if form.scale != 1.0 or graph.tensors[constant.root].data_type != TensorProto.FLOAT:
        return repaired
    with np.errstate(over="ignore"):  # writing reports what does not fit
        return replace(repaired, weight=repaired.weight.astype(np.float32))


def set_metadata(model: ModelProto, values: Mapping[str, str]) -> None:
    """Adds metadata entries, replacing those of the same key and keeping all others."""
    kept = [entry for entry in model.metadata_props if entry.key not in values]
    added = [StringStringEntryProto(key=key, value=value) for key, value in sorted(values.items())]
    refill(model.metadata_props, [*kept, *added])


def _shift_bias(graph: Graph, layer: Layer, output: str, form: Form, shift: FloatArray, kind: int) -> None:
    """Adds a shift to one node's bias; `kind` is the dtype of a bias that has to be created."""
    node = node_of(graph, layer, output)
    output = node.output[0]
    slot = OPERATORS[node.op_type].bias_slot
    addend = shift.reshape(form.bias_shape)
    if slot is not None:
        while len(node.input) <= slot:
            node.input.append("")
        old = graph.value(node.input[slot]) if node.input[slot] else None
        if form.bias_scale == 0.0:  # beta = 0 switched the old bias off
            old = None
            _set_attribute(node, "beta", 1.0)
        else:
            addend = addend / form.bias_scale
        _store_bias(graph, layer, node, slot, old, addend, kind)
        return
    add = following_add(graph, output, form)
    if add is not None:
        reader, slot = add
        _store_bias(graph, layer, reader, slot, graph.value(reader.input[slot]), addend, kind)
        return
    before = graph.fresh(f"{output}_without_bias")
    name = graph.fresh(f"{layer.name}.relrep_bias")
    position = next(i for i, n in enumerate(graph.model.graph.node) if output in n.output)
    node.output[0] = before
    added = helper.make_node("Add", [before, name], [output], name=graph.fresh(f"{display_name(node)}_bias"))
    graph.model.graph.node.insert(position + 1, added)
    _add_tensor(graph, tensor_like(addend, TensorProto(name=name, data_type=kind), layer.name))


def seen_type(constant: Constant, stored: int) -> int:
    """The dtype an operator computes in: the stored one, or what the last Cast in front of it makes."""
    casts = [step for step in constant.steps if step.op_type == "Cast"]
    return int(number(casts[-1], "to", stored)) if casts else stored


def _check_casts(graph: Graph, constant: Constant, written: TensorProto, layer: Layer) -> None:
    """Refuses values that fit the stored dtype but not the smaller one that a Cast makes of it."""
    if not any(step.op_type == "Cast" for step in constant.steps):
        return
    with np.errstate(over="ignore"):
        seen = graph.through(constant.steps, numpy_helper.to_array(written), cast=True)
    if not np.isfinite(seen.astype(np.float64)).all():
        raise ModelError(
            f"layer {layer.name!r}: a repaired value does not fit {seen.dtype.name}, which its weight is cast to; "
            "use another repair or exclude the layer"
        )


def following_add(graph: Graph, output: str, form: Form) -> tuple[NodeProto, int] | None:
    """The Add that is a product's bias: its only reader, the other operand a constant that varies along the rows' axis."""
    readers = graph.consumers.get(output, [])
    if len(readers) != 1 or output in graph.outputs:
        return None
    node, slot = readers[0]
    if node.op_type != "Add" or not is_standard(node) or slot < 0:
        return None
    value = graph.value(node.input[1 - slot])
    if value is None or value.ndim == 0:
        return None
    # The shift must fit into the addend's own shape: otherwise storing it would multiply the addend's size.
    fits = np.broadcast_shapes(value.shape, form.bias_shape) if _broadcastable(value.shape, form.bias_shape) else None
    return (node, 1 - slot) if fits == value.shape else None


def _broadcastable(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(reversed(a), reversed(b), strict=False))


def _store_bias(graph: Graph, layer: Layer, node: NodeProto, slot: int, old: Array | None, addend: FloatArray, kind: int) -> None:
    """Puts old + addend into a node's input: in place where the stored tensor is this node's own, else as a new tensor."""
    name = node.input[slot]
    value = addend if old is None else old.astype(np.float64) + addend
    if old is not None and name in graph.tensors and old.shape == value.shape:
        tensor = graph.tensors[name]
        if len(graph.consumers[name]) == 1 and name not in graph.outputs:
            tensor.CopyFrom(tensor_like(value, tensor, layer.name))
            return
    fresh = graph.fresh(f"{layer.name}.relrep_bias")
    if old is not None:
        kind = int(helper.np_dtype_to_tensor_dtype(old.dtype))
    _add_tensor(graph, tensor_like(value, TensorProto(name=fresh, data_type=kind), layer.name))
    node.input[slot] = fresh
    if name:
        _drop_unread(graph.model, name)


def _add_tensor(graph: Graph, tensor: TensorProto) -> None:
    if graph.model.ir_version >= 4:
        graph.model.graph.initializer.append(tensor)
    else:  # initializers would have to be inputs of the graph, which would change its signature
        graph.model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))


def _drop_unread(model: ModelProto, name: str) -> None:
    """Removes a constant that nothing reads any more, and the pass-through nodes in front of it."""
    graph = Graph(model)
    if graph.consumers.get(name) or name in graph.outputs:
        return
    if name in {value.name for value in model.graph.input}:
        return  # part of the model's signature
    node = graph.producers.get(name)
    if node is not None and (node.op_type == "Constant" or node.op_type in PASS_THROUGH):
        behind = list(node.input)
        model.graph.node.remove(node)
        for other in behind:
            _drop_unread(model, other)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            model.graph.initializer.remove(tensor)
            break
    for info in [value for value in model.graph.value_info if value.name == name]:
        model.graph.value_info.remove(info)


def _set_attribute(node: NodeProto, name: str, value: float) -> None:
    kept = [item for item in node.attribute if item.name != name]
    refill(node.attribute, [*kept, helper.make_attribute(name, value)])
