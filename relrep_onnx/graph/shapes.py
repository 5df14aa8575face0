"""Shapes of activations without running the model, for `inspect`: ONNX shape inference after the open dimensions are fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy

import onnx
from google.protobuf.message import EncodeError
from onnx import ModelProto, TensorShapeProto, ValueInfoProto

from relrep_onnx.types import MOST, ConfigError


def activation_shapes(
    model: ModelProto, fixed: Mapping[str, tuple[int, ...]], fallback: Callable[[ModelProto], ModelProto | None]
) -> dict[str, tuple[int, ...]]:
    """Every fully known shape, with the given input shapes; an open first dimension counts as one sample.

    Args:
        model: the model; not changed.
        fixed: shape of each input by name.
        fallback: another inference, asked when the standard one leaves nodes without shapes.

    Raises:
        ConfigError: a shape for an input that does not exist, has another rank or fixes another size, or one that no tensor has.
    """
    copy = deepcopy(model)
    inputs = {value.name: value for value in copy.graph.input}
    for name, shape in fixed.items():
        if name not in inputs:
            raise ConfigError(f"--input-shape: no input is called {name!r}; inputs: {', '.join(map(repr, inputs))}")
        if not inputs[name].type.HasField("tensor_type"):
            raise ConfigError(f"--input-shape: {name!r} is no tensor; leave it out")
        own = inputs[name].type.tensor_type
        if not own.HasField("shape"):  # of any rank
            own.shape.dim.extend(TensorShapeProto.Dimension() for _ in shape)
        if len(own.shape.dim) != len(shape):
            raise ConfigError(f"--input-shape: {name!r} has rank {len(own.shape.dim)}, not {len(shape)}")
        if not all(1 <= size <= MOST for size in shape):
            raise ConfigError(f"--input-shape: {name!r} cannot be {list(shape)}; give sizes of at least 1, at most {MOST}")
        for axis, (dim, size) in enumerate(zip(own.shape.dim, shape, strict=True)):
            if dim.dim_value not in (0, size):
                raise ConfigError(f"--input-shape: the model fixes axis {axis} of {name!r} at {dim.dim_value}, not {size}")
    for name, value in inputs.items():
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if name in fixed:
                dim.dim_value = fixed[name][axis]
            elif axis == 0 and not dim.HasField("dim_value"):
                dim.dim_value = 1
    del copy.graph.value_info[:]  # stale symbolic shapes would win over the fixed ones
    known = _known(_infer(copy))
    wanted = {name for node in copy.graph.node for name in node.input if name}
    if wanted - known.keys() - {t.name for t in copy.graph.initializer}:
        inferred = fallback(copy)
        if inferred is not None:
            known = {**_known(inferred), **known}
    return known


def _infer(model: ModelProto) -> ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError, EncodeError):  # the last where it is over 2 GB
        return model


def _known(model: ModelProto) -> dict[str, tuple[int, ...]]:
    graph = model.graph
    shapes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shape = _shape(value)
        if shape is not None:
            shapes[value.name] = shape
    return shapes


def _shape(value: ValueInfoProto) -> tuple[int, ...] | None:
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value for dim in dims) if all(dim.dim_value > 0 for dim in dims) else None
