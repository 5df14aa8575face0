"""The table of forms, and delivery: everything is loaded and compared before it counts, and a failure leaves no file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, helper, numpy_helper

import relrep_onnx.export.sparse_form as sparse_form
import relrep_onnx.export.table as table
from relrep_onnx import Config, ConfigError, ModelError, VerificationError, export_model, kernels, optimize
from relrep_onnx.export import EXPORTERS, Exported, Order, Product, check_forms, make, places_for
from relrep_onnx.export.ort import CONFIG_SUFFIX
from relrep_onnx.graph import load
from relrep_onnx.results import Exports, to_json
from tests import models
from tests.models import random, run
from tests.test_export_compact import matmul, sparse
from tests.test_export_int8 import batches, halved
from tests.test_pipeline import SMALL, inputs, small_net
from tests.test_sparse_ort import wide_network

X = inputs()
ONE = dataclasses.replace(SMALL, threads=1)
ALONE = list(EXPORTERS)
needs_kernels = pytest.mark.skipif(not kernels.available(), reason="the sparse kernels were not built: no compiler at install")
COMBINED = ["int8+compact", "int8+ort", "compact+ort", "int8+sparse-initializer"]


def config(*forms: str, **settings: Any) -> Config:
    return dataclasses.replace(ONE, forms=forms, **settings)


def suffix(form: str) -> str:
    return ".ort" if form.split("+")[-1] == "ort" else ".onnx"


def outputs(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]


@pytest.mark.parametrize("form", [*ALONE, *COMBINED])
def test_every_form_loads_from_its_file_and_computes_the_same(form: str, tmp_path: Path) -> None:
    model, target = halved(small_net()), tmp_path / f"out{suffix(form)}"
    (exported,) = export_model(model, target, X, config(form))
    assert (exported.form, exported.output) == (form, str(target))
    assert exported.file_bytes == target.stat().st_size
    expected = run(model, {"x": X})["y"]
    gap = np.linalg.norm(outputs(target) - expected) / np.linalg.norm(expected)
    assert gap < (0.1 if "int8" in form else 1e-5)
    assert exported.fidelity.relative_l2 < (0.1 if "int8" in form else 1e-5)


def test_the_dense_file_is_no_larger_and_clean(tmp_path: Path) -> None:
    onnx.save(halved(small_net()), tmp_path / "in.onnx")
    export_model(tmp_path / "in.onnx", tmp_path / "out.onnx", None, ONE)
    assert (tmp_path / "out.onnx").stat().st_size <= (tmp_path / "in.onnx").stat().st_size
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)


def test_several_forms_fill_a_folder(tmp_path: Path) -> None:
    onnx.save(halved(small_net()), tmp_path / "net.onnx")
    forms = ("onnx", "compact", "int8+ort")
    exports = export_model(tmp_path / "net.onnx", tmp_path / "out", X, config(*forms))
    assert [e.form for e in exports] == list(forms)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"net.onnx", "net.compact.onnx", "net.int8+ort.ort", f"net.int8+ort{CONFIG_SUFFIX}"}
    values = json.loads(to_json(Exports(exports)))
    assert [e["form"] for e in values["exports"]] == list(forms)


@needs_kernels
def test_a_file_for_the_kernels_is_compared_with_and_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_network(0.1)
    x = random(0, 16, 64, 28, 28)
    (exported,) = export_model(model, tmp_path / "o.onnx", x, config("sparse-ort"))
    assert exported.notes[0].startswith("3 of 3 layers run sparse: predicted")
    assert exported.fidelity.relative_l2 < 1e-6
    assert exported.file_bytes < 0.2 * model.ByteSize()

    def refused(model: ModelProto, order: Order) -> Product:
        """Its weights may be overridden, which only the kernels mind."""
        product = EXPORTERS["sparse-ort"](model, order)
        assert isinstance(product.content, ModelProto)
        name = product.content.graph.node[0].input[1]
        size = next(t.dims[0] for t in product.content.graph.initializer if t.name == name)
        product.content.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [size]))
        return product

    monkeypatch.setattr(table, "EXPORTERS", {**EXPORTERS, "sparse-ort": refused})
    with pytest.raises(VerificationError, match="cannot load the export 'sparse-ort', with the sparse kernels,"):
        export_model(model, tmp_path / "refused.onnx", x, config("sparse-ort"))
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "missing.so")
    (exported,) = export_model(model, tmp_path / "refused.onnx", x, config("sparse-ort"))
    assert "only compared without them" in exported.notes[1]


@needs_kernels
@pytest.mark.parametrize(("gains", "layers"), [([2.0, 1.5], 3), ([2.0, 1.02], 0), ([1.02], 0)])
def test_tuning_takes_what_wins_twice(gains: list[float], layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = list(gains)

    def timed(sessions: list[Any], *_: object) -> Any:
        """The dense model takes so many times as long as the others."""
        gain = left.pop(0)
        return np.array([[gain] * 3, *([[1.0] * 3] * (len(sessions) - 1))])

    monkeypatch.setattr(sparse_form, "interleaved", timed)
    product = make("sparse-ort", wide_network(0.1), Order(tune=True))
    assert isinstance(product.content, ModelProto)
    assert sum(node.op_type.startswith("Sparse") for node in product.content.graph.node) == layers
    assert product.notes[0].startswith(f"{layers} of 3 layers run sparse: measured on this machine")
    assert ("1.50 times" in product.notes[0]) == bool(layers)
    assert ("stay dense" in product.notes[-1]) == (not layers)
    assert left == []


@pytest.mark.parametrize("existing", [False, True])
def test_one_failure_among_several_leaves_nothing(existing: bool, tmp_path: Path) -> None:
    onnx.save(halved(small_net()), tmp_path / "net.onnx")
    if existing:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "net.compact.onnx").write_text("old")
    with pytest.raises(ConfigError, match="--calib"):
        export_model(tmp_path / "net.onnx", tmp_path / "out", None, config("compact", "int8"))
    assert (tmp_path / "out").exists() == existing
    if existing:
        assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [("net.compact.onnx", "old")]


def broken(model: ModelProto, _: Order) -> Product:
    """An exporter that turns a weight around."""
    copy = models.clone(model)
    tensor = copy.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    return Product(copy, 1e-5)


def unreadable(model: ModelProto, _: Order) -> Product:
    """An exporter whose file does not load."""
    return Product(b"no model", 1e-5)


def stumbling(model: ModelProto, _: Order) -> Product:
    """An exporter whose file loads, and fails when it runs."""
    copy = models.clone(model)
    copy.graph.node.insert(0, helper.make_node("Reshape", ["x", "nowhere"], ["z"]))
    copy.graph.node[1].input[0] = "z"
    copy.graph.initializer.append(numpy_helper.from_array(np.array([3, 8, 7, -1]), "nowhere"))
    return Product(copy, 1e-5)


@pytest.mark.parametrize(
    ("exporter", "message"),
    [(broken, "moves the outputs by"), (unreadable, "cannot load the export"), (stumbling, "fails to run the export")],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_failed_comparison_leaves_no_file(
    exporter: Any, message: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "EXPORTERS", {**EXPORTERS, "compact": exporter})
    if old:
        (tmp_path / "out.onnx").write_text("old")
    with pytest.raises(VerificationError, match=message):
        export_model(halved(small_net()), tmp_path / "out.onnx", X, config("compact"))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"] * old


def test_the_tolerance_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = halved(small_net())
    with pytest.raises(VerificationError, match="more than 1e-06"):
        export_model(model, tmp_path / "out.onnx", X, config("int8", max_error=1e-6))
    monkeypatch.setattr(table, "EXPORTERS", {**EXPORTERS, "compact": broken})
    with pytest.raises(VerificationError, match="top-1 agreement"):
        export_model(model, tmp_path / "o.onnx", X, config("compact", min_agreement=1.0, max_error=9.0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["compact", "int8+compact"])
def test_optimize_exports_what_it_made(form: str, tmp_path: Path) -> None:
    result = optimize(small_net(), tmp_path / "out.onnx", X, config(form, sparsity=0.8))
    (exported,) = result.exports
    assert result.output is None
    assert {p.name for p in tmp_path.iterdir()} == {"out.onnx"}
    export_model(result.model, tmp_path / "again.onnx", X, config(form))
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    assert exported.file_bytes < result.after.file_bytes


def test_the_gates_of_optimize_hold_for_its_exports(tmp_path: Path) -> None:
    sparse_error = optimize(small_net(), None, X, config("onnx", sparsity=0.5)).fidelity.relative_l2
    with pytest.raises(VerificationError, match="--max-error"):
        optimize(small_net(), tmp_path / "o.onnx", X, config("int8", sparsity=0.5, max_error=sparse_error * (1 + 1e-7)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["onnx", "compact", "int8+ort"])
def test_the_size_of_an_export_is_a_gate(form: str, tmp_path: Path) -> None:
    model, target = halved(small_net()), tmp_path / f"out{suffix(form)}"
    (exported,) = export_model(model, target, X, config(form))
    if form != "int8+ort":  # whose size is not the same each time
        assert export_model(model, target, X, config(form, max_bytes=exported.file_bytes))
    target.write_bytes(b"old")
    with pytest.raises(VerificationError, match=f"the export '{form}': .* bytes are above".replace("+", r"\+")):
        export_model(model, target, X, config(form, max_bytes=exported.file_bytes // 2))
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1 + (form == "int8+ort")


def test_one_export_that_is_too_large_stops_all(tmp_path: Path) -> None:
    sizes = {e.form: e.file_bytes for e in optimize(small_net(), tmp_path / "a", X, config("onnx", "compact")).exports}
    assert sizes["compact"] < sizes["onnx"]
    small = {"max_bytes": sizes["compact"]}
    with pytest.raises(VerificationError, match=f"the export 'onnx': {sizes['onnx']:,} bytes are above --max-bytes"):
        optimize(small_net(), tmp_path / "b", X, config("compact", "onnx", **small))
    assert not (tmp_path / "b").exists()
    assert optimize(small_net(), tmp_path / "c.onnx", X, config("compact", **small)).exports[0].file_bytes <= sizes["compact"]


def test_a_metric_is_a_gate_of_exports_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_metric.py").write_text("def score(session):\n    return 0.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = {"eval": "half_metric:score"}
    assert export_model(halved(small_net()), tmp_path / "o.onnx", X, config("onnx", min_metric=0.5, **asked))
    with pytest.raises(VerificationError, match=r"metric 0\.5 is below --min-metric 0\.6"):
        export_model(halved(small_net()), tmp_path / "p.onnx", X, config("onnx", min_metric=0.6, **asked))
    assert not (tmp_path / "p.onnx").exists()


def test_optimize_needs_a_place_for_exports() -> None:
    with pytest.raises(ConfigError, match="needs an output"):
        optimize(small_net(), None, X, config("compact"))


def test_the_input_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(halved(small_net()), path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="would replace MODEL"):
        export_model(path, path, X, config("compact"))
    with pytest.raises(ConfigError, match="would replace MODEL"):
        export_model(path, tmp_path, X, config("onnx", "compact"))
    assert path.read_bytes() == before


def test_sparse_initializers_are_smaller_warn_and_come_back(tmp_path: Path) -> None:
    model = matmul(sparse(1, 64, 32, keep=0.2))
    product = make("sparse-initializer", model, Order())
    assert isinstance(product.content, ModelProto)
    assert "break other tools" in product.notes[0]
    assert product.content.ByteSize() < model.ByteSize()
    onnx.checker.check_model(product.content)
    onnx.save(product.content, tmp_path / "s.onnx")
    assert load(tmp_path / "s.onnx").model.graph.initializer[0] == model.graph.initializer[0]
    x = {"x": random(2, 3, 64)}
    np.testing.assert_array_equal(run(product.content, x)["y"], run(model, x)["y"])


def test_sparse_initializers_only_where_smaller() -> None:
    model = matmul(sparse(1, 64, 32, keep=0.4))
    product = make("sparse-initializer", model, Order())
    assert product.content is model
    assert "nothing is sparse enough" in product.notes[0]


@pytest.mark.parametrize("target", ["amd64", "arm"])
def test_ort_lists_operators_and_types(target: Any) -> None:
    product = make("ort", small_net(), Order(target=target))
    text = product.companions[CONFIG_SUFFIX].decode()
    assert text.startswith("ai.onnx;")
    assert "Conv" in text
    assert f"made for {target}" in product.notes[0]


def test_ort_says_what_it_cannot_convert() -> None:
    model = small_net()
    model.graph.node[0].op_type = "NoSuch"
    with pytest.raises(ModelError, match="cannot convert the model"):
        make("ort", model, Order())


def test_outputs_without_floats_are_run(tmp_path: Path) -> None:
    model = models.build(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("ArgMax", ["h"], ["y"], axis=1)],
        {"x": ("n", 64)},
        ["y"],
        {"w": sparse(1, 64, 32)},
    )
    (exported,) = export_model(model, tmp_path / "out.onnx", random(0, 16, 64), config("compact"))
    assert "not compared" in exported.notes[-1]
    with pytest.raises(ConfigError, match="--min-agreement needs an output that looks like classes"):
        export_model(model, tmp_path / "o.onnx", random(0, 16, 64), config("compact", min_agreement=1.0))
    assert {p.name for p in tmp_path.iterdir()} == {"out.onnx"}


@pytest.mark.parametrize(
    ("forms", "settings", "message"),
    [
        ((), {}, "give each form once"),
        (("onnx", "onnx"), {}, "give each form once"),
        (("zip",), {}, "no form is called 'zip'"),
        (("int8+",), {}, "no form is called ''"),
        (("ort+compact",), {}, "ort last"),
        (("int8+int8",), {}, "each part once"),
        (("sparse-initializer+int8",), {}, "comes last"),
        (("int8",), {"values": "int8"}, "--values int8 cannot apply to --to int8"),
        (("compact",), {"target": "arm"}, "--target arm cannot apply to --to compact"),
        (("compact",), {"tune": True}, "--tune cannot apply to --to compact"),
        (("sparse-ort+compact",), {}, "sparse-ort stands alone"),
        (("int8+sparse-ort",), {}, "add --values int8"),
        (("sparse-ort",), {"values": "float16"}, "compute float32 or int8"),
    ],
)
def test_forms_that_do_not_exist_or_combine(forms: tuple[str, ...], settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        check_forms(forms, Order(**settings))


def test_places(tmp_path: Path) -> None:
    assert places_for(["compact"], tmp_path / "a.onnx", "net") == {"compact": tmp_path / "a.onnx"}
    for form, name in (("ort", "a.onnx"), ("compact", "a.ort")):
        with pytest.raises(ConfigError, match="rename the output"):
            places_for([form], tmp_path / name, "net")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="several forms go into a folder"):
        places_for(["onnx", "compact"], tmp_path / "file", "net")


def test_external_data_stays_external(tmp_path: Path) -> None:
    models.save(halved(small_net()), tmp_path / "in.onnx", data="weights.bin")
    (tmp_path / "out").mkdir()
    (exported,) = export_model(tmp_path / "in.onnx", tmp_path / "out" / "o.onnx", X, config("compact"))
    assert isinstance(exported, Exported)
    files = list((tmp_path / "out").iterdir())
    assert sum(f.stat().st_size for f in files) == exported.file_bytes
    np.testing.assert_allclose(outputs(tmp_path / "out" / "o.onnx"), run(halved(small_net()), {"x": X})["y"], rtol=1e-5)


def test_calibration_is_the_one_of_optimize() -> None:
    """Not the samples that the comparison is made on."""
    order = Order(calibration=lambda: batches(X))
    assert make("int8", halved(small_net()), order).tolerance > make("compact", halved(small_net()), order).tolerance
