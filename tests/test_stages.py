"""Stages: the cut network computes what the whole one does, every node runs once per walk, and little is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from onnx import ModelProto, helper

from relrep_onnx import calibrate
from relrep_onnx.calibrate import Feeding, Walk, WalkSettings, dense_pass, sequential_pass
from relrep_onnx.graph import Graph, find_layers, plan_stages, read_weight, stage_model, write_layer
from relrep_onnx.job import quiet
from relrep_onnx.masks import pattern_named, unit_row_magnitude
from relrep_onnx.moments import Moments
from relrep_onnx.repair import Pruned, affine
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.store import TensorStore
from relrep_onnx.types import CalibrationError, Feeds, FloatArray, Layer, ModelError, RepairedLayer
from tests import models
from tests.models import ALL, NETWORKS, build, random, run

LARGE = 1 << 40
RUNTIME = RuntimeOptions(threads=1)
Repair = Callable[[Layer, FloatArray, Moments, Moments | None], RepairedLayer]


def settings(model: ModelProto, memory: int = LARGE, positions: int | None = None) -> WalkSettings:
    types = {i.name: i.type for i in Session(model.SerializeToString(), RUNTIME).inputs}
    return WalkSettings(RUNTIME, types, positions, 0, memory, quiet)


def batches_of(model: ModelProto, sizes: tuple[int, ...] = (3, 2)) -> list[Feeds]:
    batches = [models.feeds_of(model, size, seed=10 * i) for i, size in enumerate(sizes)]
    # Opposite signs, so that both branches of an If are taken.
    return [{name: sign * np.abs(x) for name, x in feeds.items()} for sign, feeds in zip((1, -1), batches, strict=True)]


def layers_of(model: ModelProto) -> list[Layer]:
    return find_layers(Graph(model), ALL)[0]


def pruned(layer: Layer, weight: FloatArray, moments: Moments, held_out: Moments | None = None) -> RepairedLayer:
    """Half of the weights dropped, then repaired; something every later layer notices."""
    mask = pattern_named("unstructured").mask(layer, unit_row_magnitude(weight), layer.size // 2)
    return affine(Pruned(weight, mask, moments))


def feeding(batches: list[Feeds], samples: int = 5) -> Feeding:
    return Feeding(batches, len(batches), samples, len(batches))


def both_passes(model: ModelProto, repair: Repair = pruned, **changes: Any) -> dict[str, RepairedLayer]:
    """The dense pass, then the sequential one with its targets."""
    graph, layers, feeds, how = Graph(model), layers_of(model), feeding(batches_of(model)), settings(model, **changes)
    targets = {dense.layer.name: dense.targets for dense in dense_pass(graph, layers, feeds, how)}
    return sequential_pass(graph, layers, feeds, how, lambda layer: targets[layer.name], repair)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dense_walk_gives_the_activations_of_the_whole_model(name: str) -> None:
    model = NETWORKS[name]()
    layers = layers_of(model)
    batches = batches_of(model)
    wanted = [run(model, feeds, sorted({use.activation for layer in layers for use in layer.uses})) for feeds in batches]
    graph = Graph(model)
    stages = plan_stages(graph, layers)
    seen = []
    with Walk(graph, stages, batches, settings(model)) as walk:
        for number, stage in enumerate(stages):
            walk.advance(number, {}, layers)
            for layer in stage.layers:
                seen.append(layer.name)
                for use in layer.uses:
                    for batch in range(len(batches)):
                        actual = walk.activation(batch, use.activation)
                        np.testing.assert_allclose(actual, wanted[batch][use.activation], rtol=1e-5, atol=1e-5)
    assert sorted(seen) == sorted(layer.name for layer in layers)
    assert len(seen) > 1


@pytest.mark.parametrize("name", NETWORKS)
def test_the_sequential_pass_sees_the_repaired_network_and_aims_at_the_dense_one(name: str) -> None:
    model = NETWORKS[name]()
    batches = batches_of(model)
    seen: dict[str, Moments] = {}

    def record(layer: Layer, weight: FloatArray, moments: Moments, held_out: Moments | None) -> RepairedLayer:
        assert held_out is None
        seen[layer.name] = moments
        return pruned(layer, weight, moments)

    graph, layers = Graph(model), layers_of(model)
    repaired = both_passes(model, record)
    assert list(repaired) == list(seen)
    sparse = models.clone(model)
    for stage in plan_stages(graph, layers):
        for layer in stage.layers:
            inputs, targets = [], []
            for use in layer.uses:
                for feeds in batches:
                    inputs.append(flat(layer, run(sparse, feeds, [use.activation])[use.activation]))
                    dense = flat(layer, run(model, feeds, [use.activation])[use.activation])
                    targets.append(dense @ read_weight(graph, layer).T)
            check_moments(seen[layer.name], np.concatenate(inputs), np.concatenate(targets))
        for layer in stage.layers:
            write_layer(sparse, layer, repaired[layer.name])


def flat(layer: Layer, x: FloatArray) -> FloatArray:
    """Rows a layer multiplies, by hand: 3 x 3 patches with a border of one for the convolutions of these networks."""
    x = np.asarray(x, np.float64)
    if layer.op != "Conv":
        return x.reshape(-1, layer.cols)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = x.shape[2:]
    rows = [padded[n, :, i : i + 3, j : j + 3].reshape(-1) for n in range(len(x)) for i in range(height) for j in range(width)]
    return np.stack(rows)


def check_moments(moments: Moments, x: FloatArray, y: FloatArray) -> None:
    scale = float(np.abs(x).max()) ** 2 + 1
    assert moments.inputs.count == len(x)
    np.testing.assert_allclose(moments.inputs.mean[0], x.mean(axis=0), atol=1e-5 * scale)
    spread = moments.inputs.apply(np.eye(x.shape[1]))
    np.testing.assert_allclose(spread, np.cov(x.T, bias=True).reshape(spread.shape), atol=1e-5 * scale)
    np.testing.assert_allclose(moments.target_mean, y.mean(axis=0), atol=1e-5 * scale)
    np.testing.assert_allclose(moments.target_variance, y.var(axis=0), rtol=1e-4, atol=1e-5 * scale)
    cross = (y - y.mean(axis=0)).T @ (x - x.mean(axis=0)) / len(x)
    np.testing.assert_allclose(moments.cross, cross, atol=1e-4 * scale)


class CountingSession(Session):
    """Counts how often each node runs, by its first output."""

    runs: ClassVar[Counter[str]] = Counter()

    def __init__(self, model: bytes | Path, options: RuntimeOptions, *, what: str = "the model") -> None:
        super().__init__(model, options, what=what)
        assert isinstance(model, bytes)
        graph = Graph(ModelProto.FromString(model))
        self.nodes = [node.output[0] for node in graph.model.graph.node if node.output[0] not in graph.constant_names]

    def run(self, feeds: Feeds, outputs: Any = None) -> Any:
        type(self).runs.update(self.nodes)
        return super().run(feeds, outputs)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    CountingSession.runs = Counter()
    monkeypatch.setattr(calibrate, "Session", CountingSession)
    return CountingSession.runs


@pytest.mark.parametrize("depth", [2, 8, 32])
def test_work_grows_linearly_with_depth(counter: Counter[str], depth: int) -> None:
    model = models.chain(depth)
    both_passes(model)
    # Two batches, each through the dense and the sparse network; the last layer itself need not run.
    assert counter == Counter({name: 4 for i in range(depth - 1) for name in (f"h{i}", f"a{i}")})


@pytest.mark.parametrize("name", NETWORKS)
def test_every_node_runs_once_per_walk_and_batch(counter: Counter[str], name: str) -> None:
    model = NETWORKS[name]()
    both_passes(model)
    known = {node.output[0] for node in model.graph.node}
    assert {name: count for name, count in counter.items() if name in known and count != 4} == {}
    assert {layer.uses[0].activation for layer in layers_of(model)} - {"x", "z"} <= set(counter)


def test_nodes_that_lead_to_no_layer_do_not_run(counter: Counter[str]) -> None:
    model = models.branching()
    both_passes(model)
    assert "early" not in counter
    assert "sum" in counter


def test_a_stage_in_which_nothing_is_needed_is_skipped(counter: Counter[str]) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["other"]), helper.make_node("Gemm", ["x", "w"], ["y"])]
    model = build(nodes, {"x": ("n", 4)}, ["other", "y"], {"w": random(0, 4, 4)})
    assert len(both_passes(model)) == 1
    assert not counter


@pytest.mark.parametrize("name", NETWORKS)
def test_spilling_to_disk_changes_nothing(name: str) -> None:
    model = NETWORKS[name]()
    inside, spilled = both_passes(model), both_passes(model, memory=1)
    assert list(inside) == list(spilled)
    for key, one in inside.items():
        np.testing.assert_array_equal(one.weight, spilled[key].weight)
        np.testing.assert_array_equal(one.bias_shift, spilled[key].bias_shift)


@pytest.mark.parametrize("memory", [LARGE, 100, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_only_tensors_that_are_still_read_are_kept(name: str, memory: int) -> None:
    model = NETWORKS[name]()
    graph, layers = Graph(model), layers_of(model)
    stages = plan_stages(graph, layers)
    with Walk(graph, stages, batches_of(model), settings(model, memory)) as walk:
        live = walk._store
        for number, stage in enumerate(stages):
            walk.advance(number, {}, layers)
            assert set(live._values) == {(batch, name) for batch in range(2) for name in stage.alive}
            values = [value for value in live._values.values() if isinstance(value, np.ndarray)]
            assert live.held == sum(value.nbytes for value in values)
            assert live.held <= memory
            assert {use.activation for layer in stage.layers for use in layer.uses} <= stage.alive
            files = len(list(Path(live._folder.name).iterdir())) if live._folder else 0
            assert files == sum(isinstance(value, Path) for value in live._values.values())
        folder = live._folder
    assert live.held == 0
    assert folder is None or not Path(folder.name).exists()


@pytest.mark.parametrize("depth", [2, 8, 32])
def test_a_chain_keeps_one_tensor_however_deep(depth: int) -> None:
    model = models.chain(depth)
    stages = plan_stages(Graph(model), layers_of(model))
    assert len(stages) == depth
    assert [len(stage.alive) for stage in stages] == [1] * depth


def test_a_store_gives_back_what_it_got() -> None:
    values = {0: random(0, 4), 1: random(1, 100), 2: np.array(["text"], object), 3: random(3, 0)}
    with TensorStore(limit=64) as store:
        for key, value in values.items():
            store.put(key, value)
        for key, value in values.items():
            np.testing.assert_array_equal(store.get(key), value)
        store.drop(0)
        with pytest.raises(KeyError):
            store.get(0)
    assert store.held == 0


def test_stages_of_a_shared_weight_wait_for_its_last_user() -> None:
    model = models.shared_weight()
    stages = plan_stages(Graph(model), layers_of(model))
    assert [[layer.name for layer in stage.layers] for stage in stages] == [["first"], ["left"], ["last"]]
    assert "x" in stages[1].alive, "the first user's activation waits for the second's"
    outputs = [{node.output[0] for node in stage.nodes} for stage in stages]
    assert {"left", "right"} <= outputs[2]


def test_independent_layers_share_a_stage() -> None:
    model = models.branching()
    stages = plan_stages(Graph(model), layers_of(model))
    assert [sorted(layer.name for layer in stage.layers) for stage in stages] == [["a0", "b0"], ["a1"], ["c0"]]


def test_no_layers_need_no_stages() -> None:
    assert plan_stages(Graph(models.chain(2)), []) == []


def test_shared_users_that_feed_each_other_have_no_stage() -> None:
    nodes = [helper.make_node("MatMul", [x, "w"], [y], name=y) for x, y in (("x", "a"), ("a", "y"))]
    graph = Graph(build(nodes, {"x": ("n", 4)}, ["y"], {"w": random(0, 4, 4)}))
    one, two = (find_layers(Graph(build([n], {n.input[0]: ("n", 4)}, [n.output[0]], {"w": random(0, 4, 4)})), ALL) for n in nodes)
    layer = one[0][0]
    both = Layer(**{**vars(layer), "uses": (*layer.uses, *two[0][0].uses)})
    with pytest.raises(ModelError, match="the users of the shared weight 'w' depend on each other"):
        plan_stages(graph, [both])


def test_a_type_that_cannot_cross_a_layer_is_an_error() -> None:
    model = models.chain(2)
    graph = Graph(model)
    stage = plan_stages(graph, layers_of(model))[1]
    with pytest.raises(ModelError, match=r"a value of type 'map\(int64,tensor\(float\)\)' crosses from one layer"):
        stage_model(graph, stage, dict.fromkeys(stage.inputs, "map(int64,tensor(float))"))


@pytest.mark.parametrize("ir_version", [3, 8])
def test_old_models_walk_too(ir_version: int) -> None:
    tensors = {"w": random(0, 4, 4), "v": random(1, 4, 4)}
    nodes = [helper.make_node("MatMul", [x, w], [y], name=y) for x, w, y in (("x", "w", "h"), ("h", "v", "y"))]
    model = build(nodes, {"x": (5, 4)}, ["y"], tensors, opset=8, ir_version=ir_version)
    seen = {}
    feeds = {"x": random(2, 5, 4)}
    for dense in dense_pass(Graph(model), layers_of(model), feeding([feeds]), settings(model)):
        seen[dense.layer.name] = dense.inputs.mean[0]
        assert dense.macs == 16
    np.testing.assert_allclose(seen["h"], feeds["x"].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(seen["y"], (feeds["x"] @ tensors["w"]).mean(axis=0), atol=1e-6)


def test_an_activation_that_is_not_finite_names_the_layer() -> None:
    model = models.chain(2)
    feeds = {"x": np.full((3, 8), np.inf, np.float32)}
    with pytest.raises(CalibrationError, match="layer 'fc0' gets NaN, infinity or numbers beyond"):
        list(dense_pass(Graph(model), layers_of(model), feeding([feeds], 3), settings(model)))


def test_both_passes_sample_the_same_positions() -> None:
    """With nothing pruned, the sequential pass sees exactly what the dense pass saw."""
    model = models.convnet()
    graph, layers, feeds = Graph(model), layers_of(model), feeding(batches_of(model))
    dense = {d.layer.name: d.inputs for d in dense_pass(graph, layers, feeds, settings(model, positions=4))}
    seen: dict[str, Moments] = {}

    def keep(layer: Layer, weight: FloatArray, moments: Moments, held_out: Moments | None) -> RepairedLayer:
        seen[layer.name] = moments
        return RepairedLayer(weight, np.zeros(layer.rows), np.zeros(layer.rows))

    both_passes(model, keep, positions=4)
    for name, inputs in dense.items():
        assert inputs.count == (5 if name == "fc" else 20)
        np.testing.assert_array_equal(inputs.mean, seen[name].inputs.mean)
