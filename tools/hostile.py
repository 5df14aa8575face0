"""Hostile models for `tools/fuzz.py`: sound ones (`hostile_bases.py`), damaged by a seed in one to three places.

Every file is a pure function of its kind and its seed, calibration data (`hostile_data.py`) too.  Models live in `FOLDER/model`;
what must never be read lies beside it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from tools.hostile_bases import BASES, Random

ODD: Final = (-(2**63), -(2**31), -3, -1, 0, 1, 2, 3, 5, 64, 255, 65537, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
NAMES: Final = ("", "x", "y", "evil\x1b[2J\x07name", "a\nb\rc", "[red]m[/red]", "\u202egnp", "n" * 300, "../w", "<b>&amp;</b>")
ADDED: Final = (
    "group", "transA", "transB", "axis", "to", "allowzero", "alpha", "beta", "auto_pad", "kernel_shape", "pads", "strides",
    "dilations", "output_padding", "output_shape", "perm", "epsilon", "training_mode",
)  # fmt: skip
OUTSIDE: Final = "outside/secret.bin"
"""Inside the case's folder, beside the model's."""


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
        name, shape = str(pick(rng, [*_strings(model), *NAMES])), [pick(rng, ODD)] * int(rng.integers(0, 6))
        graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
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


def base_of(seed: int) -> Callable[[Random], ModelProto]:
    """The sound model that a seed damages."""
    return BASES[seed % len(BASES)]


def write_model(seed: int, folder: Path) -> tuple[Path, str]:
    """A damaged model in `folder/model`, and what was done to it."""
    rng = np.random.default_rng([1, seed])
    inside = folder / "model"
    inside.mkdir()
    (folder / OUTSIDE).parent.mkdir()
    base = base_of(seed)
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
