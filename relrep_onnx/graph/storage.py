"""Changing how a model stores its tensors: taking them out of their places, and the versions that new ways of storing need."""

from __future__ import annotations

import math
from collections.abc import Collection

from google.protobuf.message import Message
from onnx import ModelProto, helper, inliner, shape_inference, version_converter

from relrep_onnx.graph.external import MESSAGE
from relrep_onnx.graph.index import STANDARD_DOMAINS, Graph, refill
from relrep_onnx.graph.tensors import forget_file, is_outside, whole
from relrep_onnx.types import ModelError

_LEAST_IR = {11: 6, 12: 7, 17: 8, 20: 9}
"""The IR version that came with an operator set; older readers refuse the pair."""


def is_large(model: ModelProto) -> bool:
    """Whether a model's initializers are too large for one message, which holds 2 GB; nothing is copied to find out."""
    sizes = (math.prod(t.dims) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in model.graph.initializer)
    return sum(sizes) > MESSAGE


def without_data(model: ModelProto, names: Collection[str]) -> ModelProto:
    """A copy in which these initializers are empty, and all others hold their data: of a large model, the rest is small."""
    copy = ModelProto()
    _merge(model, copy, "graph")
    _merge(model.graph, copy.graph, "initializer")
    for tensor in model.graph.initializer:
        added = copy.graph.initializer.add()
        if tensor.name not in names:
            added.CopyFrom(whole(tensor))
        elif is_outside(tensor):
            added.CopyFrom(tensor)
            forget_file(added)
        elif tensor.HasField("raw_data"):
            _merge(tensor, added, "raw_data")
        else:
            added.CopyFrom(tensor)
    return copy


def restore(model: ModelProto, source: Graph, name: str) -> None:
    """Gives an initializer that `without_data` left empty its data back."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(whole(source.tensors[name]))


def _merge(source: Message, target: Message, left_out: str) -> None:
    """Copies every field that is set but one; protobuf reads text that is not UTF-8, but does not write it."""
    for field, value in source.ListFields():
        if field.name != left_out:
            if hasattr(value, "MergeFrom"):
                getattr(target, field.name).MergeFrom(value)
                continue
            try:
                setattr(target, field.name, value)
            except UnicodeDecodeError as error:
                raise ModelError(f"{field.name} {value!r} in the model is not UTF-8 text; export the model again") from error


def detach(model: ModelProto, names: Collection[str]) -> None:
    """Takes stored tensors out of a model in place, be they initializers or Constant nodes; their readers stay as they are.

    An initializer of old models is an input as well; that entry goes too, for a tensor that is computed cannot be fed.
    """
    graph = model.graph
    for values in (graph.initializer, graph.input, graph.value_info):
        refill(values, [value for value in values if value.name not in names])
    refill(graph.node, [node for node in graph.node if node.op_type != "Constant" or node.output[0] not in names])


def raise_opset(model: ModelProto, least: int) -> ModelProto:
    """The model itself, or a copy at the operator set `least` where it is older.

    Names and what the model and its graph say about themselves are kept, and model-local functions become nodes.  What single
    nodes, tensors and types say beyond their names gets lost, and so does a description of the training.

    Raises:
        ModelError: ONNX cannot convert it.
    """
    before = Graph(model).opset
    if before >= least:
        return model
    try:
        raised: ModelProto = version_converter.convert_version(_inlined(model), least)
    except (LookupError, RuntimeError, ValueError, version_converter.ConvertError, shape_inference.InferenceError) as error:
        raise ModelError(
            f"the model has operator set {before}, {least} is needed, and ONNX cannot convert it "
            f"({str(error).splitlines()[0]}); export it anew with a newer operator set"
        ) from error
    # The converter knows the standard set only, and does not carry everything over.
    refill(raised.graph.metadata_props, model.graph.metadata_props)
    refill(raised.graph.quantization_annotation, model.graph.quantization_annotation)
    known = {entry.domain for entry in raised.opset_import} | set(STANDARD_DOMAINS)
    raised.opset_import.extend(entry for entry in model.opset_import if entry.domain not in known)
    raised.ir_version = max(model.ir_version, _LEAST_IR[least])
    refill(raised.metadata_props, model.metadata_props)
    return raised


def _inlined(model: ModelProto) -> ModelProto:
    """The model with its local functions, which the converter would drop, as nodes; they may be of another operator set."""
    if not model.functions:
        return model
    typed = shape_inference.infer_shapes(model)  # without types, functions cannot be converted
    return inliner.inline_local_functions(typed, convert_version=True)
