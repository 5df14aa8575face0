"""The loop: it helps, keeps zeros and the best state, repeats itself, resumes, survives divergence and Ctrl-C."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from relrep_onnx import refinement
from relrep_onnx.adam import Buffers
from relrep_onnx.cache import Cache
from relrep_onnx.data import DataOptions, Samples, load_samples
from relrep_onnx.distill import Distillation, plan, showing
from relrep_onnx.graph import Graph, count_zeros, find_layers, with_tensors
from relrep_onnx.refinement import Held, Recipe, Stepper, options, refine, scales, trial_samples
from relrep_onnx.results import Refinement
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Array, ConfigError, FloatArray
from tests.models import ALL, convnet, random, residual
from tests.test_distill import layers_of, pruned, values_of

RUNTIME = RuntimeOptions(1)
COUNT = 160


@dataclass(frozen=True, eq=False)
class Scene:
    """A dense and a sparse model with samples."""

    dense: ModelProto
    sparse: ModelProto
    d: Distillation
    samples: Samples
    held: Held

    def run(self, recipe: Recipe, notes: list[str] | None = None) -> tuple[ModelProto, Refinement]:
        def progress(phase: str, done: int, total: int, note: str = "") -> None:
            if notes is not None:
                notes.append(f"{phase} {note}")

        values, account = refine(self.d, values_of(self.sparse, self.d), self.samples, self.held, recipe, progress)
        return with_tensors(self.sparse, values), account


def scene(dense: ModelProto, data: Array) -> Scene:
    sparse = pruned(dense)
    session = Session(dense.SerializeToString(), RUNTIME)
    samples = load_samples(data, session.inputs, DataOptions())
    learned, held = samples.split(len(data) - 32)
    d = plan(dense, sparse, layers_of(sparse), next(samples.batches(1)), RUNTIME)
    return Scene(dense, sparse, d, learned, Held(d, held.batches(32), RUNTIME))


@pytest.fixture(scope="module")
def flat() -> Scene:
    return scene(residual(), random(5, COUNT, 8))


def recipe(epochs: int = 8, augment: Sequence[str] | None = (), **changes: object) -> Recipe:
    plain = Recipe(epochs, None if augment is None else tuple(augment), 0, 1 << 30, RUNTIME)
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_refinement_helps_and_zeros_stay(flat: Scene) -> None:
    model, account = flat.run(recipe(60))
    assert account.best.error < 0.85 * account.start.error
    assert account.history[account.kept] == account.best
    assert account.best.error == min(e.error for e in account.history)
    layers = layers_of(flat.sparse)
    assert count_zeros(Graph(model), layers) == count_zeros(Graph(flat.sparse), layers)
    before, after = (Graph(m) for m in (flat.sparse, model))
    for name in flat.d.names:
        changed = before.stored(name) != after.stored(name)
        assert changed.any()
        if name.endswith(".w"):
            assert not changed[before.stored(name) == 0].any()


def test_the_account_is_what_a_session_sees(flat: Scene) -> None:
    model, account = flat.run(recipe(4))
    left, right = (Session(showing(m, flat.d.aims).SerializeToString(), RUNTIME) for m in (flat.dense, model))
    x = random(5, COUNT, 8)[-32:]
    a, b = (s.run({"x": x}, flat.d.aims) for s in (left, right))
    parts = {name: float(((b[name] - a[name]) ** 2).sum() / (a[name] ** 2).sum()) for name in flat.d.aims}
    assert flat.d.ends
    assert flat.d.outputs == ("out",)
    ends = np.mean([parts[name] for name in flat.d.ends])
    assert account.best.error == pytest.approx(np.sqrt((ends + parts["out"]) / 2), rel=1e-5)


def test_a_rate_that_leads_away_from_the_start_is_halved(flat: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "RATE", 4.0)
    monkeypatch.setattr(refinement, "DIVERGED", math.inf)
    _, account = flat.run(recipe(20))
    losses = [epoch.loss for epoch in account.history[1:]]
    assert account.restarts == sum(loss > refinement.RISEN * losses[0] for loss in losses) > 0
    assert losses[-1] < max(losses)


def test_same_seed_same_bytes(flat: Scene) -> None:
    first, second, other = (flat.run(recipe(3, ("mixup",), seed=seed))[0].SerializeToString() for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_worse_than_the_start_means_the_start(flat: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "RATE", 20.0)
    monkeypatch.setattr(refinement, "DIVERGED", math.inf)
    model, account = flat.run(recipe(3))
    assert account.kept == 0
    assert model.SerializeToString() == flat.sparse.SerializeToString()


def test_divergence_goes_back_to_the_best_at_half_the_rate(flat: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "RATE", 20.0)
    _, account = flat.run(recipe(12))
    assert account.restarts > 0
    assert math.isfinite(account.best.error)
    assert account.best.error <= account.start.error


def test_interrupt_keeps_the_best_so_far(flat: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = refinement.Loop.epoch

    def epoch(self: refinement.Loop, total: int) -> None:
        if len(self.history) == 3:
            raise KeyboardInterrupt
        whole(self, total)

    monkeypatch.setattr(refinement.Loop, "epoch", epoch)
    _, account = flat.run(recipe(10))
    assert account.interrupted
    assert len(account.history) == 3
    assert account.best.error < account.start.error


def test_resumed_run_ends_in_the_same_bytes(flat: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = flat.run(recipe(6, None))
    saved = recipe(6, None, finished=Cache(tmp_path), key="this run")
    whole = refinement.Loop.epoch

    def killed(self: refinement.Loop, total: int) -> None:
        if any(tmp_path.iterdir()) and len(self.history) == 4:
            raise MemoryError
        whole(self, total)

    with monkeypatch.context() as patch:
        patch.setattr(refinement.Loop, "epoch", killed)
        with pytest.raises(MemoryError):
            flat.run(saved)
    resumed, account = flat.run(saved)
    assert resumed.SerializeToString() == expected.SerializeToString()
    assert len(account.history) == 7
    assert account.trials  # they are not tried again
    assert len(list(tmp_path.iterdir())) == 1


def test_a_state_of_another_run_is_not_taken(flat: Scene, tmp_path: Path) -> None:
    flat.run(recipe(3, finished=Cache(tmp_path), key="one"))
    model, account = flat.run(recipe(1, finished=Cache(tmp_path), key="two"))
    assert model.SerializeToString() == flat.run(recipe(1))[0].SerializeToString()
    assert len(account.history) == 2


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"no archive at all"])
def test_a_damaged_state_is_made_again(flat: Scene, tmp_path: Path, damage: bytes) -> None:
    saved = recipe(2, finished=Cache(tmp_path))
    expected, _ = flat.run(saved)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage)
    assert flat.run(saved)[0].SerializeToString() == expected.SerializeToString()
    assert path.read_bytes() == whole


def test_parts_of_a_batch_give_the_same_direction(flat: Scene) -> None:
    values = values_of(flat.sparse, flat.d)
    masked = [n for n in flat.d.names if n.endswith(".w")]
    feeds = {"x": random(9, 64, 8)}
    found = []
    for memory in (1 << 30, refinement.COPIES * flat.d.sample_bytes * 16):
        buffers = Buffers(values, masked, scales(flat.d, values))
        loss = Stepper(flat.d, buffers, recipe(memory=memory)).run(feeds)
        found.append((loss, buffers.gradients.copy()))
    (loss, whole), (other, parts) = found
    assert other == pytest.approx(loss, rel=0.05)  # each part has its own energies
    assert float(whole @ parts / np.linalg.norm(whole) / np.linalg.norm(parts)) > 0.99
    assert not parts[buffers.mask == 0].any()


def test_trials_choose_what_helps_held_out_samples(flat: Scene) -> None:
    notes: list[str] = []
    _, account = flat.run(recipe(4, None), notes)
    assert set(account.trials) == {"mixup", "none"}
    assert account.augment in {("mixup",), ()}
    assert any(note.startswith("refine loss") for note in notes)


def test_trials_see_each_sample_as_often_as_the_run() -> None:
    samples = load_samples(random(0, 512, 8), Session(residual().SerializeToString(), RUNTIME).inputs, DataOptions())
    assert len(trial_samples(samples, 80)) == 32  # 80 epochs of one small batch, about 6 % of 640 steps
    assert len(trial_samples(samples, 8)) == 256
    assert len(trial_samples(samples, 1)) == 512


def test_augmentation_that_does_not_fit_is_refused(flat: Scene) -> None:
    with pytest.raises(ConfigError, match="--augment crop does not fit the model's inputs; mixup would"):
        flat.run(recipe(augment=("crop", "mixup")))


def test_images_are_tried_with_and_without_flips_and_crops() -> None:
    images = scene(convnet(), random(6, 64, 3, 8, 8))
    assert options(images.samples) == [("crop", "flip", "mixup"), ("crop", "mixup"), ()]
    assert images.samples.image_axes == {"x": (2, 3)}
    _, account = images.run(recipe(3, ("crop", "flip", "mixup")))
    assert account.best.error < account.start.error


def test_samples_of_several_shapes_each_get_their_step() -> None:
    dense = convnet()
    dense.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"
    sparse = pruned(dense)
    session = Session(dense.SerializeToString(), RUNTIME)
    feeds = [{"x": random(i, 1, 3, 8 + 2 * (i % 2), 8)} for i in range(40)]
    samples = load_samples(feeds, session.inputs, DataOptions())
    d = plan(dense, sparse, layers_of(sparse), next(samples.batches(1)), RUNTIME)
    held = Held(d, samples.batches(8), RUNTIME)
    _, account = refine(d, values_of(sparse, d), samples, held, recipe(4), lambda *_, **__: None)
    assert account.steps == 4 * samples.shuffled_count(refinement.BATCH)
    assert account.best.error < account.start.error


def test_shuffled_batches_are_full_and_cover_the_samples() -> None:
    data = np.arange(10, dtype=np.float32).reshape(10, 1) * np.ones((1, 8), np.float32)
    samples = load_samples(data, Session(residual().SerializeToString(), RUNTIME).inputs, DataOptions())
    seen: set[float] = set()
    for seed in range(6):
        batches = [b["x"] for b in samples.shuffled(4, np.random.default_rng(seed))]
        assert [len(b) for b in batches] == [4, 4]
        drawn: FloatArray = np.concatenate(batches)[:, 0]
        assert len(set(drawn.tolist())) == 8
        seen |= set(drawn.tolist())
    assert len(seen) == 10
    assert samples.shuffled_count(4) == 2
    assert [len(b["x"]) for b in samples.shuffled(64, np.random.default_rng(0))] == [10]


def test_layers_keep_their_names_through_the_writer() -> None:
    """What the loop moves is found in the file that repair wrote, bias nodes and all."""
    model = residual()
    assert len(find_layers(Graph(model), ALL)[0]) == 6
