"""An ONNX graph run by torch, for its autograd: an independent path to gradients and to the time of a step.

No command of its own: see `refine.py` and tests/test_torch.py.  Only the operators of the models that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch.nn import functional

Tensors = dict[str, Any]


def values_of(model: ModelProto) -> Tensors:
    """The stored tensors, by name."""
    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = torch.from_numpy(np.array(numpy_helper.to_array(node.attribute[0].t)))
    return found


def run(model: ModelProto, values: Tensors) -> Tensors:
    """Every tensor of the graph, from its inputs and stored tensors, which may be other than the model's own."""
    known = dict(values)
    for node in model.graph.node:
        if node.op_type != "Constant":
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            inputs = [known[name] if name else None for name in node.input]
            known[node.output[0]] = OPERATORS[node.op_type](node, inputs, attributes)
    return known


def _pads(pads: Sequence[int]) -> list[int]:
    """ONNX order (begins, then ends) to torch's (last axis first, begin and end)."""
    count = len(pads) // 2
    return [int(p) for i in reversed(range(count)) for p in (pads[i], pads[count + i])]


def _windowed(x: Any, a: Mapping[str, Any], kernel: Sequence[int], fill: float) -> Any:
    """The input with its padding written out."""
    if a.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        total = [
            max(0, (-(-n // s) - 1) * s + k - n) for n, s, k in zip(x.shape[2:], a.get("strides", [1, 1]), kernel, strict=True)
        ]
        late = a["auto_pad"] == b"SAME_LOWER"
        begins = [(n + late) // 2 for n in total]
        return functional.pad(x, _pads([*begins, *(n - b for n, b in zip(total, begins, strict=True))]), value=fill)
    return functional.pad(x, _pads(a.get("pads", [0] * 2 * len(kernel))), value=fill)


def _conv(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    x = _windowed(i[0], a, i[1].shape[2:], 0.0)
    bias = i[2] if len(i) > 2 else None
    return functional.conv2d(x, i[1], bias, a.get("strides", 1), 0, a.get("dilations", 1), a.get("group", 1))


def _average_pool(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    kernel, strides = a["kernel_shape"], a.get("strides", [1] * len(a["kernel_shape"]))
    return functional.avg_pool2d(_windowed(i[0], a, kernel, 0.0), kernel, strides)


def _batch_norm(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    return functional.batch_norm(i[0], i[3], i[4], i[1], i[2], False, 0.0, a.get("epsilon", 1e-5))


def _gemm(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    left, right = (i[0].T if a.get("transA") else i[0]), (i[1].T if a.get("transB") else i[1])
    product = a.get("alpha", 1.0) * (left @ right)
    return product + a.get("beta", 1.0) * i[2] if len(i) > 2 else product


def _slice(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    starts, ends = i[1].tolist(), i[2].tolist()
    axes = i[3].tolist() if len(i) > 3 else list(range(len(starts)))
    steps = i[4].tolist() if len(i) > 4 else [1] * len(starts)
    x = i[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = range(x.shape[axis])[start:end:step]
        x = torch.index_select(x, axis, torch.tensor(list(places)))
    return x


def _reshape(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    return i[0].reshape([i[0].shape[k] if n == 0 else n for k, n in enumerate(i[1].tolist())])


def _unsqueeze(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    x = i[0]
    for axis in sorted(i[1].reshape(-1).tolist()):
        x = x.unsqueeze(axis)
    return x


def _reduce_mean(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    axes = i[1].tolist() if len(i) > 1 else a["axes"]
    return i[0].mean(axes, keepdim=bool(a.get("keepdims", 1)))


def _gather(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    axis, index = a.get("axis", 0), i[1]
    taken = torch.index_select(i[0], axis, index.reshape(-1))
    return taken.reshape([*i[0].shape[:axis], *index.shape, *i[0].shape[axis + 1 :]])


def _layer_norm(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    shape = i[0].shape[a.get("axis", -1) :]
    return functional.layer_norm(i[0], shape, i[1], i[2] if len(i) > 2 else None, a.get("epsilon", 1e-5))


def _cast(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    return i[0].to(torch.from_numpy(np.zeros(1, helper.tensor_dtype_to_np_dtype(a["to"]))).dtype)


def _constant_of_shape(node: NodeProto, i: list[Any], a: Mapping[str, Any]) -> Any:
    fill = torch.from_numpy(np.array(numpy_helper.to_array(a["value"]))) if "value" in a else torch.zeros(1)
    return torch.full(i[0].tolist(), fill.item(), dtype=fill.dtype)


OPERATORS: Final[Mapping[str, Callable[[NodeProto, list[Any], Mapping[str, Any]], Any]]] = {
    "Add": lambda n, i, a: i[0] + i[1],
    "Sub": lambda n, i, a: i[0] - i[1],
    "Mul": lambda n, i, a: i[0] * i[1],
    "Div": lambda n, i, a: i[0] / i[1],
    "Identity": lambda n, i, a: i[0],
    "Relu": lambda n, i, a: torch.relu(i[0]),
    "Gelu": lambda n, i, a: functional.gelu(i[0], approximate=a.get("approximate", b"none").decode()),
    "Erf": lambda n, i, a: torch.erf(i[0]),
    "Softmax": lambda n, i, a: torch.softmax(i[0], a.get("axis", -1)),
    "Conv": _conv,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Gemm": _gemm,
    "MatMul": lambda n, i, a: i[0] @ i[1],
    "ReduceMean": _reduce_mean,
    "Flatten": lambda n, i, a: i[0].flatten(a.get("axis", 1)),
    "Transpose": lambda n, i, a: i[0].permute(a["perm"]),
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda n, i, a: torch.cat(i, a["axis"]),
    "Slice": _slice,
    "Pad": lambda n, i, a: functional.pad(i[0], _pads(i[1].tolist())),
    "Gather": _gather,
    "Shape": lambda n, i, a: torch.tensor(i[0].shape[a.get("start", 0) : a.get("end")]),
    "Cast": _cast,
    "ConstantOfShape": _constant_of_shape,
}
