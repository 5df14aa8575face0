"""Small sound models in the operators that graphs come with; `tools/hostile.py` damages them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from relrep_onnx.types import Array

Random = np.random.Generator


def _w(rng: Random, *shape: int, kind: Any = np.float32) -> Array:
    return np.asarray(rng.standard_normal(shape) / max(1, shape[-1]) ** 0.5, kind)


def _value(name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _model(
    nodes: Sequence[NodeProto], inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto], tensors: dict[str, Array],
    *, opset: int = 17, ir_version: int = 8,
) -> ModelProto:  # fmt: skip
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    inputs = [*inputs, *(_value(t.name, list(t.dims), t.data_type) for t in stored)] if ir_version < 4 else inputs
    graph = helper.make_graph(list(nodes), "case", list(inputs), list(outputs), stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def conv(rng: Random) -> ModelProto:
    """Convolutions, BatchNormalization, a residual sum, a transposed convolution, a head."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], name="first", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        node("BatchNormalization", ["c1", "s", "b1", "m", "v"], ["n1"], name="norm", epsilon=1e-5),
        node("Relu", ["n1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], name="second", pads=[1, 1, 1, 1], group=2, dilations=[1, 1], strides=[1, 1]),
        node("Add", ["c2", "r1"], ["s2"]),
        node("ConvTranspose", ["s2", "w3"], ["t"], name="up", strides=[2, 2]),
        node("GlobalAveragePool", ["t"], ["p"]),
        node("Flatten", ["p"], ["f"], axis=1),
        node("Gemm", ["f", "w4", "b4"], ["y"], name="head", transB=1, alpha=0.5),
    ]
    tensors: dict[str, Array] = {
        "w1": _w(rng, 8, 3, 3, 3), "b1": _w(rng, 8), "s": np.ones(8, np.float32), "m": _w(rng, 8), "v": np.ones(8, np.float32),
        "w2": _w(rng, 8, 4, 3, 3), "w3": _w(rng, 8, 6, 2, 2), "w4": _w(rng, 5, 6), "b4": _w(rng, 5),
    }  # fmt: skip
    return _model(nodes, [_value("x", ["N", 3, 6, 6])], [_value("y", ["N", 5])], tensors)


def constants(rng: Random) -> ModelProto:
    """Weights in Constant nodes, behind Identity, Transpose, Reshape and Cast."""
    node = helper.make_node
    nodes = [
        node("Constant", [], ["k1"], value=numpy_helper.from_array(_w(rng, 6, 8, kind=np.float16))),
        node("Cast", ["k1"], ["k2"], to=TensorProto.FLOAT),
        node("Identity", ["k2"], ["k3"]),
        node("Transpose", ["k3"], ["k4"], perm=[1, 0]),
        node("MatMul", ["x", "k4"], ["a"], name="product"),
        node("Constant", [], ["k5"], value=numpy_helper.from_array(_w(rng, 24))),
        node("Constant", [], ["shape"], value_ints=[6, 4]),
        node("Constant", [], ["dims"], value=numpy_helper.from_array(np.array([6, 4]))),
        node("Reshape", ["k5", "dims"], ["k6"]),
        node("MatMul", ["a", "k6"], ["b"]),
        node("Add", ["b", "bias"], ["y"]),
    ]
    return _model(nodes, [_value("x", ["N", 8])], [_value("y", ["N", 4])], {"bias": _w(rng, 4)}, opset=13)


def attention(rng: Random) -> ModelProto:
    """Tokens, a table, projections, a product of activations; a shared weight."""
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["e"]),
        *(node("MatMul", ["e", w], [o]) for w, o in (("wq", "q"), ("wk", "k"), ("wq", "v"))),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Softmax", ["s"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["y"]),
    ]
    tensors = {"table": _w(rng, 11, 6), "wq": _w(rng, 6, 6), "wk": _w(rng, 6, 6)}
    return _model(nodes, [_value("ids", ["N", 4], TensorProto.INT64)], [_value("y", ["N", 4, 6])], tensors)


def control(rng: Random) -> ModelProto:
    """Weights inside If and Loop, captured tensors."""
    node = helper.make_node
    branch = [
        helper.make_graph(
            [node("MatMul", ["h", w], [f"{w}_out"])], w, [], [_value(f"{w}_out", ["N", 4])],
            [numpy_helper.from_array(_w(rng, 6, 4), w)],
        )
        for w in ("wa", "wb")
    ]  # fmt: skip
    body = helper.make_graph(
        [node("Identity", ["go"], ["going"]), node("MatMul", ["c_in", "wl"], ["c_out"])],
        "body",
        [_value("i", [], TensorProto.INT64), _value("go", [], TensorProto.BOOL), _value("c_in", ["N", 4])],
        [_value("going", [], TensorProto.BOOL), _value("c_out", ["N", 4])],
    )
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="outer"),
        node("ReduceSum", ["h"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["yes"]),
        node("If", ["yes"], ["z"], name="branch", then_branch=branch[0], else_branch=branch[1]),
        node("Loop", ["twice", "", "z"], ["y"], name="loop", body=body),
    ]
    tensors: dict[str, Array] = {"w": _w(rng, 5, 6), "wl": _w(rng, 4, 4), "zero": np.array(0, np.float32), "twice": np.array(2)}
    return _model(nodes, [_value("x", ["N", 5])], [_value("y", ["N", 4])], tensors)


def quantized(rng: Random) -> ModelProto:
    """A quantized weight, a model-local function, a recurrent layer."""
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"]),
        node("MatMul", ["xd", "wd"], ["a"]),
        node("Linear", ["a", "wf"], ["b"], domain="local"),
        node("Unsqueeze", ["b", "axis"], ["u"]),
        node("LSTM", ["u", "wl", "rl"], ["", "h"], hidden_size=3),
        node("Squeeze", ["h", "axis"], ["y"]),
    ]
    tensors: dict[str, Array] = {
        "wq": rng.integers(-100, 100, (6, 5)).astype(np.int8), "scale": np.array(0.02, np.float32), "zero": np.array(0, np.int8),
        "wf": _w(rng, 5, 7), "axis": np.array([0]), "wl": _w(rng, 1, 12, 7), "rl": _w(rng, 1, 12, 3),
    }  # fmt: skip
    model = _model(nodes, [_value("x", ["N", 6])], [_value("y", ["N", 3])], tensors)
    body = [node("MatMul", ["v", "m"], ["o"])]
    model.functions.append(helper.make_function("local", "Linear", ["v", "m"], ["o"], body, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("local", 1))
    return model


def old(rng: Random) -> ModelProto:
    """IR version 3: initializers are inputs; a constant first operand, a double weight, a sparse initializer at the side."""
    node = helper.make_node
    nodes = [node("Gemm", ["x", "w"], ["a"], name="g"), node("MatMul", ["a", "v"], ["y"])]
    tensors = {"w": _w(rng, 6, 6, kind=np.float64), "v": _w(rng, 6, 4, kind=np.float64)}
    double = TensorProto.DOUBLE
    return _model(nodes, [_value("x", ["N", 6], double)], [_value("y", ["N", 4], double)], tensors, opset=11, ir_version=3)


def sparse(rng: Random) -> ModelProto:
    """Sparse initializers with linear and with two-dimensional indices."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "v"], ["y"])]
    model = _model(nodes, [_value("x", ["N", 6])], [_value("y", ["N", 5])], {})
    for name, shape, places in (
        ("w", (6, 4), np.sort(rng.choice(24, 9, replace=False))),
        ("v", (4, 5), np.argwhere(np.ones((4, 5)))[::2]),
    ):
        values = numpy_helper.from_array(_w(rng, len(places)), name)
        indices = numpy_helper.from_array(places.astype(np.int64), f"{name}_indices")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, shape))
    return model


BASES: Final[tuple[Callable[[Random], ModelProto], ...]] = (conv, constants, attention, control, quantized, old, sparse)
