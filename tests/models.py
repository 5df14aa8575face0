"""Small seeded models for the tests, and ONNX Runtime as the judge of what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from relrep_onnx.graph import Graph, find_layers, read_weight
from relrep_onnx.types import Array, Feeds, FloatArray, Layer, RepairedLayer, Selection

Shape = Sequence[int | str]
ALL: Final = Selection(min_size=1)
OPSET: Final = 17


def random(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    """Standard normal numbers; the same for the same seed and shape."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def tensor(array: Array, name: str = "") -> TensorProto:
    """A stored tensor."""
    return numpy_helper.from_array(np.asarray(array), name)


def constant(name: str, array: Array) -> NodeProto:
    """A Constant node."""
    return helper.make_node("Constant", [], [name], value=tensor(array))


def element(dtype: Any) -> int:
    """ONNX's number of a numpy dtype."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def value(name: str, shape: Shape | None, dtype: Any = np.float32) -> ValueInfoProto:
    """A typed graph input or output."""
    return helper.make_tensor_value_info(name, element(dtype), shape)


def build(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Sequence[str],
    tensors: Mapping[str, Array] | None = None,
    *,
    dtype: Any = np.float32,
    opset: int = OPSET,
    ir_version: int = 8,
    functions: Sequence[FunctionProto] = (),
) -> ModelProto:
    """A model whose inputs and outputs all have one dtype; up to IR version 3 its initializers are inputs as well."""
    stored = dict(tensors or {})
    listed = [value(name, array.shape, array.dtype) for name, array in stored.items()] if ir_version < 4 else []
    graph = helper.make_graph(
        list(nodes),
        "test",
        [*(value(name, shape, dtype) for name, shape in inputs.items()), *listed],
        [],
        [tensor(array, name) for name, array in stored.items()],
    )
    domains = sorted({function.domain for function in functions})
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions))
    return with_outputs(model, outputs)


def with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy with other outputs, their types and shapes as ONNX infers them."""
    other = expose(model, names)
    inferred = onnx.shape_inference.infer_shapes(other)
    del other.graph.output[:]
    known = {t.name: helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer}
    other.graph.output.extend(known.get(o.name, o) for o in inferred.graph.output)
    return other


def clone(model: ModelProto) -> ModelProto:
    """A copy that shares nothing."""
    other = ModelProto()
    other.CopyFrom(model)
    return other


def expose(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy whose outputs are the given tensors."""
    other = clone(model)
    del other.graph.output[:]
    other.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return other


def run(model: ModelProto, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Any]:
    """All outputs of a model, or the named tensors inside it, from one run of ONNX Runtime."""
    if names is not None:
        inputs = {i.name for i in model.graph.input}
        computed = [name for name in names if name not in inputs]
        inside = run(expose(model, computed), feeds) if computed else {}
        return {name: feeds[name] if name in inputs else inside[name] for name in names}
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, dict(feeds)), strict=True))


def only_layer(model: ModelProto) -> Layer:
    """The one prunable layer of a model."""
    layers, _ = find_layers(Graph(model), ALL)
    (layer,) = layers
    return layer


def stored(model: ModelProto, name: str) -> Array:
    """A stored tensor's values."""
    return Graph(model).stored(name)


def change(model: ModelProto, layer: Layer, seed: int = 7, *, shift: bool = True) -> RepairedLayer:
    """A random masked weight and a random bias shift for one layer."""
    rng = np.random.default_rng(seed)
    weight = read_weight(Graph(model), layer)
    weight = np.where(rng.random(weight.shape) < 0.5, weight * rng.uniform(0.5, 1.5, (layer.rows, 1)), 0.0)
    bias = rng.standard_normal(layer.rows) if shift else np.zeros(layer.rows)
    return RepairedLayer(weight, bias, np.zeros(layer.rows))


@dataclass(frozen=True, eq=False)
class Single:
    """One prunable layer called `layer`, reading `x`, writing `y`."""

    model: ModelProto
    x: Array

    @property
    def feeds(self) -> Feeds:
        """What the model is run on."""
        return {"x": self.x}


def single(
    op: str,
    x: Sequence[int],
    w: Sequence[int],
    b: Sequence[int] | None = None,
    *,
    left: bool = False,
    dtype: Any = np.float32,
    seed: int = 0,
    **attributes: Any,
) -> Single:
    """One node with a stored weight `w` and, where its shape is given, a stored bias `b`."""
    tensors = {"w": random(seed, *w, dtype=dtype)}
    names = ["w", "x"] if left else ["x", "w"]
    if b is not None:
        tensors["b"] = random(seed + 1, *b, dtype=dtype)
        names.append("b")
    node = helper.make_node(op, names, ["y"], name="layer", **attributes)
    return Single(build([node], {"x": x}, ["y"], tensors, dtype=dtype), random(seed + 2, *x, dtype=dtype))


def rows_of(layer_weight_shape: Sequence[int], op: str, y: Array, *, left: bool = False) -> FloatArray:
    """A layer's output as [positions, rows]: channels last, everything else a position, in row-major order.

    A MatMul whose weight has batch dimensions has one group of channels for each of its matrices.
    """
    y = np.asarray(y, np.float64)
    if op in ("Conv", "ConvTranspose"):
        return np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])
    if left and y.ndim > 1:
        y = y.swapaxes(-1, -2)
    batch = tuple(layer_weight_shape)[:-2] if op == "MatMul" else ()
    parts = []
    for matrix in np.ndindex(*batch):
        index = tuple(slice(None) if size == 1 else i for i, size in zip(matrix, batch, strict=True))
        part = y[(..., *index, slice(None), slice(None))] if batch else y
        parts.append(part.reshape(-1, y.shape[-1]))
    return np.concatenate(parts, axis=1)


SINGLES: Final[Mapping[str, Callable[[], Single]]] = {
    "conv1d": lambda: single("Conv", (2, 3, 11), (4, 3, 3), (4,), pads=[1, 2]),
    "conv2d": lambda: single("Conv", (2, 4, 8, 7), (6, 4, 3, 2), (6,), pads=[1, 0, 2, 1], strides=[2, 1]),
    "conv2d-no-bias": lambda: single("Conv", (2, 4, 6, 6), (5, 4, 3, 3)),
    "conv2d-groups": lambda: single("Conv", (2, 6, 6, 6), (4, 3, 3, 3), (4,), group=2, dilations=[2, 1], pads=[2, 2, 1, 0]),
    "conv3d": lambda: single("Conv", (2, 2, 5, 4, 6), (3, 2, 2, 3, 2), (3,), strides=[1, 1, 2]),
    "conv2d-fp16": lambda: single("Conv", (2, 4, 6, 6), (5, 4, 3, 3), (5,), dtype=np.float16),
    "transpose1d": lambda: single("ConvTranspose", (2, 3, 7), (3, 4, 3), (4,), strides=[2]),
    "transpose2d": lambda: single(
        "ConvTranspose", (2, 4, 5, 4), (4, 3, 3, 2), (3,), strides=[2, 3], pads=[1, 0, 0, 1], output_padding=[1, 0]
    ),
    "transpose2d-groups": lambda: single("ConvTranspose", (2, 6, 4, 4), (6, 2, 3, 3), None, group=2, dilations=[2, 1]),
    "gemm": lambda: single("Gemm", (9, 5), (5, 4), (4,)),
    "gemm-no-bias": lambda: single("Gemm", (9, 5), (5, 4)),
    "gemm-scaled": lambda: single("Gemm", (5, 9), (4, 5), (4,), transA=1, transB=1, alpha=-2.0, beta=0.5),
    "gemm-scalar-bias": lambda: single("Gemm", (9, 5), (5, 4), ()),
    "gemm-one-bias": lambda: single("Gemm", (9, 5), (5, 4), (1,)),
    "gemm-column-bias": lambda: single("Gemm", (9, 5), (5, 4), (9, 1)),
    "gemm-full-bias": lambda: single("Gemm", (9, 5), (5, 4), (9, 4)),
    "gemm-beta-0": lambda: single("Gemm", (9, 5), (5, 4), (4,), beta=0.0),
    "gemm-fp16": lambda: single("Gemm", (9, 5), (5, 4), (4,), dtype=np.float16),
    "gemm-fp64": lambda: single("Gemm", (9, 5), (5, 4), (4,), dtype=np.float64),
    "matmul1": lambda: single("MatMul", (5,), (5, 4)),
    "matmul2": lambda: single("MatMul", (9, 5), (5, 4)),
    "matmul3": lambda: single("MatMul", (2, 6, 5), (5, 4)),
    "matmul4": lambda: single("MatMul", (2, 3, 4, 5), (5, 4)),
    "matmul-fp16": lambda: single("MatMul", (2, 6, 5), (5, 4), dtype=np.float16),
    "matmul-fp64": lambda: single("MatMul", (2, 6, 5), (5, 4), dtype=np.float64),
    "left2": lambda: single("MatMul", (5, 9), (4, 5), left=True),
    "left3": lambda: single("MatMul", (2, 5, 6), (4, 5), left=True),
    "batched": lambda: single("MatMul", (3, 6, 5), (3, 5, 4)),
    "batched-more": lambda: single("MatMul", (2, 3, 6, 5), (3, 5, 4)),
    "batched-broadcast": lambda: single("MatMul", (7, 5), (3, 5, 4)),
    "batched-two": lambda: single("MatMul", (2, 3, 6, 5), (2, 3, 5, 4)),
    "batched-one-first": lambda: single("MatMul", (2, 3, 6, 5), (1, 3, 5, 4)),
    "batched-one-last": lambda: single("MatMul", (2, 3, 6, 5), (2, 1, 5, 4)),
    "batched-partly": lambda: single("MatMul", (1, 3, 6, 5), (2, 3, 5, 4)),
    "left-batched": lambda: single("MatMul", (3, 5, 6), (3, 4, 5), left=True),
    "left-batched-broadcast": lambda: single("MatMul", (5, 6), (3, 4, 5), left=True),
    "left-batched-more": lambda: single("MatMul", (2, 3, 5, 6), (3, 4, 5), left=True),
}
"""One layer of every kind that the operator table knows."""


def linear(name: str, x: str, y: str, tensors: dict[str, Array], cols: int, rows: int, seed: int) -> NodeProto:
    """A Gemm node called `name`; its weight and bias are added to `tensors`."""
    tensors[f"{name}.w"] = random(seed, cols, rows) / np.sqrt(cols).astype(np.float32)
    tensors[f"{name}.b"] = random(seed + 1, rows)
    return helper.make_node("Gemm", [x, f"{name}.w", f"{name}.b"], [y], name=name)


def chain(depth: int, width: int = 8) -> ModelProto:
    """`depth` layers with a Relu behind each."""
    tensors: dict[str, Array] = {}
    nodes = []
    x = "x"
    for i in range(depth):
        nodes.append(linear(f"fc{i}", x, f"h{i}", tensors, width, width, 10 * i))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"a{i}"], name=f"relu{i}"))
        x = f"a{i}"
    return build([*nodes, helper.make_node("Identity", [x], ["out"])], {"x": ("n", width)}, ["out"], tensors)


def residual(depth: int = 3, width: int = 8) -> ModelProto:
    """Blocks that add their input to their output."""
    tensors: dict[str, Array] = {}
    nodes = []
    x = "x"
    for i in range(depth):
        nodes.append(linear(f"in{i}", x, f"h{i}", tensors, width, width, 10 * i))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"a{i}"]))
        nodes.append(linear(f"out{i}", f"a{i}", f"o{i}", tensors, width, width, 10 * i + 5))
        nodes.append(helper.make_node("Add", [x, f"o{i}"], [f"s{i}"]))
        x = f"s{i}"
    return build([*nodes, helper.make_node("Identity", [x], ["out"])], {"x": ("n", width)}, ["out"], tensors)


def branching(width: int = 8) -> ModelProto:
    """Two branches of different depth that meet, two inputs, two outputs, and an early output that no layer reads."""
    tensors: dict[str, Array] = {}
    nodes = [
        helper.make_node("Tanh", ["x"], ["early"]),
        helper.make_node("Add", ["x", "z"], ["sum"]),
        linear("a0", "sum", "a0_", tensors, width, width, 0),
        helper.make_node("Relu", ["a0_"], ["a1_"]),
        linear("a1", "a1_", "a2_", tensors, width, width, 10),
        linear("b0", "x", "b0_", tensors, width, width, 20),
        helper.make_node("Concat", ["a2_", "b0_"], ["both"], axis=1),
        linear("c0", "both", "out", tensors, 2 * width, 4, 30),
    ]
    return build(nodes, {"x": ("n", width), "z": ("n", width)}, ["early", "out"], tensors)


def shared_weight(op: str = "Gemm", width: int = 8) -> ModelProto:
    """Two nodes side by side, at different depths, that read one weight."""
    tensors = {"shared.w": random(1, width, width) / np.float32(width**0.5)}
    nodes = [
        linear("first", "x", "h", tensors, width, width, 20),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node(op, ["x", "shared.w"], ["left"], name="left"),
        helper.make_node(op, ["a", "shared.w"], ["right"], name="right"),
        helper.make_node("Sub", ["left", "right"], ["sum"]),
        linear("last", "sum", "out", tensors, width, 4, 40),
    ]
    return build(nodes, {"x": ("n", width)}, ["out"], tensors)


def with_if(width: int = 8) -> ModelProto:
    """An If between layers, whose branches read tensors and a constant of the graph around them."""
    tensors: dict[str, Array] = {"half": np.array(0.5, np.float32), "zero": np.array(0.0, np.float32)}
    branches: dict[str, Any] = {
        "then_branch": helper.make_graph([helper.make_node("Add", ["h", "x"], ["t"])], "then", [], [value("t", None)]),
        "else_branch": helper.make_graph([helper.make_node("Mul", ["h", "half"], ["e"])], "else", [], [value("e", None)]),
    }
    nodes = [
        linear("before", "x", "h", tensors, width, width, 0),
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Greater", ["mean", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["chosen"], name="if", **branches),
        linear("after", "chosen", "g", tensors, width, width, 10),
        helper.make_node("Relu", ["g"], ["r"]),
        linear("last", "r", "out", tensors, width, 4, 20),
    ]
    return build(nodes, {"x": ("n", width)}, ["out"], tensors)


def with_sequence(width: int = 8) -> ModelProto:
    """A sequence of tensors that crosses a layer."""
    tensors: dict[str, Array] = {"one": np.array(1), "zero": np.array(0)}
    nodes = [
        helper.make_node("Tanh", ["x"], ["t"]),
        helper.make_node("SequenceConstruct", ["x", "t"], ["pair"]),
        helper.make_node("SequenceAt", ["pair", "one"], ["second"]),
        linear("before", "second", "h", tensors, width, width, 0),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("SequenceAt", ["pair", "zero"], ["kept"]),
        helper.make_node("SequenceInsert", ["pair", "r"], ["three"]),
        linear("middle", "r", "m", tensors, width, width, 10),
        helper.make_node("ConcatFromSequence", ["three"], ["all"], axis=1),
        helper.make_node("Concat", ["all", "m", "kept"], ["wide"], axis=1),
        linear("last", "wide", "out", tensors, 5 * width, 4, 20),
    ]
    return build(nodes, {"x": ("n", width)}, ["out"], tensors)


def convnet(seed: int = 0) -> ModelProto:
    """Two convolutions with BatchNorm nodes, then a classifier: [n, 3, 8, 8] -> [n, 10]."""
    tensors: dict[str, Array] = {}
    nodes = []
    x, channels = "x", 3
    for i, width in enumerate((8, 16)):
        tensors[f"conv{i}.w"] = random(seed + i, width, channels, 3, 3) / np.float32((9 * channels) ** 0.5)
        for j, what in enumerate(("scale", "bias", "mean", "var")):
            tensors[f"bn{i}.{what}"] = np.abs(random(seed + 10 * i + j, width)) + np.float32(0.5)
        nodes.append(helper.make_node("Conv", [x, f"conv{i}.w"], [f"c{i}"], name=f"conv{i}", pads=[1, 1, 1, 1]))
        norms = [f"bn{i}.{what}" for what in ("scale", "bias", "mean", "var")]
        nodes.append(helper.make_node("BatchNormalization", [f"c{i}", *norms], [f"n{i}"], name=f"bn{i}"))
        nodes.append(helper.make_node("Relu", [f"n{i}"], [f"r{i}"]))
        x, channels = f"r{i}", width
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(linear("fc", "flat", "out", tensors, channels, 10, seed + 50))
    return build(nodes, {"x": ("n", 3, 8, 8)}, ["out"], tensors)


def save(model: ModelProto, path: Any, *, data: str | None = None) -> None:
    """Writes a model; with `data`, all its tensors go to that file beside it."""
    external: dict[str, Any] = {"save_as_external_data": True, "location": data, "size_threshold": 0} if data else {}
    onnx.save_model(clone(model), str(path), **external)


def signed_zeros(array: Array) -> Iterator[bool]:
    """The sign bit of every zero."""
    yield from np.signbit(array[array == 0]).tolist()


def with_constants(width: int = 8) -> ModelProto:
    """Layers whose weights and other operands are computed from constants, some of them read on both sides of a layer."""
    tensors = {
        "w1": random(1, width, width),
        "w2": random(2, width, width),
        "c": random(3, width),
        "two": np.array(2, np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["w1"], ["w1t"]),
        helper.make_node("Mul", ["c", "two"], ["doubled"]),
        helper.make_node("Exp", ["doubled"], ["scale"]),
        constant("eighth", np.array(0.125, np.float32)),
        helper.make_node("Mul", ["x", "scale"], ["a"]),
        helper.make_node("MatMul", ["a", "w1t"], ["b"], name="first"),
        helper.make_node("Mul", ["b", "eighth"], ["d"]),
        helper.make_node("Add", ["d", "scale"], ["e"]),
        helper.make_node("Identity", ["w2"], ["w2i"]),
        helper.make_node("MatMul", ["e", "w2i"], ["f"], name="second"),
        helper.make_node("Mul", ["f", "eighth"], ["g"]),
        linear("last", "g", "out", tensors, width, 4, 20),
    ]
    return build(nodes, {"x": ("n", width)}, ["out"], tensors)


def with_function(width: int = 8) -> ModelProto:
    """A model-local function between two layers."""
    tensors: dict[str, Array] = {}
    body = [helper.make_node("Tanh", ["a"], ["t"]), helper.make_node("Add", ["a", "t"], ["b"])]
    function = helper.make_function("local", "Block", ["a"], ["b"], body, [helper.make_opsetid("", OPSET)])
    nodes = [
        linear("first", "x", "h", tensors, width, width, 0),
        helper.make_node("Block", ["h"], ["r"], domain="local"),
        linear("last", "r", "out", tensors, width, 4, 20),
    ]
    return build(nodes, {"x": ("n", width)}, ["out"], tensors, functions=[function])


NETWORKS: Final[Mapping[str, Callable[[], ModelProto]]] = {
    "chain": lambda: chain(4),
    "residual": residual,
    "branching": branching,
    "shared": shared_weight,
    "shared-matmul": lambda: shared_weight("MatMul"),
    "if": with_if,
    "sequence": with_sequence,
    "constants": with_constants,
    "function": with_function,
    "convnet": convnet,
}
"""Whole networks of several layers, batch axis first."""


def feeds_of(model: ModelProto, samples: int, seed: int = 0) -> dict[str, Array]:
    """Random samples for a network; the batch axis gets the given length."""
    initializers = {t.name for t in model.graph.initializer}
    feeds = {}
    for i, info in enumerate(info for info in model.graph.input if info.name not in initializers):
        sizes = [dim.dim_value for dim in info.type.tensor_type.shape.dim][1:]
        feeds[info.name] = random(seed + i, samples, *sizes)
    return feeds
