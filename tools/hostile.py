"""Hostile models for `tools/fuzz.py`: small sound ones, damaged by a seed in one to three places (data: `hostile_data.py`).

Every file is a pure function of its kind and its seed.  Models live in `FOLDER/model`; what must never be read lies beside it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from relrep_onnx.types import Array

Random = np.random.Generator

ODD: Final = (-(2**63), -(2**31), -3, -1, 0, 1, 2, 3, 5, 64, 255, 65537, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
NAMES: Final = ("", "x", "y", "evil\x1b[2J\x07name", "a\nb\rc", "[red]m[/red]", "\u202egnp", "n" * 300, "../w", "<b>&amp;</b>")
ADDED: Final = (
    "group", "transA", "transB", "axis", "to", "allowzero", "alpha", "beta", "auto_pad", "kernel_shape", "pads", "strides",
    "dilations", "output_padding", "output_shape", "perm", "epsilon", "training_mode",
)  # fmt: skip
OUTSIDE: Final = "outside/secret.bin"
"""Inside the case's folder, beside the model's."""


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


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for item in node.attribute:
            for inner in (item.g, *item.graphs) if item.HasField("g") or item.graphs else ():
                yield from _graphs(inner)


def pick(rng: Random, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))] if len(items) else None


def _nodes(model: ModelProto) -> list[NodeProto]:
    inside = [node for function in model.functions for node in function.node]
    return [node for graph in _graphs(model.graph) for node in graph.node] + inside


def _tensors(model: ModelProto) -> list[TensorProto]:
    found = [t for graph in _graphs(model.graph) for t in graph.initializer]
    found += [t for s in model.graph.sparse_initializer for t in (s.values, s.indices)]
    return found + [item.t for node in _nodes(model) for item in node.attribute if item.HasField("t")]


def _strings(model: ModelProto) -> list[str]:
    return [name for node in _nodes(model) for name in (*node.input, *node.output)] + [t.name for t in _tensors(model)]


def change_dims(rng: Random, model: ModelProto) -> None:
    """A stored tensor of another shape."""
    tensor = pick(rng, _tensors(model))
    if tensor is None:
        return
    what = rng.integers(5)
    if what == 0 or not tensor.dims:
        tensor.dims.append(pick(rng, ODD))
    elif what == 1:
        del tensor.dims[int(rng.integers(len(tensor.dims)))]
    elif what == 2:
        tensor.dims[:] = list(tensor.dims)[::-1]
    elif what == 3:
        tensor.dims[:] = [2**32, 2**32, 0 if rng.random() < 0.3 else 4]
    else:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = pick(rng, ODD)


def change_values(rng: Random, model: ModelProto) -> None:
    """NaN, infinities, extremes, or too few or too many bytes."""
    tensor = pick(rng, _tensors(model))
    if tensor is None:
        return
    raw, what = bytearray(tensor.raw_data), rng.integers(6)
    if what == 0:
        tensor.data_type = int(rng.integers(-1, 30))
    elif what == 1:
        tensor.raw_data = bytes(raw[: int(rng.integers(len(raw) + 1))])
    elif what == 2:
        tensor.raw_data = bytes(raw) + b"\x7f" * int(rng.integers(1, 40))
    elif what == 3:
        tensor.ClearField("raw_data")
        tensor.float_data.extend([float("nan")] * int(rng.integers(3)))
        tensor.int32_data.extend([int(v) for v in rng.integers(-(2**31), 2**31, int(rng.integers(3)))])
    elif len(raw) >= 4:
        odd = pick(rng, [float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, -0.0])
        place = 4 * int(rng.integers(len(raw) // 4))
        whole = what == 5
        raw[0 if whole else place : None if whole else place + 4] = struct.pack("<f", odd) * (len(raw) // 4 if whole else 1)
        tensor.raw_data = bytes(raw)


def change_attribute(rng: Random, model: ModelProto) -> None:
    """An attribute removed, doubled, renamed, of another type, or with an odd value."""
    node = pick(rng, [node for node in _nodes(model) if node.attribute])
    if node is None:
        return
    item = pick(rng, node.attribute)
    what = rng.integers(6)
    if what == 0:
        node.attribute.remove(item)
    elif what == 1:
        node.attribute.add().CopyFrom(item)
    elif what == 2:
        item.name = str(pick(rng, [*NAMES, "group", "pads", "transB", "to", "perm", "shape", "value"]))
    elif what == 3:
        item.type = int(rng.integers(0, 15))
    elif item.ints:
        item.ints[int(rng.integers(len(item.ints)))] = pick(rng, ODD)
        if rng.random() < 0.2:
            item.ints.extend([pick(rng, ODD)] * int(rng.integers(1, 5)))
    elif item.type == AttributeProto.INT:
        item.i = pick(rng, ODD)
    elif item.type == AttributeProto.FLOAT:
        item.f = pick(rng, [0.0, float("nan"), float("inf"), -1.0, 1e-45, 3e38])
    else:
        item.ClearField("t")


def add_attribute(rng: Random, model: ModelProto) -> None:
    """An attribute that was not there, with odd values."""
    node = pick(rng, _nodes(model))
    if node is None:
        return
    name = pick(rng, ADDED)
    value: Any = pick(rng, ODD)
    if name in ("alpha", "beta", "epsilon"):
        value = float(pick(rng, [0.0, float("nan"), float("inf"), -1.0, 1e-45]))
    elif name == "auto_pad":
        value = pick(rng, ["SAME_UPPER", "SAME_LOWER", "VALID", "", "\xff", "OTHER"])
    elif name.endswith(("s", "shape", "padding", "perm")):
        value = [pick(rng, ODD) for _ in range(int(rng.integers(0, 6)))]
        value = value or [1]
    node.attribute.append(helper.make_attribute(name, value))


def change_node(rng: Random, model: ModelProto) -> None:
    """A node removed, doubled, out of order, of another kind, or wired otherwise; cycles too."""
    graph = pick(rng, list(_graphs(model.graph)))
    nodes = graph.node
    if not nodes:
        return
    index = int(rng.integers(len(nodes)))
    node, what = nodes[index], rng.integers(9)
    if what == 0:
        del nodes[index]
    elif what == 1:
        nodes.insert(int(rng.integers(len(nodes) + 1)), node)
    elif what == 2:
        order = [NodeProto.FromString(nodes[i].SerializeToString()) for i in rng.permutation(len(nodes))]
        del nodes[:]
        nodes.extend(order)
    elif what == 3:
        node.op_type = str(pick(rng, [*(n.op_type for n in nodes), "Identity", "Constant", "MatMul", "NoSuchOp", "Loop", ""]))
    elif what == 4:
        node.domain = str(pick(rng, ["ai.onnx", "com.microsoft", "ai.onnx.ml", "no.such", "\x1b"]))
    elif what == 5 and node.input:
        node.input[int(rng.integers(len(node.input)))] = pick(rng, [*_strings(model), *NAMES])
    elif what == 6 and node.output:
        node.output[int(rng.integers(len(node.output)))] = pick(rng, [*_strings(model), *NAMES])
    elif what == 7:
        field = node.input if rng.random() < 0.6 else node.output
        if field:
            del field[int(rng.integers(len(field))) :]
    else:
        node.name = str(pick(rng, NAMES))


def add_loop(rng: Random, model: ModelProto) -> None:
    """Nodes in a circle, or a very long chain, in front of a weight."""
    node = pick(rng, [n for n in model.graph.node if len(n.input) > 1])
    if node is None:
        return
    kind = str(pick(rng, ["Identity", "Transpose", "Relu"]))
    if rng.random() < 0.7:
        names = [f"loop{i}" for i in range(int(rng.integers(1, 4)))]
    else:
        names = [node.input[1], *(f"chain{i}" for i in range(3000))]
    closed = names[-1:] if names[0].startswith("loop") else []
    added = [helper.make_node(kind, [a], [b]) for a, b in zip([*closed, *names], names[1 - len(closed) :], strict=False)]
    for number, extra in enumerate(added):
        model.graph.node.insert(number, extra)
    node.input[1] = names[-1]


def change_value(rng: Random, model: ModelProto) -> None:
    """An input, an output or an inner value removed, doubled, renamed, or of another type or shape."""
    graph = pick(rng, list(_graphs(model.graph)))
    values = pick(rng, [graph.input, graph.output, graph.value_info])
    if not values:
        graph.value_info.append(_value(str(pick(rng, [*_strings(model), *NAMES])), [pick(rng, ODD)] * int(rng.integers(0, 6))))
        return
    value, what = pick(rng, values), rng.integers(6)
    dims = value.type.tensor_type.shape.dim
    if what == 0:
        values.remove(value)
    elif what == 1:
        values.add().CopyFrom(value)
    elif what == 2:
        value.name = str(pick(rng, [*_strings(model), *NAMES]))
    elif what == 3:
        value.ClearField("type")
    elif what == 4 and dims:
        pick(rng, dims).dim_value = pick(rng, ODD)
    else:
        value.type.tensor_type.elem_type = int(rng.integers(-1, 30))


def change_store(rng: Random, model: ModelProto) -> None:
    """An initializer missing, doubled or under another name."""
    tensors = pick(rng, list(_graphs(model.graph))).initializer
    if not tensors:
        return
    tensor, what = pick(rng, tensors), rng.integers(3)
    if what == 0:
        tensors.remove(tensor)
    elif what == 1:
        tensors.add().CopyFrom(tensor)
    else:
        tensor.name = str(pick(rng, [*_strings(model), *NAMES]))


def change_version(rng: Random, model: ModelProto) -> None:
    """Other versions, or none."""
    what = rng.integers(3)
    if what == 0:
        model.ir_version = pick(rng, ODD)
    elif what == 1 and model.opset_import:
        model.opset_import[0].version = pick(rng, [*ODD, 6, 7, 9, 11, 13, 21, 24])
    else:
        del model.opset_import[:]


MUTATIONS: Final = (
    change_dims, change_values, change_attribute, change_attribute, add_attribute, change_node, change_node, change_node,
    add_loop, change_value, change_store, change_version,
)  # fmt: skip


def put_outside(rng: Random, model: ModelProto, folder: Path) -> str:
    """Stores one tensor in another file: a sound one, or one that must not be read."""
    tensor = pick(rng, [t for t in _tensors(model) if t.raw_data])
    if tensor is None:
        return "nothing to store"
    content, inside = tensor.raw_data, folder / "model"
    (inside / "data.bin").write_bytes(bytes(8) + content)
    (folder / OUTSIDE).write_bytes(bytes(8) + content)
    links = {"link.bin": f"../{OUTSIDE}", "near.bin": "data.bin", "away": "../outside", "self": ".", "loop": "loop"}
    for name, target in links.items():
        (inside / name).symlink_to(target)
    os.mkfifo(inside / "pipe")
    location = str(pick(rng, [
        "data.bin", "data.bin", "./data.bin", "near.bin", "self/data.bin", "link.bin", "away/secret.bin", "loop", "pipe", "", ".",
        f"../{OUTSIDE}", f"self/../../{OUTSIDE}", str((folder / OUTSIDE).resolve()), "/dev/zero", "/proc/self/environ",
        "missing.bin", "model.onnx", "d\0ata.bin", "n" * 5000, f"..\\{OUTSIDE}", "*/_ORT_MEM_ADDR_/*", "?",
    ]))  # fmt: skip
    entries = {"location": location, "offset": "8", "length": str(len(content))}
    if rng.random() < 0.3:
        key = str(pick(rng, ["offset", "length", "checksum", "basepath", "key"]))
        entries[key] = str(pick(rng, [*ODD, "", "abc", "1e3", "9" * 5000, "\u0663", str(folder / "outside")]))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return f"external data in {location[:60]!r}"


def flip_bytes(rng: Random, content: bytes) -> bytes:
    """Bytes flipped, cut off, repeated or pushed in."""
    changed, what = bytearray(content), rng.integers(6)
    if what == 0:
        return bytes(changed[: int(rng.integers(len(changed) + 1))])
    first, last = sorted(int(v) for v in rng.integers(0, len(changed) + 1, 2))
    if what == 1:
        return bytes(changed[:last] + changed[first:])
    if what == 2:
        changed[first:first] = rng.bytes(int(rng.integers(1, 20)))
    for _ in range(int(rng.integers(1, 9))):
        changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
    return bytes(changed)


def write_model(seed: int, folder: Path) -> tuple[Path, str]:
    """A damaged model in `folder/model`, and what was done to it."""
    rng = np.random.default_rng([1, seed])
    inside = folder / "model"
    inside.mkdir()
    (folder / OUTSIDE).parent.mkdir()
    base = BASES[seed % len(BASES)]
    model, done = base(rng), [base.__name__]
    path = inside / "model.onnx"
    if rng.random() < 0.15:
        done.append(put_outside(rng, model, folder))
    flips = rng.random() < 0.25
    for _ in range(0 if flips else int(pick(rng, [1, 1, 1, 2, 3])) - (len(done) > 1)):
        mutation = pick(rng, MUTATIONS)
        try:
            mutation(rng, model)
        except ValueError:  # protobuf holds only what fits its fields
            continue
        done.append(mutation.__name__)
    content = model.SerializeToString()
    path.write_bytes(flip_bytes(rng, content) if flips else content)
    return path, ", ".join([*done, *["bytes flipped"] * flips])
