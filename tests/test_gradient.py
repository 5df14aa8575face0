"""Gradient rules against central differences in float64, on the onnx reference evaluator; whole networks against torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from relrep_onnx.gradient import RULES, Reach, gradient_model
from relrep_onnx.graph import Graph
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Array, Feeds, FloatArray, ModelError
from tests.models import random

STEP = 1e-5
TOLERANCE = 1e-6
OPSET = 21

Draw = st.DataObject


@dataclass(frozen=True)
class Case:
    """One node: the arrays it is differentiated by, its other inputs, its attributes."""

    moving: Sequence[Array]
    fixed: Sequence[Array] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    before: int = 0
    """How many of the fixed inputs come before the moving ones."""
    outputs: int = 1


def numbers(draw: Draw, shape: Sequence[int], low: float = -2.0, high: float = 2.0) -> FloatArray:
    """Distinct values, none near 0, 1 or 3 where activations have kinks."""
    rng = np.random.default_rng(draw.draw(st.integers(0, 10_000)))
    count = math.prod(shape)
    grid = low + (high - low) * (rng.permutation(count) + 0.3 + 0.4 * rng.random(count)) / max(1, count)
    kinks = np.round(grid)
    grid = np.where(np.abs(grid - kinks) < 0.01, grid + 0.02, grid)
    return np.asarray(grid.reshape(tuple(shape)), np.float64)


def shape(draw: Draw, low: int = 1, high: int = 3, size: int = 3) -> tuple[int, ...]:
    return tuple(draw.draw(st.lists(st.integers(1, size), min_size=low, max_size=high)))


def broadcast(draw: Draw, low: float = -2.0, high: float = 2.0) -> Case:
    full = shape(draw)
    ones = [1 if draw.draw(st.booleans()) else n for n in full][draw.draw(st.integers(0, len(full) - 1)) :]
    pair = [numbers(draw, full, low, high), numbers(draw, ones, low, high)]
    return Case(pair[:: draw.draw(st.sampled_from([1, -1]))])


def elementwise(low: float = -2.0, high: float = 2.0, **attributes: Any) -> Callable[[Draw], Case]:
    return lambda draw: Case([numbers(draw, shape(draw), low, high)], attributes=attributes)


def power(draw: Draw) -> Case:
    base = numbers(draw, shape(draw), 0.3, 2.0)
    return Case([base, numbers(draw, base.shape, 0.5, 3.0)])


def several(draw: Draw) -> Case:
    full = shape(draw)
    # Far enough apart that no operand ties with another.
    return Case([numbers(draw, full), numbers(draw, full, 5.3, 9.7) - 7.5, numbers(draw, full[-1:], -1.9, 2.2) * 1.1])


def where(draw: Draw) -> Case:
    full = shape(draw)
    condition = np.asarray(numbers(draw, full) > 0)
    return Case([numbers(draw, full), numbers(draw, full[-1:])], [condition], before=1)


def leaning(draw: Draw) -> Case:
    return Case([numbers(draw, shape(draw))], attributes={"alpha": draw.draw(st.sampled_from([0.01, 0.3]))})


def clip(draw: Draw) -> Case:
    low = np.array(-0.95)
    return Case([numbers(draw, shape(draw))], [low, np.array(1.05)] if draw.draw(st.booleans()) else [low])


def gelu(draw: Draw) -> Case:
    return Case([numbers(draw, shape(draw))], attributes={"approximate": draw.draw(st.sampled_from(["none", "tanh"]))})


def softmax(draw: Draw) -> Case:
    x = numbers(draw, shape(draw))
    return Case([x], attributes={"axis": draw.draw(st.integers(-x.ndim, x.ndim - 1))})


def conv(draw: Draw) -> Case:
    axes = draw.draw(st.integers(1, 2))
    group = draw.draw(st.sampled_from([1, 1, 2]))
    rows, inner = group * draw.draw(st.integers(1, 2)), draw.draw(st.integers(1, 2))
    kernel, strides, dilations = (tuple(draw.draw(st.integers(1, n)) for _ in range(axes)) for n in (3, 3, 2))
    pads = tuple(draw.draw(st.integers(0, 2)) for _ in range(2 * axes))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    sides = [r + draw.draw(st.integers(0, 3)) for r in reach]
    x = numbers(draw, (draw.draw(st.integers(1, 2)), group * inner, *sides))
    attributes = {"group": group, "strides": strides, "dilations": dilations, "pads": pads}
    moving = [x, numbers(draw, (rows, inner, *kernel))]
    return Case(moving + [numbers(draw, (rows,))] * draw.draw(st.integers(0, 1)), attributes=attributes)


def conv_transpose(draw: Draw) -> Case:
    axes = draw.draw(st.integers(1, 2))
    group = draw.draw(st.sampled_from([1, 1, 2]))
    inner, outer = draw.draw(st.integers(1, 2)), draw.draw(st.integers(1, 2))
    kernel, strides = (tuple(draw.draw(st.integers(1, 3)) for _ in range(axes)) for _ in range(2))
    pads = tuple(draw.draw(st.integers(0, 1)) for _ in range(2 * axes))
    sides = [draw.draw(st.integers(2, 3)) for _ in range(axes)]
    extra = [draw.draw(st.integers(0, s - 1)) for s in strides]
    for i in range(axes):
        if (sides[i] - 1) * strides[i] + kernel[i] + extra[i] - pads[i] - pads[i + axes] < 1:
            pads = (0,) * 2 * axes
    x = numbers(draw, (draw.draw(st.integers(1, 2)), group * inner, *sides))
    moving = [x, numbers(draw, (group * inner, outer, *kernel))]
    attributes = {"group": group, "strides": strides, "pads": pads, "output_padding": extra}
    return Case(moving + [numbers(draw, (group * outer,))] * draw.draw(st.integers(0, 1)), attributes=attributes)


def gemm(draw: Draw) -> Case:
    n, k, m = shape(draw, 3, 3)
    turned = [draw.draw(st.integers(0, 1)) for _ in range(2)]
    a, b = numbers(draw, (k, n) if turned[0] else (n, k)), numbers(draw, (m, k) if turned[1] else (k, m))
    c = draw.draw(st.sampled_from([None, (m,), (1, m), (n, m), (n, 1)]))
    attributes = {"transA": turned[0], "transB": turned[1], "alpha": 0.5, "beta": 2.0}
    return Case([a, b] if c is None else [a, b, numbers(draw, c)], attributes=attributes)


def matmul(draw: Draw) -> Case:
    n, k, m, p, q = shape(draw, 5, 5)
    left, right = draw.draw(
        st.sampled_from(
            [
                ((n, k), (k, m)),
                ((p, n, k), (k, m)),
                ((p, q, n, k), (k, m)),
                ((p, n, k), (p, k, m)),
                ((p, q, n, k), (q, k, m)),
                ((p, 1, n, k), (q, k, m)),
                ((n, k), (p, k, m)),
                ((k,), (k, m)),
                ((p, n, k), (k,)),
                ((k,), (k,)),
                ((k,), (p, k, m)),
            ]
        )
    )
    return Case([numbers(draw, left), numbers(draw, right)])


def batch_norm(draw: Draw) -> Case:
    x = numbers(draw, shape(draw, 2, 4))
    channel = x.shape[1:2]
    moving = [x, numbers(draw, channel, 0.5, 2), numbers(draw, channel)]
    return Case(moving, [numbers(draw, channel), numbers(draw, channel, 0.5, 2)], {"epsilon": 1e-3})


def layer_norm(draw: Draw) -> Case:
    x = numbers(draw, (*shape(draw, 1, 2), 4))
    axis = draw.draw(st.integers(-x.ndim, -1))
    moving = [x, numbers(draw, x.shape[axis:])]
    return Case(moving + [numbers(draw, x.shape[axis:])] * draw.draw(st.integers(0, 1)), attributes={"axis": axis})


def pool(draw: Draw) -> Case:
    axes = draw.draw(st.integers(1, 2))
    kernel, strides = (tuple(draw.draw(st.integers(1, 3)) for _ in range(axes)) for _ in range(2))
    pads = tuple(draw.draw(st.integers(0, k - 1)) for k in kernel * 2)
    x = numbers(draw, (*shape(draw, 2, 2, 2), *(k + draw.draw(st.integers(0, 3)) for k in kernel)))
    return Case([x], attributes={"kernel_shape": kernel, "strides": strides, "pads": pads})


def average_pool(draw: Draw) -> Case:
    case = pool(draw)
    return Case(case.moving, attributes={**case.attributes, "count_include_pad": draw.draw(st.integers(0, 1))})


def images(draw: Draw) -> Case:
    return Case([numbers(draw, shape(draw, 4, 4))])


def reduce(draw: Draw) -> Case:
    x = numbers(draw, shape(draw))
    axes = draw.draw(st.lists(st.integers(-x.ndim, x.ndim - 1), unique_by=lambda a: a % x.ndim, max_size=x.ndim))
    keep = draw.draw(st.integers(0, 1))
    return Case([x], [np.array(axes, np.int64)] if axes else [], {"keepdims": keep})


def reshape(draw: Draw) -> Case:
    x = numbers(draw, shape(draw))
    return Case([x], [np.array([-1, 1], np.int64)])


def squeeze(draw: Draw) -> Case:
    return Case([numbers(draw, (1, *shape(draw)))], [np.array([0], np.int64)])


def transpose(draw: Draw) -> Case:
    x = numbers(draw, shape(draw))
    perm = draw.draw(st.permutations(range(x.ndim)))
    return Case([x], attributes={"perm": perm} if draw.draw(st.booleans()) else {})


def concat(draw: Draw) -> Case:
    full = shape(draw)
    axis = draw.draw(st.integers(-len(full), len(full) - 1))
    parts = [numbers(draw, [n if i != axis % len(full) else k for i, n in enumerate(full)]) for k in (1, 2, 3)]
    return Case(parts, attributes={"axis": axis})


def split(draw: Draw) -> Case:
    x = numbers(draw, (2, 5))
    return Case([x], [np.array([2, 1, 2], np.int64)], {"axis": draw.draw(st.sampled_from([1, -1]))}, outputs=3)


def cut(draw: Draw) -> Case:
    x = numbers(draw, shape(draw, 1, 3, 6))
    axes = draw.draw(st.lists(st.integers(0, x.ndim - 1), unique=True, min_size=1, max_size=x.ndim))
    bounds = []
    for axis in axes:
        n, step = x.shape[axis], draw.draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        first = draw.draw(st.integers(0, n - 1))
        last = draw.draw(st.integers(first + 1, n + 2) if step > 0 else st.integers(-n - 3, first - 1 - n))
        bounds.append((first - n * draw.draw(st.integers(0, 1)), last, axis - x.ndim * draw.draw(st.integers(0, 1)), step))
    return Case([x], [np.array(part, np.int64) for part in zip(*bounds, strict=True)])


def pad(draw: Draw) -> Case:
    x = numbers(draw, shape(draw, 1, 3, 4))
    pads = np.array([draw.draw(st.integers(0, 2)) for _ in range(2 * x.ndim)], np.int64)
    return Case([x], [pads, np.array(0.5)])


def gather(draw: Draw) -> Case:
    x = numbers(draw, shape(draw))
    axis = draw.draw(st.integers(-x.ndim, x.ndim - 1))
    n = x.shape[axis]
    index = np.array(draw.draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=4)), np.int64)
    return Case([x], [index.reshape(draw.draw(st.sampled_from([(-1,), (1, -1)])))], {"axis": axis})


def expand(draw: Draw) -> Case:
    return Case([numbers(draw, (*shape(draw, 2, 2)[:1], 1))], [np.array([2, 1, 3], np.int64)])


def cast(draw: Draw) -> Case:
    return Case([numbers(draw, shape(draw))], attributes={"to": 11})


def cast_like(draw: Draw) -> Case:
    return Case([numbers(draw, shape(draw))], [np.array(1.0)])


CASES: Mapping[str, Callable[[Draw], Case]] = {
    "Add": broadcast,
    "Sub": broadcast,
    "Mul": broadcast,
    "Div": lambda draw: broadcast(draw, 0.5, 2.0),
    "Pow": power,
    "Sum": several,
    "Max": several,
    "Min": several,
    "Where": where,
    "Neg": elementwise(),
    "Abs": elementwise(),
    "Reciprocal": elementwise(0.5, 2.0),
    "Sqrt": elementwise(0.5, 2.0),
    "Exp": elementwise(),
    "Log": elementwise(0.5, 2.0),
    "Sin": elementwise(),
    "Cos": elementwise(),
    "Erf": elementwise(),
    "Relu": elementwise(),
    "LeakyRelu": leaning,
    "Clip": clip,
    "Sigmoid": elementwise(),
    "HardSigmoid": elementwise(-4.0, 4.0, alpha=0.3, beta=0.45),
    "HardSwish": elementwise(-5.0, 5.0),
    "Tanh": elementwise(),
    "Gelu": gelu,
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "BatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "AveragePool": average_pool,
    "MaxPool": pool,
    "GlobalAveragePool": images,
    "GlobalMaxPool": images,
    "ReduceMean": reduce,
    "ReduceSum": reduce,
    "ReduceMax": reduce,
    "ReduceMin": reduce,
    "Reshape": reshape,
    "Flatten": elementwise(),
    "Squeeze": squeeze,
    "Unsqueeze": squeeze,
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": cut,
    "Pad": pad,
    "Gather": gather,
    "Expand": expand,
    "Identity": elementwise(),
    "Dropout": elementwise(),
    "Cast": cast,
    "CastLike": cast_like,
}


def group_of(options: Mapping[str, Any]) -> int:
    return int(options.get("group") or 1)


class Erf(OpRun):
    """In float64: the evaluator's own gives float32."""

    op_domain = ""

    def _run(self, x: FloatArray) -> tuple[FloatArray]:
        return (np.vectorize(math.erf, otypes=[np.float64])(x),)


class Gelu(OpRun):
    """In float64, as above."""

    op_domain = ""

    def _run(self, x: FloatArray, approximate: str = "none") -> tuple[FloatArray]:
        if approximate == "tanh":
            return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
        return (0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))),)


class Conv(OpRun):
    """Window by window: the evaluator's own fails on some shapes with groups."""

    op_domain = ""

    def _run(self, x: FloatArray, w: FloatArray, b: FloatArray | None = None, **options: Any) -> tuple[FloatArray]:
        count = w.ndim - 2
        strides, dilations = (options.get(name) or [1] * count for name in ("strides", "dilations"))
        pads, group = options.get("pads") or [0] * 2 * count, group_of(options)
        x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:count], pads[count:], strict=True)])
        reach = [d * (k - 1) + 1 for d, k in zip(dilations, w.shape[2:], strict=True)]
        sides = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
        y = np.zeros((len(x), len(w), *sides))
        rows, inner = len(w) // group, w.shape[1]
        for place in np.ndindex(*sides):
            at = tuple(slice(o * s, o * s + r, d) for o, s, r, d in zip(place, strides, reach, dilations, strict=True))
            for g in range(group):
                part = x[(slice(None), slice(g * inner, (g + 1) * inner), *at)]
                axes = list(range(1, part.ndim))
                y[(slice(None), slice(g * rows, (g + 1) * rows), *place)] = np.tensordot(
                    part, w[g * rows : (g + 1) * rows], (axes, axes)
                )
        return (y if b is None else y + b.reshape(-1, *[1] * count),)


class ConvTranspose(OpRun):
    """Window by window, as above."""

    op_domain = ""

    def _run(self, x: FloatArray, w: FloatArray, b: FloatArray | None = None, **options: Any) -> tuple[FloatArray]:
        count = w.ndim - 2
        strides, dilations = (options.get(name) or [1] * count for name in ("strides", "dilations"))
        pads, group = options.get("pads") or [0] * 2 * count, group_of(options)
        extra = options.get("output_padding") or [0] * count
        reach = [d * (k - 1) + 1 for d, k in zip(dilations, w.shape[2:], strict=True)]
        sides = [(n - 1) * s + r for n, s, r in zip(x.shape[2:], strides, reach, strict=True)]
        inner, outer = len(w) // group, w.shape[1]
        y = np.zeros((len(x), group * outer, *(n + e for n, e in zip(sides, extra, strict=True))))
        for place in np.ndindex(*x.shape[2:]):
            at = tuple(slice(o * s, o * s + r, d) for o, s, r, d in zip(place, strides, reach, dilations, strict=True))
            for g in range(group):
                source = x[(slice(None), slice(g * inner, (g + 1) * inner), *place)]
                target = (slice(None), slice(g * outer, (g + 1) * outer), *at)
                y[target] += np.tensordot(source, w[g * inner : (g + 1) * inner], (1, 0))
        ends = [n - p for n, p in zip(y.shape[2:], pads[count:], strict=True)]
        y = y[(slice(None), slice(None), *(slice(p, e) for p, e in zip(pads[:count], ends, strict=True)))]
        return (y if b is None else y + b.reshape(-1, *[1] * count),)


class MaxPool(OpRun):
    """With indices counted over the whole tensor, as the standard says: the evaluator's own start anew in each channel."""

    op_domain = ""

    def _run(self, x: FloatArray, **options: Any) -> tuple[Array, ...]:
        kernel, count = list(options["kernel_shape"]), x.ndim - 2
        strides, pads = options.get("strides") or [1] * count, options.get("pads") or [0] * 2 * count
        around = [(0, 0), (0, 0), *zip(pads[:count], pads[count:], strict=True)]
        places = np.pad(np.arange(x.size).reshape(x.shape), around)
        x = np.pad(x, around, constant_values=-np.inf)
        sides = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, strides, strict=True)]
        y, indices = np.empty((*x.shape[:2], *sides)), np.empty((*x.shape[:2], *sides), np.int64)
        for place in np.ndindex(*y.shape):
            at = (*place[:2], *(slice(o * s, o * s + k) for o, s, k in zip(place[2:], strides, kernel, strict=True)))
            y[place] = x[at].max()
            indices[place] = places[at].reshape(-1)[x[at].argmax()]
        return (y, indices) if self.n_outputs > 1 else (y,)

    @property
    def n_outputs(self) -> int:
        return len(self.onnx_node.output)


def evaluator(model: ModelProto) -> ReferenceEvaluator:
    return ReferenceEvaluator(model, new_ops=[Erf, Gelu, Conv, ConvTranspose, MaxPool])


def run(model: ModelProto, feeds: Feeds, names: Sequence[str]) -> dict[str, Array]:
    return dict(zip(names, evaluator(model).run(list(names), dict(feeds)), strict=True))


def onnxruntime_run(model: ModelProto, feeds: Feeds, names: Sequence[str]) -> dict[str, Array]:
    return Session(model.SerializeToString(), RuntimeOptions(1)).run(feeds, names)


def model_of(kind: str, case: Case, runs: Callable[..., dict[str, Array]] = run) -> tuple[ModelProto, dict[str, Array]]:
    """loss = sum over all outputs of y times fixed random numbers; the moving arrays are the model's inputs m0, m1, ..."""
    moving = {f"m{i}": np.asarray(array) for i, array in enumerate(case.moving)}
    fixed = {f"f{i}": np.asarray(array) for i, array in enumerate(case.fixed)}
    names = [*list(fixed)[: case.before], *moving, *list(fixed)[case.before :]]
    outputs = [f"y{i}" for i in range(case.outputs)]
    nodes: list[NodeProto] = [helper.make_node(kind, names, outputs, **case.attributes)]
    tensors = [numpy_helper.from_array(array, name) for name, array in fixed.items()]
    shares = []
    for name, array in runs(graph_of(nodes, moving, tensors, outputs), moving, outputs).items():
        ones = np.random.default_rng(len(name)).normal(size=array.shape).astype(array.dtype)
        tensors.append(numpy_helper.from_array(ones, f"r_{name}"))
        nodes += [
            helper.make_node("Mul", [name, f"r_{name}"], [f"p_{name}"]),
            helper.make_node("ReduceSum", [f"p_{name}"], [f"s_{name}"], keepdims=0),
        ]
        shares.append(f"s_{name}")
    nodes.append(helper.make_node("Sum", shares, ["loss"]))
    return graph_of(nodes, moving, tensors, ["loss"]), moving


def graph_of(
    nodes: Sequence[NodeProto], moving: Mapping[str, Array], tensors: Sequence[TensorProto], outputs: Sequence[str]
) -> ModelProto:
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in moving.items()}
    inputs = [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in moving.items()]
    graph = helper.make_graph(list(nodes), "case", inputs, [ValueInfoProto(name=n) for n in outputs], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def gradients(model: ModelProto, moving: Feeds) -> dict[str, Array]:
    trace = Reach(Graph(model)).trace(moving, run)
    built = gradient_model(model, "loss", list(moving), trace)
    names = [value.name for value in built.graph.output]
    values = run(built, moving, names)
    return {moved: values[given] for moved, given in zip(moving, names[1:], strict=True)}


def differences(model: ModelProto, moving: Feeds) -> dict[str, FloatArray]:
    """The gradient element by element, by central differences."""
    found = {}
    for name, array in moving.items():
        slope = np.empty(array.size)
        for i in range(array.size):
            ends = []
            for step in (STEP, -STEP):
                shifted = array.copy()
                shifted.reshape(-1)[i] += step
                (loss,) = run(model, {**moving, name: shifted}, ["loss"]).values()
                ends.append(float(loss))
            slope[i] = (ends[0] - ends[1]) / (2 * STEP)
        found[name] = slope.reshape(array.shape)
    return found


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("kind", CASES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_rule_agrees_with_central_differences(kind: str, data: Draw) -> None:
    model, moving = model_of(kind, CASES[kind](data))
    expected = differences(model, moving)
    for name, gradient in gradients(model, moving).items():
        assert gradient.shape == expected[name].shape
        gap, length = (float(np.linalg.norm(array)) for array in (gradient - expected[name], expected[name]))
        assert gap <= TOLERANCE * max(1.0, length), (kind, name, gradient, expected[name])


@pytest.mark.parametrize("longest", [0.0, 10.0])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_long_and_short_slices_are_the_same_gradient(longest: float, data: Draw) -> None:
    """Which one a convolution takes depends on its shape only: here each is made to."""
    case = conv(data)
    model, moving = model_of(
        "Conv", Case(case.moving, attributes={**case.attributes, "strides": [1] * (case.moving[0].ndim - 2)})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relrep_onnx.gradient.windows.LONGEST", longest)
        found = gradients(model, moving)
    for name, expected in differences(model, moving).items():
        assert np.linalg.norm(found[name] - expected) <= TOLERANCE * max(1.0, float(np.linalg.norm(expected)))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_automatic_padding_is_the_padding_it_stands_for(mode: str, kernel: int, stride: int) -> None:
    """In ONNX Runtime, since the oracle above knows explicit pads only."""
    x, w = random(0, 2, 3, 7, 7), random(1, 4, 3, kernel, kernel)
    out = -(-7 // stride) if mode != "VALID" else (7 - kernel) // stride + 1
    total = max(0, (out - 1) * stride + kernel - 7) if mode != "VALID" else 0
    begin = total // 2 if mode == "SAME_UPPER" else total - total // 2
    pads = [begin, begin, total - begin, total - begin]
    found = []
    for how in ({"auto_pad": mode}, {"pads": pads}):
        model, moving = model_of("Conv", Case([x, w], attributes={**how, "strides": [stride, stride]}), onnxruntime_run)
        trace = Reach(Graph(model)).trace(moving, onnxruntime_run)
        built = gradient_model(model, "loss", list(moving), trace)
        found.append(onnxruntime_run(built, moving, [value.name for value in built.graph.output]))
    for ours, expected in zip(found[0].values(), found[1].values(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_second_output_that_a_loss_depends_on_is_refused() -> None:
    """The rule of LayerNormalization knows its first output only; a gradient that arrives at the mean must not get lost."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale"], ["y", "mean"]),
        helper.make_node("Mul", ["mean", "mean"], ["square"]),
        helper.make_node("Add", ["y", "square"], ["sum"]),
        helper.make_node("ReduceSum", ["sum"], ["loss"], keepdims=0),
    ]
    model = graph_of(nodes, {"x": random(0, 3, 5)}, [numpy_helper.from_array(np.ones(5, np.float32), "scale")], ["loss"])
    with pytest.raises(ModelError, match="the gradient of LayerNormalization's output 'mean' has no rule"):
        gradient_model(model, "loss", ["x"], Reach(Graph(model)).trace({"x": random(0, 3, 5)}, onnxruntime_run))


def test_an_integer_output_has_no_gradient_to_lose() -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["y", "places"], kernel_shape=[2, 2]),
        helper.make_node("Cast", ["places"], ["far"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["y", "far"], ["sum"]),
        helper.make_node("ReduceSum", ["sum"], ["loss"], keepdims=0),
    ]
    feeds = {"x": np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)}
    model = graph_of(nodes, feeds, [], ["loss"])
    built = gradient_model(model, "loss", ["x"], Reach(Graph(model)).trace(feeds, onnxruntime_run))
    (gradient,) = onnxruntime_run(built, feeds, [built.graph.output[1].name]).values()
    np.testing.assert_array_equal(gradient[0, 0], np.pad(np.ones((3, 3)), ((1, 0), (1, 0))))
