"""The main job from a file and samples to a saved file, on the shipped sample and on small networks."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf.message import EncodeError
from onnx import ModelProto, TensorProto, helper, numpy_helper

import relrep_onnx.statistics as statistics
from relrep_onnx import (
    BudgetError,
    Config,
    ConfigError,
    ModelError,
    VerificationError,
    analyze,
    compare,
    export_model,
    optimize,
    refine,
)
from relrep_onnx.allocate import ALLOCATORS
from relrep_onnx.graph import Graph, count_zeros, find_layers, read_weight
from relrep_onnx.kernels.costs import COSTS, REFERENCE
from relrep_onnx.repair import REPAIRS
from relrep_onnx.report.words import verdict
from relrep_onnx.steps import Scored, latency_of
from relrep_onnx.types import Array, Selection, Unit
from samples.metric import top1
from tests import models

SAMPLES = Path(__file__).parents[1] / "samples"
FASHION = SAMPLES / "fashion.onnx"
NORMALIZED = Config(mean=(0.286,), std=(0.353,))
FAST = dataclasses.replace(NORMALIZED, num_samples=128)


def small_net(seed: int = 0) -> ModelProto:
    """Two convolutions with a residual sum, a pooled Gemm head: input x[N, 8, 6, 6], output y[N, 5]."""
    rng = np.random.default_rng(seed)
    tensors = {
        "w1": rng.normal(size=(16, 8, 3, 3)),
        "b1": rng.normal(size=16),
        "w2": rng.normal(size=(16, 16, 3, 3)) / 8,
        "w3": rng.normal(size=(5, 16)),
        "b3": rng.normal(size=5),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r1"], ["s"]),
        helper.make_node("Relu", ["s"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def inputs(count: int = 96, seed: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=(count, 8, 6, 6)).astype(np.float32)


SMALL = Config(sparsity=0.7, min_size=64, positions=None, batch_size=16)


def exposed(model: ModelProto, names: list[str], x: Array) -> list[Array]:
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values: list[Array] = onnxruntime.InferenceSession(copy.SerializeToString()).run(names, {"x": x})
    return values


def weights(model: ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_sample_keeps_its_accuracy_at_80_percent(tmp_path: Path) -> None:
    target = tmp_path / "sparse.onnx"
    result = optimize(FASHION, target, SAMPLES / "fashion_calib.npz", NORMALIZED)
    total = sum(report.layer.size for report in result.layers)
    assert sum(report.zeros for report in result.layers) == round(0.8 * total)
    onnx.checker.check_model(target, full_check=True)
    dense, sparse = (top1(onnxruntime.InferenceSession(path)) for path in (FASHION, target))
    assert dense >= 0.91
    assert sparse >= dense - 0.03
    assert result.provenance.calibration_samples == 448
    assert result.fidelity.samples == 32


def test_file_grows_by_new_biases_only(tmp_path: Path) -> None:
    target = tmp_path / "sparse.onnx"
    optimize(FASHION, target, SAMPLES / "fashion_calib.npz", FAST)
    before, after = weights(onnx.load(FASHION)), weights(onnx.load(target))
    new = [after[name].nbytes for name in after.keys() - before.keys()]
    overhead = 120 * len(new) + 600  # names and metadata
    assert target.stat().st_size <= FASHION.stat().st_size + sum(new) + overhead
    assert before.keys() <= after.keys()


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("unit", get_args(Unit))
def test_budget_is_met_by_every_allocator(allocator: str, unit: Any) -> None:
    result = optimize(small_net(), None, inputs(), dataclasses.replace(SMALL, allocate=allocator, budget=unit))
    total = sum(report.layer.size for report in result.layers)
    if unit == "weights":
        assert sum(report.zeros for report in result.layers) == round(0.7 * total)
    else:
        lines = COSTS[REFERENCE].single
        share = {r: lines["conv" if r.layer.op == "Conv" else "product"].mac if unit == "latency" else 1.0 for r in result.layers}
        step = max(share[r] * r.macs / r.layer.size for r in result.layers)
        goal = 0.7 * sum(share[r] * r.macs for r in result.layers)
        assert {r.layer.op for r in result.layers} == {"Conv", "Gemm"}
        assert abs(sum(share[r] * r.zeros * r.macs / r.layer.size for r in result.layers) - goal) <= step


def test_a_stack_of_one_column_products_is_priced_as_products() -> None:
    layer = models.only_layer(models.single("MatMul", (4, 2, 1), (4, 1, 300)).model)
    assert latency_of(Scored(layer, None, layer.size)) == COSTS[REFERENCE].single["product"].mac / 1e6  # type: ignore[arg-type]


@pytest.mark.parametrize("repair", REPAIRS)
def test_every_repair_keeps_exact_zeros(repair: str) -> None:
    result = optimize(small_net(), None, inputs(), dataclasses.replace(SMALL, repair=repair))
    for report in result.layers:
        stored = weights(result.model)[report.layer.weight]
        zeros = stored[stored == 0]
        assert zeros.size == report.zeros
        assert not np.signbit(zeros).any()
    assert np.isfinite(result.fidelity.relative_l2)


def test_variance_repair_matches_dense_statistics_in_the_sparse_network() -> None:
    """Sequential repair, seen from outside: every repaired layer has the dense mean and variance on the calibration data."""
    x = inputs(96)
    config = dataclasses.replace(SMALL, sparsity=0.5, allocate="uniform", repair="variance")
    result = optimize(small_net(), None, x, config)
    seen = x[: result.provenance.calibration_samples]
    dense, sparse = (exposed(model, ["c1", "c2"], seen) for model in (small_net(), result.model))
    for yd, ys in zip(dense, sparse, strict=True):
        np.testing.assert_allclose(ys.mean((0, 2, 3)), yd.mean((0, 2, 3)), atol=1e-4)
        np.testing.assert_allclose(ys.std((0, 2, 3)), yd.std((0, 2, 3)), rtol=1e-4)


def test_affine_repair_beats_masking_alone() -> None:
    errors = {
        repair: optimize(small_net(), None, inputs(), dataclasses.replace(SMALL, repair=repair)).fidelity.relative_l2
        for repair in ("none", "affine")
    }
    assert errors["affine"] < errors["none"]


def test_sparsity_zero_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "same.onnx"
    result = optimize(FASHION, target, SAMPLES / "fashion_calib.npz", dataclasses.replace(FAST, sparsity=0.0))
    assert weights(onnx.load(target)).keys() == weights(onnx.load(FASHION)).keys()
    x = np.random.default_rng(0).normal(size=(8, 1, 28, 28)).astype(np.float32)
    before, after = (onnxruntime.InferenceSession(path).run(None, {"image": x})[0] for path in (FASHION, target))
    assert np.array_equal(before, after)
    assert result.fidelity.relative_l2 == 0.0


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    config = dataclasses.replace(FAST, threads=1)
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for file in files:
        optimize(FASHION, file, SAMPLES / "fashion_calib.npz", config)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_memory_limit_does_not_change_the_result() -> None:
    plain = optimize(small_net(), None, inputs(), SMALL)
    spilled = optimize(small_net(), None, inputs(), dataclasses.replace(SMALL, max_memory=1))
    assert plain.model == spilled.model


def test_signature_and_foreign_metadata_stay(tmp_path: Path) -> None:
    model = small_net()
    model.metadata_props.add(key="author", value="someone")
    source = tmp_path / "in.onnx"
    onnx.save(model, source)
    result = optimize(source, tmp_path / "out.onnx", inputs(), SMALL)
    written = onnx.load(tmp_path / "out.onnx")
    assert (written.ir_version, written.opset_import) == (model.ir_version, model.opset_import)
    assert (written.graph.input, written.graph.output) == (model.graph.input, model.graph.output)
    assert [node.name for node in written.graph.node] == [node.name for node in model.graph.node]
    metadata = {entry.key: entry.value for entry in written.metadata_props}
    assert metadata["author"] == "someone"
    assert metadata["relrep.allocate"] == result.allocator
    assert metadata["relrep.pattern"] == "unstructured"


def test_model_objects_are_not_changed() -> None:
    model = small_net()
    before = model.SerializeToString()
    result = optimize(model, None, inputs(), SMALL)
    assert model.SerializeToString() == before
    assert result.output is None
    assert result.model != model


def test_path_and_object_give_the_same_weights(tmp_path: Path) -> None:
    onnx.save(small_net(), tmp_path / "in.onnx")
    from_path = optimize(tmp_path / "in.onnx", None, inputs(), SMALL)
    from_object = optimize(small_net(), None, inputs(), SMALL)
    assert from_path.model == from_object.model


class Reader:
    """A CalibrationDataReader by shape, not by name."""

    def __init__(self, x: Array) -> None:
        self._feeds: Iterator[dict[str, Array]] = iter([{"x": part} for part in np.split(x, 6)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def test_every_python_source_gives_the_same_model() -> None:
    x = inputs()
    models = [optimize(small_net(), None, data, SMALL).model for data in (x, {"x": x}, [{"x": x[:48]}, {"x": x[48:]}], Reader(x))]
    assert all(model == models[0] for model in models)


def test_own_holdout_leaves_all_samples_to_calibration() -> None:
    result = optimize(small_net(), None, inputs(64), SMALL, holdout=inputs(20, seed=5))
    assert result.provenance.calibration_samples == 64
    assert result.fidelity.samples == 10


def test_cache_saves_the_dense_pass_and_damage_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = optimize(small_net(), None, inputs(), SMALL, cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "dense_pass", lambda *_: pytest.fail("the cache was not used"))
        again = optimize(small_net(), None, inputs(), dataclasses.replace(SMALL, sparsity=0.7), cache_dir=cache)
    assert again.model == first.model
    entry = sorted(cache.iterdir())[0]
    entry.write_bytes(entry.read_bytes()[:-7])
    assert optimize(small_net(), None, inputs(), SMALL, cache_dir=cache).model == first.model
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "dense_pass", lambda *_: pytest.fail("the damaged entry was not rebuilt"))
        optimize(small_net(), None, inputs(), SMALL, cache_dir=cache)


def test_cache_tells_models_data_and_settings_apart(tmp_path: Path) -> None:
    optimize(small_net(), None, inputs(), SMALL, cache_dir=tmp_path)
    entries = len(list(tmp_path.iterdir()))
    optimize(small_net(seed=9), None, inputs(), SMALL, cache_dir=tmp_path)
    optimize(small_net(), None, inputs(seed=9), SMALL, cache_dir=tmp_path)
    optimize(small_net(), None, inputs(), dataclasses.replace(SMALL, positions=3), cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4 * entries


@pytest.mark.parametrize(
    "gates", [{"max_error": 1e-6}, {"min_agreement": 1.0}, {"eval": "samples.metric:top1", "min_metric": 0.99}]
)
def test_a_missed_gate_keeps_the_old_output(tmp_path: Path, gates: dict[str, Any]) -> None:
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")
    config = dataclasses.replace(FAST, sparsity=0.9, **gates)
    with pytest.raises(VerificationError, match="nothing was written"):
        optimize(FASHION, target, SAMPLES / "fashion_calib.npz", config)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_gates_that_hold_let_the_file_through(tmp_path: Path) -> None:
    config = dataclasses.replace(FAST, sparsity=0.3, max_error=0.5, min_agreement=0.5, eval="samples.metric:top1", min_metric=0.5)
    result = optimize(FASHION, tmp_path / "out.onnx", SAMPLES / "fashion_calib.npz", config)
    assert (tmp_path / "out.onnx").exists()
    assert result.metric_before is not None
    assert result.metric_after is not None
    assert result.metric_before > 0.9


def test_in_place_needs_to_be_asked_for(tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    onnx.save(small_net(), model)
    before = model.read_bytes()
    with pytest.raises(ConfigError, match="--in-place"):
        optimize(model, model, inputs(), SMALL)
    assert model.read_bytes() == before
    optimize(model, model, inputs(), SMALL, in_place=True)
    assert model.read_bytes() != before


def test_external_data_stays_external(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(small_net(), source, save_as_external_data=True, location="in.weights", size_threshold=256)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    target = tmp_path / "out.onnx"
    for sparsity in (0.5, 0.7):  # the second run replaces the first one's data file
        result = optimize(source, target, inputs(), dataclasses.replace(SMALL, sparsity=sparsity))
        data = [path for path in tmp_path.iterdir() if path not in before and path != target]
        assert [path.name.startswith("out.onnx.") for path in data] == [True]
        loaded = onnx.load(target)
        assert weights(loaded)["w2"].tobytes() == weights(result.model)["w2"].tobytes()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_weights_of_a_large_model_stay_in_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = tmp_path / "in.onnx", dataclasses.replace(SMALL, allocate="erk")
    onnx.save(small_net(), source, save_as_external_data=True, location="in.weights", size_threshold=256)
    monkeypatch.setattr("relrep_onnx.graph.storage.MESSAGE", 0)
    whole = optimize(source, tmp_path / "whole.onnx", inputs(), config)
    monkeypatch.setattr("relrep_onnx.graph.external.MESSAGE", 0)
    monkeypatch.setattr("relrep_onnx.graph.external.SMALL", 256)
    lazy = optimize(source, tmp_path / "lazy.onnx", inputs(), config)
    assert onnx.load(tmp_path / "lazy.onnx") == onnx.load(tmp_path / "whole.onnx")
    assert (lazy.provenance.model_sha256, lazy.fidelity) == (whole.provenance.model_sha256, whole.fidelity)
    assert lazy.sparsity == whole.sparsity == pytest.approx(0.7, abs=1e-3)
    assert [t.data_location for t in lazy.model.graph.initializer if t.name == "w2"] == [TensorProto.EXTERNAL]
    assert compare(source, tmp_path / "lazy.onnx", inputs(), config).relative_l2 > 0
    kept = optimize(source, None, inputs(), config)
    assert weights(kept.model)["w2"].tobytes() == weights(onnx.load(tmp_path / "lazy.onnx"))["w2"].tobytes()


KILLED = """
import dataclasses, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.test_pipeline import FAST, FASHION, SAMPLES
from relrep_onnx import optimize
from relrep_onnx.graph.model import Staged

write = Staged.write
def dying(self, *arguments):
    write(self, *arguments)
    os.truncate(self.path, 5000)  # as if the disk had not got further
    os.kill(os.getpid(), signal.SIGKILL)
Staged.write = dying
optimize(FASHION, sys.argv[2], SAMPLES / "fashion_calib.npz", dataclasses.replace(FAST, allocate="uniform"))  # without trials
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX")
def test_kill_in_the_middle_of_a_save_leaves_a_loadable_file(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    optimize(FASHION, target, SAMPLES / "fashion_calib.npz", dataclasses.replace(FAST, sparsity=0.2))
    old = target.read_bytes()
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", KILLED, root, str(target)], check=False, capture_output=True, cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert target.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 2  # the old file, and what the killed run left
    optimize(FASHION, target, SAMPLES / "fashion_calib.npz", FAST)
    assert list(tmp_path.iterdir()) == [target]
    onnxruntime.InferenceSession(target)


def test_a_layer_that_stays_has_no_sparsity_of_its_own() -> None:
    config = dataclasses.replace(SMALL, layer_sparsity={"head": 0.5}, nodes_to_exclude=("head",))
    with pytest.raises(ConfigError, match="layer 'head' cannot have a sparsity of its own; it stays as it is: excluded by name"):
        optimize(small_net(), None, inputs(), config)


def test_a_model_that_is_sparser_than_asked_is_said_to_be_so() -> None:
    sparse = optimize(small_net(), None, inputs(), dataclasses.replace(SMALL, sparsity=0.8, allocate="uniform"))
    again = optimize(sparse.model, None, inputs(), dataclasses.replace(SMALL, sparsity=0.5))
    zero = f"{sparse.sparsity:.1%} of the prunable weights were zero already"
    assert f"{zero}, and a sparsity of 50.0% takes no more: nothing was pruned" in again.notes
    assert not any("nothing was pruned" in note for note in sparse.notes)
    assert again.macs_sparsity == sparse.macs_sparsity
    assert f"{sparse.sparsity:.2%} of the prunable weights and {sparse.macs_sparsity:.1%} of their MACs are zero" in verdict(
        again
    )


def test_zeros_that_were_there_count() -> None:
    model = small_net()
    w2 = next(tensor for tensor in model.graph.initializer if tensor.name == "w2")
    values = numpy_helper.to_array(w2).copy()
    values[:, :14] = 0
    w2.CopyFrom(numpy_helper.from_array(values, "w2"))
    result = optimize(model, None, inputs(), dataclasses.replace(SMALL, sparsity=0.6, allocate="uniform"))
    total = sum(report.layer.size for report in result.layers)
    assert sum(report.zeros for report in result.layers) == round(0.6 * total)
    assert next(r for r in result.layers if r.layer.name == "second").sparsity >= 0.875


def test_layer_bounds_reach_the_model() -> None:
    config = dataclasses.replace(SMALL, layer_sparsity={"head": 0.25}, max_layer_sparsity=0.8)
    result = optimize(small_net(), None, inputs(), config)
    by_name = {report.layer.name: report.sparsity for report in result.layers}
    assert by_name["head"] == 0.25
    assert max(by_name.values()) <= 0.801
    with pytest.raises(BudgetError, match=r"they allow 0\.00565\d* to 0\.4943\d*"):
        optimize(small_net(), None, inputs(), dataclasses.replace(config, sparsity=0.7, max_layer_sparsity=0.5))


def test_analyze_measures_without_changing() -> None:
    model = small_net()
    analysis = analyze(model, inputs(), SMALL)
    assert [report.layer.name for report in analysis.layers] == ["first", "second", "head"]
    for report in analysis.layers:
        assert report.curve.raw[-1] >= report.curve.raw[0] > 0
        assert 0 < report.rr <= 4
        assert report.curve.damage > 0
    assert {report.layer.name: report.macs for report in analysis.layers}["second"] == 16 * 16 * 9 * 36


def test_compare_agrees_with_numpy() -> None:
    dense, x = small_net(), inputs(40)
    sparse = optimize(dense, None, inputs(), SMALL).model
    fidelity = compare(dense, sparse, x, SMALL)
    yd, ys = (exposed(model, ["y"], x)[0].astype(np.float64) for model in (dense, sparse))
    assert fidelity.samples == 40
    assert fidelity.relative_l2 == pytest.approx(np.linalg.norm(ys - yd) / np.linalg.norm(yd), rel=1e-6)
    assert fidelity.top1_agreement == np.mean(yd.argmax(1) == ys.argmax(1))


def test_compare_refuses_unrelated_models() -> None:
    with pytest.raises(ModelError, match="different inputs or outputs: only one has the input 'image'"):
        compare(FASHION, small_net(), inputs())


def noted(result: Any) -> str:
    return " ".join(result.notes)


def test_few_held_out_samples_are_noted() -> None:
    few, enough = (optimize(small_net(), None, inputs(count), SMALL) for count in (12, 64))
    assert "only 6 samples are held out" in noted(few)
    assert "held out" not in noted(enough)


def test_pixels_without_mean_and_std_are_noted() -> None:
    plain, prepared = (Config(num_samples=64, min_size=64, repair="none", allocate="uniform", scale=s) for s in (None, 1 / 255))
    calib = SAMPLES / "fashion_calib.npz"
    assert "pixels were scaled by 1/255 only" in noted(optimize(FASHION, None, calib, plain))
    assert "pixels" not in noted(optimize(FASHION, None, calib, prepared))


def test_a_pattern_that_comes_in_large_steps_is_noted() -> None:
    coarse, fine = (dataclasses.replace(SMALL, pattern=p, sparsity=0.35, min_size=1000) for p in ("16x8", "1x2"))
    assert "33.3% of the weights went, not 35.0%: the pattern 16x8" in noted(optimize(small_net(), None, inputs(), coarse))
    assert "the pattern" not in noted(optimize(small_net(), None, inputs(), fine))


def test_dense_and_sparse_the_wrong_way_round_are_noted() -> None:
    sparse = optimize(small_net(), None, inputs(), SMALL).model
    config = dataclasses.replace(SMALL, refine=1, augment="none")
    right = refine(small_net(), sparse, None, inputs(), config)
    assert "in order" not in noted(right)
    wrong = refine(sparse, small_net(), None, inputs(), config)
    assert "SPARSE has no more zeros (0) than DENSE" in noted(wrong)


def test_an_export_with_sparse_kernels_is_not_refined(tmp_path: Path) -> None:
    model = small_net()
    for node in model.graph.node[:1]:
        node.op_type, node.domain = "SparseConv", "relrep"
    with pytest.raises(ModelError, match="export with sparse kernels; give the sparse model"):
        refine(small_net(), model, None, inputs(), SMALL)


def test_an_export_to_nowhere() -> None:
    with pytest.raises(ConfigError, match="an export needs an output"):
        export_model(small_net(), None)  # type: ignore[arg-type]


def test_a_network_with_nothing_to_prune_says_why() -> None:
    with pytest.raises(ModelError, match=r"nothing to prune.*fewer than the minimum"):
        optimize(small_net(), None, inputs(), dataclasses.replace(SMALL, min_size=10**6))


def test_activations_in_float16() -> None:
    tensors = {name: models.random(seed, 16, 16, dtype=np.float16) / np.float16(4) for seed, name in enumerate("wv")}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["r"])]
    nodes.append(helper.make_node("MatMul", ["r", "v"], ["y"]))
    model = models.build(nodes, {"x": ("n", 16)}, ["y"], tensors, dtype=np.float16)
    result = optimize(model, None, models.random(2, 128, 16, dtype=np.float16), SMALL)
    assert all(array.dtype == np.float16 for array in weights(result.model).values())
    assert sum((array == 0).sum() for array in weights(result.model).values()) == round(SMALL.goal * 512)


def test_fp16_weights_stay_fp16() -> None:
    model = small_net()
    w2 = next(tensor for tensor in model.graph.initializer if tensor.name == "w2")
    half = numpy_helper.from_array(numpy_helper.to_array(w2).astype(np.float16), "w2")
    w2.CopyFrom(half)
    model.graph.node.insert(0, helper.make_node("Cast", ["w2"], ["w2_float"], to=TensorProto.FLOAT))
    next(node for node in model.graph.node if node.name == "second").input[1] = "w2_float"
    result = optimize(model, None, inputs(), SMALL)
    assert weights(result.model)["w2"].dtype == np.float16
    layers, _ = find_layers(Graph(result.model), Selection(min_size=64))
    zeros = sum(int((read_weight(Graph(result.model), layer) == 0).sum()) for layer in layers)
    assert zeros == round(0.7 * sum(layer.size for layer in layers))


def test_a_model_too_large_for_one_message_has_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    class Huge:
        def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name
            raise EncodeError("Failed to serialize proto")

    monkeypatch.setattr("relrep_onnx.damage.with_layer", lambda *_: Huge())
    result = optimize(small_net(), None, inputs(), SMALL)
    assert all(np.isnan(report.curve.damage) for report in result.layers)
    assert result.sparsity == pytest.approx(0.7, abs=1e-3)


def test_refined_run_is_better_and_says_so(tmp_path: Path) -> None:
    model, x = small_net(), inputs(128)
    plain = optimize(model, None, x, Config(sparsity=0.6, min_size=1))
    refined = optimize(model, tmp_path / "o.onnx", x, Config(sparsity=0.6, min_size=1, refine=20))
    account = refined.refinement
    assert account is not None
    assert account.best.error < account.start.error
    assert refined.fidelity.relative_l2 < plain.fidelity.relative_l2
    assert refined.after.nonzeros == plain.after.nonzeros
    stored = {entry.key: entry.value for entry in onnx.load(tmp_path / "o.onnx").metadata_props}
    assert stored["relrep.refine"] == "20"
    assert stored["relrep.augment"] == (",".join(account.augment) or "none")


def test_refine_alone_takes_a_sparse_model_of_any_origin(tmp_path: Path) -> None:
    dense, x = small_net(), inputs(128)
    masked = optimize(dense, None, x, Config(sparsity=0.6, min_size=1, repair="none")).model
    onnx.save(dense, tmp_path / "dense.onnx")
    onnx.save(masked, tmp_path / "sparse.onnx")
    before = (tmp_path / "sparse.onnx").read_bytes()
    result = refine(tmp_path / "dense.onnx", tmp_path / "sparse.onnx", tmp_path / "o.onnx", x, Config(min_size=1, refine=20))
    assert result.after.relative_l2 < result.before.relative_l2
    assert (tmp_path / "sparse.onnx").read_bytes() == before
    layers = find_layers(Graph(dense), Selection(min_size=1))[0]
    written = onnx.load(tmp_path / "o.onnx")
    assert count_zeros(Graph(written), layers) == count_zeros(Graph(masked), layers)
    assert compare(dense, written, x).relative_l2 < compare(dense, masked, x).relative_l2


def test_refine_misses_a_gate_and_keeps_the_old_output(tmp_path: Path) -> None:
    dense, x = small_net(), inputs(64)
    masked = optimize(dense, None, x, Config(sparsity=0.9, min_size=1, repair="none")).model
    (tmp_path / "o.onnx").write_bytes(b"old")
    with pytest.raises(VerificationError, match="max-error"):
        refine(dense, masked, tmp_path / "o.onnx", x, Config(min_size=1, refine=1, max_error=1e-6))
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"old"]


def test_the_smallest_layers_are_refined_too() -> None:
    result = optimize(small_net(), None, inputs(), SMALL)
    refined = refine(small_net(), result.model, None, inputs(), Config(refine=2, threads=1))  # all are under --min-size
    assert refined.refinement.steps
