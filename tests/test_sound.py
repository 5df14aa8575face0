"""What a loaded model may be relied on for: each fault by its sentence, and what is put right computes the same."""

from __future__ import annotations

import random as shuffling
from collections.abc import Callable

import numpy as np
import pytest
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

from relrep_onnx.graph import load
from relrep_onnx.types import ModelError
from tests.models import build, chain, clone, feeds_of, residual, run, tensor, with_if

Edit = Callable[[ModelProto], object]


def first(model: ModelProto) -> TensorProto:
    """The first stored tensor, float32[8, 8]."""
    return model.graph.initializer[0]


def unset(model: ModelProto) -> NodeProto:
    """The second node, in a state that an edit goes on from."""
    return model.graph.node[1]


def retyped(kind: int, **values: object) -> Edit:
    def edit(model: ModelProto) -> None:
        stored = first(model)
        stored.ClearField("raw_data")
        stored.data_type = kind
        for name, value in values.items():
            getattr(stored, name).extend(value)

    return edit


def calling(*bodies: list[str]) -> ModelProto:
    """A chain whose last node calls the first of some functions `f0`, `f1`, ..., given by what each calls in turn."""
    model = chain(1)
    for number, body in enumerate(bodies):
        nodes = [helper.make_node(callee, [f"v{i}"], [f"v{i + 1}"], domain="local") for i, callee in enumerate(body)]
        nodes.append(helper.make_node("Relu", [f"v{len(body)}"], ["o"]))
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
        model.functions.append(helper.make_function("local", f"f{number}", ["v0"], ["o"], nodes, imports))
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "f0", "local"
    model.opset_import.add(domain="local", version=1)
    return model


@pytest.mark.parametrize(
    ("bodies", "says"),
    [
        ([["f0"]], "the model-local function 'f0' calls itself"),
        ([["f1"], ["f2"], ["f1"]], "the model-local function 'f[12]' calls itself"),
        ([[f"f{i}"] for i in range(1, 120)], "call each other 119 deep"),
        ([[f"f{i}"] * 2 for i in range(1, 40)], "make [0-9]{13} nodes"),
    ],
)
def test_functions_without_an_end_are_refused(bodies: list[list[str]], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load(calling(*bodies))


def test_functions_that_call_others_open() -> None:
    assert len(load(calling(["f1", "f2"], ["f2"], [])).model.functions) == 3


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m: setattr(first(m), "data_type", 99), "the stored tensor 'fc0.w' has the unknown type 99"),
        (lambda m: setattr(first(m), "data_type", 0), "the stored tensor 'fc0.w' has the unknown type UNDEFINED"),
        (lambda m: first(m).dims.__setitem__(0, -8), r"the stored tensor 'fc0.w' has the shape \[-8, 8\]"),
        (lambda m: first(m).dims.append(2), r"holds 256 bytes, but its shape \[8, 8, 2\] and type float need 512"),
        (lambda m: setattr(first(m), "raw_data", b""), r"holds 0 bytes, but its shape \[8, 8\] and type float need 256"),
        (retyped(TensorProto.FLOAT, float_data=[0.0] * 63), "holds 63 values, .* and type float need 64"),
        (retyped(TensorProto.INT64, int64_data=[0] * 65), "holds 65 values, .* and type int64 need 64"),
        (retyped(TensorProto.INT4, int32_data=[0] * 64), "holds 64 values, .* and type int4 need 32"),
        (retyped(TensorProto.COMPLEX64, float_data=[0.0] * 64), "holds 64 values, .* and type complex64 need 128"),
        (retyped(TensorProto.STRING, string_data=[b"a"]), "holds 1 values, .* and type string need 64"),
        (lambda m: unset(m).attribute.add(name="odd"), "the attribute 'odd' of 'relu0' has no known type"),
        (lambda m: unset(m).output.__setitem__(0, ""), r"the node 'relu0' \(Relu\) has no output"),
        (lambda m: m.graph.node[0].input.__delitem__(slice(1, None)), r"'fc0' \(Gemm\) has 1 inputs, and its operator needs"),
        (lambda m: m.graph.node[0].input.__setitem__(0, "out"), "the graph has a cycle through or before 'fc0'"),
        (lambda m: unset(m).input.__setitem__(0, "a0"), "the graph has a cycle through or before 'relu0'"),
    ],
)
def test_faults_are_named(edit: Edit, says: str) -> None:
    model = chain(2)
    edit(model)
    with pytest.raises(ModelError, match=f"{says}.*; export the model anew"):
        load(model)


@pytest.mark.parametrize(
    "edit",
    [
        retyped(TensorProto.FLOAT, float_data=[0.5] * 64),
        retyped(TensorProto.INT4, int32_data=[0] * 32),
        retyped(TensorProto.COMPLEX64, float_data=[0.0] * 128),
        retyped(TensorProto.STRING, string_data=[b"a"] * 64),
        retyped(TensorProto.FLOAT16, int32_data=[0] * 64),
        lambda m: setattr(unset(m), "domain", "others"),
        lambda m: m.graph.initializer.append(tensor(np.zeros((0, 3), np.float32), "empty")),
    ],
)
def test_what_is_stored_otherwise_is_no_fault(edit: Edit) -> None:
    model = chain(2)
    edit(model)
    before = model.SerializeToString()
    loaded = load(model)
    assert loaded.notes == ()
    assert loaded.model.SerializeToString() == before


def test_names_are_text() -> None:
    model = chain(1)
    model.graph.node[1].name = "aaaa"
    broken = ModelProto.FromString(model.SerializeToString().replace(b"aaaa", b"a\xffa\xfe"))
    with pytest.raises(ModelError, match=r"the name b'a\\xffa\\xfe' in the model is not valid UTF-8"):
        load(broken)


@pytest.mark.parametrize("make", [residual, with_if, lambda: chain(4)], ids=["residual", "if", "chain"])
def test_nodes_are_sorted_and_compute_the_same(make: Callable[[], ModelProto]) -> None:
    model = make()
    nodes = list(model.graph.node)
    feeds = feeds_of(model, 3)
    expected = run(model, feeds)
    for seed in range(5):
        mixed = clone(model)
        del mixed.graph.node[:]
        mixed.graph.node.extend(shuffling.Random(seed).sample(nodes, len(nodes)))
        loaded = load(mixed)
        known = {value.name for value in loaded.model.graph.input} | {t.name for t in loaded.model.graph.initializer} | {""}
        for node in loaded.model.graph.node:
            assert set(node.input) <= known
            known |= set(node.output)
        for name, value in run(loaded.model, feeds).items():
            np.testing.assert_array_equal(value, expected[name])
        again = load(loaded.model)
        assert again.notes == ()
        assert again.model == loaded.model


def with_sparse(shape: list[int], places: list[int] | list[list[int]]) -> ModelProto:
    model = build([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ("n", 4)}, ["y"])
    values = tensor(np.ones(len(places), np.float32), "w")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, tensor(np.array(places, np.int64), "p"), shape))
    return model


@pytest.mark.parametrize(
    ("shape", "places", "says"),
    [
        ([4, 4], [3, 16], "the indices of the sparse initializer 'w' do not fit: .*16"),
        ([4, 4], [[0, 4]], "the indices of the sparse initializer 'w' do not fit: "),
        ([4, -4], [0], r"the sparse initializer 'w', shape \[4, -4\], does not fit into memory"),
        ([2**31, 2**31], [0], "the sparse initializer 'w', .*, does not fit into memory"),
    ],
)
def test_sparse_initializers_that_do_not_fit(shape: list[int], places: list[int] | list[list[int]], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load(with_sparse(shape, places))


def test_attributes_of_every_known_type_pass() -> None:
    model = chain(1)
    for number, kind in AttributeProto.AttributeType.items():
        if kind != AttributeProto.UNDEFINED:
            model.graph.node[1].attribute.add(name=number, type=kind)
    assert load(model).notes == ()
