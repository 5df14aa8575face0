"""Choosing the allocator and the sparsity by trial, on small networks and the shipped sample."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from relrep_onnx import BudgetError, Config, ConfigError, Result, optimize, search
from relrep_onnx.estimate import estimate
from relrep_onnx.graph import Graph, find_layers, read_weight
from relrep_onnx.masks import pattern_named
from relrep_onnx.repair import REPAIRS
from relrep_onnx.report import decisions
from relrep_onnx.results import Finding
from relrep_onnx.search import Plan, shortfalls
from relrep_onnx.types import Selection
from relrep_onnx.verify import Fidelity, Limit, OutputFidelity
from tests.test_pipeline import SMALL, inputs, small_net

QUICK = dataclasses.replace(SMALL, allocate="uniform")


def run(config: Config = SMALL, **changes: Any) -> Result:
    return optimize(small_net(), None, inputs(), dataclasses.replace(config, **changes))


def test_auto_keeps_the_first_candidate_unless_another_is_clearly_better(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([0.50, 0.49, 0.47, 0.60])
    monkeypatch.setattr(search.Judge, "fidelity", lambda *_: fidelity(next(errors)))
    result = run(allocate="auto")
    assert result.choice is not None
    assert result.choice.errors == {"rr-curve": 0.5, "global": 0.49, "lamp": 0.47, "erk": 0.6}
    assert result.allocator == "lamp"
    assert not any("the first stays" in line for line in decisions(result))
    errors = iter([0.50, 0.49, 0.48, 0.60])
    kept = run(allocate="auto")
    assert kept.allocator == "rr-curve"
    assert any(line.endswith("(the first stays unless another's is 5% smaller)") for line in decisions(kept))


def fidelity(error: float, samples: int = 40, agreement: float | None = None) -> Fidelity:
    return Fidelity(samples, (OutputFidelity("y", error, 1.0, 0, error, agreement),))


def test_auto_gives_what_its_choice_gives() -> None:
    chosen = run(allocate="auto")
    fixed = run(allocate=chosen.allocator)
    assert fixed.choice is None
    assert fixed.model == chosen.model
    assert "auto chose" in decisions(chosen)[0]
    assert decisions(fixed) == []


def test_trials_with_numbers_that_are_not_finite_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([np.nan, 0.9, np.inf, 0.8])
    monkeypatch.setattr(search.Judge, "fidelity", lambda *_: fidelity(next(errors)))
    assert run(allocate="auto").allocator == "erk"


def test_equal_allocations_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def judged(*_: object) -> Fidelity:
        calls.append(1)
        return fidelity(0.1)

    monkeypatch.setattr(search.Judge, "fidelity", judged)
    run(allocate="auto", sparsity=None, pattern="2:4")
    assert len(calls) == 1


def test_max_drop_finds_the_edge() -> None:
    result = run(QUICK, sparsity=None, max_drop="0.3", repair="variance")
    found = result.finding
    assert found is not None
    assert found.drop <= 0.3
    above = [trial for trial in found.trials if trial.sparsity > found.sparsity]
    assert above
    assert min(trial.sparsity for trial in above) - found.sparsity <= 2 * search.RESOLUTION
    assert all(trial.drop > 0.3 for trial in above)
    assert result.sparsity == pytest.approx(found.sparsity, abs=2e-3)
    assert "found a sparsity" in decisions(result)[0]
    again = run(QUICK, sparsity=found.sparsity, repair="variance")
    assert [layer.zeros for layer in again.layers] == [layer.zeros for layer in result.layers]


def test_max_drop_in_agreement_and_in_the_users_metric() -> None:
    result = run(QUICK, sparsity=None, max_drop="top1:30%", repair="variance")
    assert result.finding is not None
    assert result.finding.kind == "top1"
    assert result.finding.drop <= 0.3
    metric = {"eval": "tests.test_search:weights_left", "max_drop": "eval:0.5"}
    result = run(QUICK, sparsity=None, repair="none", **metric)
    assert result.finding is not None
    assert result.finding.sparsity == pytest.approx(0.5, abs=2 * search.RESOLUTION)


def test_a_drop_finer_than_the_samples_is_refused_before_the_work() -> None:
    def watch(phase: str, done: int, total: int, note: str = "") -> None:
        pytest.fail(f"{phase} has begun")

    config = dataclasses.replace(QUICK, sparsity=None, max_drop="top1:1%")
    message = r"top1:0\.01 is finer than 16 deciding samples resolve"
    with pytest.raises(ConfigError, match=message):
        optimize(small_net(), None, inputs(), config, progress=watch)
    with pytest.raises(ConfigError, match=message):
        estimate(small_net(), None, inputs(), config)


def weights_left(session: Any) -> float:
    """A metric that falls as sparsity grows, whatever the outputs are."""
    model = onnx.load(session._model_path) if session._model_path else onnx.load_from_string(session._model_bytes)
    graph = Graph(model)
    layers = find_layers(graph, Selection(min_size=64))[0]
    kept = sum(np.count_nonzero(read_weight(graph, layer)) for layer in layers)
    return float(kept / sum(layer.size for layer in layers))


@pytest.mark.parametrize(
    ("bounds", "least", "most"),
    [
        ({"max_layer_sparsity": 0.4}, 0.0, 0.4),
        ({"min_layer_sparsity": 0.6}, 0.6, 0.995),
        ({"layer_sparsity": {"second": 0.3}}, 0.0, 0.6),
        ({"min_layer_sparsity": 0.5, "max_layer_sparsity": 0.5}, 0.5, 0.5),
    ],
)
@pytest.mark.parametrize("allocate", ["uniform", "auto"])
def test_max_drop_stays_inside_the_layers_bounds(bounds: dict[str, Any], least: float, most: float, allocate: str) -> None:
    result = run(QUICK, sparsity=None, max_drop="0.9", repair="variance", allocate=allocate, **bounds)
    assert result.finding is not None
    assert least - 1e-9 <= result.finding.sparsity <= most + 1e-9
    assert all(least - 1e-9 <= trial.sparsity <= most + 1e-9 for trial in result.finding.trials)


def test_a_limit_nothing_stays_under() -> None:
    with pytest.raises(BudgetError, match=r"no sparsity stays under --max-drop 1e-9: 0\.\d% already drops by"):
        run(QUICK, sparsity=None, max_drop="1e-9", repair="none")


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("0.1", "error", 0.1), ("top1:5%", "top1", 0.05), ("top1:0.2", "top1", 0.2), ("eval:1", "eval", 1)],
)
def test_limits(text: str, kind: str, value: float) -> None:
    assert Limit.parse(text) == Limit(kind, value)


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "inf", "top1:", "top1:100%", "top5:1%", "eval:x", "1:2:3"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-drop is"):
        Limit.parse(text)


def test_limits_say_when_they_cannot_be_judged() -> None:
    with pytest.raises(ConfigError, match="finer than 40 deciding samples resolve"):
        Limit("top1", 0.01).check_resolution(40)
    Limit("error", 0.01).check_resolution(40)
    with pytest.raises(ConfigError, match="looks like classes"):
        Limit("top1", 0.1).drop(fidelity(0.1), None, None)
    assert Limit("top1", 0.1).drop(fidelity(0.1, 40, 0.9), None, None) == pytest.approx(0.1)
    assert Limit("error", 0.1).drop(fidelity(0.3), None, None) == 0.3
    assert Limit("eval", 0.1).drop(fidelity(0.3), 0.9, 0.7) == pytest.approx(0.2)


@pytest.mark.parametrize("lost", range(1, 20))
def test_what_is_lost_is_counted_without_rounding(lost: int) -> None:
    limit = Limit.parse(f"top1:{5 * lost}%")
    assert limit.drop(fidelity(0.1, 20, (20 - lost) / 20), None, None) <= limit.value
    assert Limit.parse("eval:0.01").drop(fidelity(0.1), 0.93, 0.92) <= 0.01


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="leave --sparsity out"):
        Config(sparsity=0.5, max_drop="0.1")
    with pytest.raises(ConfigError, match="needs --eval"):
        Config(max_drop="eval:0.1")
    with pytest.raises(ConfigError, match="the pattern is '4:2'"):
        Config(pattern="4:2")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4", "4x1", "1x4", "3:7", "2x2"])
@pytest.mark.parametrize("allocator", ["uniform", "global", "rr-curve"])
@pytest.mark.parametrize("repair", ["variance", "reconstruct"])
def test_every_pattern_with_allocators_and_repairs(pattern: str, allocator: str, repair: str) -> None:
    kind = pattern_named(pattern)
    sparsity = 0.3 if kind.selective else 0.6
    result = run(sparsity=sparsity, pattern=pattern, allocate=allocator, repair=repair)
    assert {entry.key: entry.value for entry in result.model.metadata_props}["relrep.pattern"] == pattern
    graph, total, zeros = Graph(result.model), 0, 0
    for layer in find_layers(graph, Selection(min_size=64))[0]:
        weight = read_weight(graph, layer)
        total, zeros = total + layer.size, zeros + int((weight == 0).sum())
        here = int((weight == 0).sum())
        if kind.limit(layer):
            np.testing.assert_array_equal(kind.mask(layer, np.abs(weight), here), weight != 0)
        else:
            assert here == 0
    # Layers at ragged edges may each miss a block; the others together miss less than one.
    ragged = {"4x1": 1, "2x2": 2, "3:7": 3, "1x4": 0}.get(pattern, 0)
    goal = sparsity * sum(report.layer.size for report in result.layers)
    assert abs(zeros - goal) <= kind.step * (1 + ragged)


def test_nm_alone_prunes_every_eligible_layer() -> None:
    result = run(sparsity=None, pattern="2:4")
    assert [report.sparsity for report in result.layers] == [0.5] * len(result.layers)
    assert {entry.key: entry.value for entry in result.model.metadata_props}["relrep.sparsity"] == "0.5"


def test_nm_with_a_sparsity_takes_layers_whole() -> None:
    result = run(sparsity=0.3, pattern="2:4")
    assert sum(report.sparsity not in (0.0, 0.5) for report in result.layers) <= 1
    assert result.sparsity == pytest.approx(0.3, abs=1e-3)


def test_layers_a_pattern_does_not_fit_are_listed() -> None:
    result = run(sparsity=None, pattern="3:16")
    skipped = {skip.node: skip.reason for skip in result.skipped}
    assert skipped["first"] == "the pattern 3:16 needs 16 input channels; it has 8"
    assert {report.layer.name for report in result.layers} == {"second", "head"}


def test_more_than_the_pattern_allows() -> None:
    with pytest.raises(BudgetError, match=r"this pattern: they allow 0 to 0\.5"):
        run(sparsity=0.6, pattern="2:4")


def test_reconstruction_beats_every_other_repair() -> None:
    errors = {name: run(QUICK, repair=name).fidelity.relative_l2 for name in REPAIRS}
    assert min(errors, key=lambda name: errors[name]) == "reconstruct"


def test_a_limit_that_other_samples_miss_is_noted() -> None:
    job: Any = SimpleNamespace(config=Config(max_drop="top1:5%"))
    layer: Any = SimpleNamespace(layer=SimpleNamespace(name="a", size=10), cost=1)
    chosen = Plan("erk", 0.5, {"a": 5}, finding=Finding("top1", 0.05, 0.5, 0.03, ()))
    (note,) = shortfalls(job, [layer], chosen, fidelity(0.1, agreement=0.844), None, None)
    assert "those that verify drop by 0.156" in note
    assert shortfalls(job, [layer], chosen, fidelity(0.1, agreement=0.97), None, None) == []
