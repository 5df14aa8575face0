"""Sweeps: every point is a run of `optimize`, finished points survive a kill, and the choice says what it found."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from relrep_onnx import Config, ConfigError, Grid, ModelError, Sweep, VerificationError, compare, optimize, sweep
from relrep_onnx.calibrate import dense_pass
from relrep_onnx.cli import main
from relrep_onnx.results import Figures, Point
from relrep_onnx.sweeps import parse_sparsities
from relrep_onnx.sweeps.book import Book
from relrep_onnx.sweeps.engines import processes
from relrep_onnx.sweeps.pick import Pick
from relrep_onnx.sweeps.run import _engine, _Survey
from relrep_onnx.sweeps.tables import cost_of, front
from relrep_onnx.sweeps.trial import attempt, file_name
from tests.test_pipeline import SMALL, inputs, small_net

BASE = dataclasses.replace(SMALL, sparsity=None, forms=("compact",), threads=1)
GRID = Grid((0.5, 0.8), ("unstructured", "2:4"), ("uniform",), ("none", "variance"))


def run(folder: Path, grid: Grid = GRID, config: Config = BASE, **options: Any) -> Sweep:
    return sweep(small_net(), folder, inputs(), grid, config, **options)


def tables(folder: Path) -> list[str]:
    return [(folder / f"table.{kind}").read_text() for kind in ("json", "csv", "md")]


def point(name: str, error: float, size: int, **figures: Any) -> Point:
    return Point(name, 0.5, "unstructured", "erk", "none", Figures(0.5, 0.5, 1, 1, error, size=size, **figures))


def kills_itself(session: Any) -> float:
    """A metric that ends its process where much was pruned."""
    model = onnx.load(session._model_path) if session._model_path else onnx.load_from_string(session._model_bytes)
    record = {entry.key: entry.value for entry in model.metadata_props}
    if float(record.get("relrep.sparsity", 0)) > 0.75:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def counting(patch: pytest.MonkeyPatch, name: str, function: Callable[..., Any]) -> list[tuple[Any, ...]]:
    """The arguments of every call from now on."""
    calls: list[tuple[Any, ...]] = []

    def counted(*given: Any) -> Any:
        calls.append(given)
        return function(*given)

    patch.setattr(name, counted)
    return calls


def test_every_point_is_what_optimize_gives(tmp_path: Path) -> None:
    found = run(tmp_path, keep=True)
    assert [(p.pattern, p.repair, p.sparsity) for p in found.points] == [
        (pattern, repair, s) for pattern in GRID.pattern for repair in GRID.repair for s in GRID.sparsity
    ]
    for p in found.points:
        target = tmp_path / "alone.onnx"
        config = dataclasses.replace(BASE, sparsity=p.sparsity, pattern=p.pattern, allocate=p.allocate, repair=p.repair)
        if p.figures is None:
            assert (p.pattern, p.sparsity) == ("2:4", 0.8)
            assert "a sparsity of 0.8 of the weights is not possible" in str(p.failure)
            continue
        alone = optimize(small_net(), target, inputs(), config)
        assert p.figures.error == alone.fidelity.relative_l2
        assert p.figures.size == target.stat().st_size
        assert p.figures.nonzeros == alone.after.nonzeros
        assert (tmp_path / "points" / p.name / "model.onnx").read_bytes() == target.read_bytes()
    assert not (tmp_path / "statistics").exists()


def test_the_dense_network_walks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = counting(monkeypatch, "relrep_onnx.statistics.dense_pass", dense_pass)
    run(tmp_path)
    assert len(walks) == 1


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    """Killed for real, with a point half written; what is finished is not done again, and the tables are the same."""
    code = (
        "from pathlib import Path\nfrom tests.test_sweep import run\n"
        f"run(Path({str(tmp_path / 'killed')!r}))\nraise SystemExit('not killed in time')"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    folder = tmp_path / "killed"
    while not (done := list(folder.glob("points/*/point.json"))) and child.poll() is None:
        time.sleep(0.001)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    half = folder / "points" / "unstructured_uniform_variance_0.8"
    half.mkdir(exist_ok=True)
    (half / "point.json").write_text('{"key": "')
    (half / "model.onnx").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in done if path.parent != half}
    run(folder)
    run(tmp_path / "whole")
    assert tables(folder) == tables(tmp_path / "whole")
    assert before
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert [path.name for path in half.iterdir()] == ["point.json"]


def test_points_of_other_data_or_settings_are_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = counting(monkeypatch, "relrep_onnx.sweeps.engines.attempt", attempt)
    grid = Grid((0.5,), allocate=("uniform",), repair=("none", "bias"))
    first = run(tmp_path, grid)
    assert len(tasks) == 2
    assert run(tmp_path, grid).points == first.points
    assert run(tmp_path, grid, dataclasses.replace(BASE, max_memory=1 << 20)).points == first.points
    assert len(tasks) == 2
    other = sweep(small_net(), tmp_path, inputs(seed=5), grid, BASE)
    assert len(tasks) == 4
    assert other.points != first.points
    sweep(small_net(seed=3), tmp_path, inputs(seed=5), grid, BASE)
    run(tmp_path, grid, dataclasses.replace(BASE, positions=7))
    assert len(tasks) == 8


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    with Book(tmp_path).locked(), pytest.raises(ConfigError, match="another sweep is writing to"):
        run(tmp_path, Grid((0.5,), allocate=("uniform",), repair=("none",)))


def test_processes_give_what_one_gives_and_survive_a_death(tmp_path: Path) -> None:
    grid = Grid((0.5, 0.8, 0.6), allocate=("uniform",), repair=("variance",))
    alone = run(tmp_path / "one", grid)
    found = run(tmp_path / "two", grid, dataclasses.replace(BASE, eval="tests.test_sweep:kills_itself"), jobs=2)
    for a, b in zip(alone.points, found.points, strict=True):
        assert a.figures is not None
        if b.sparsity == 0.8:
            assert b.figures is None
            assert "its process was killed by signal 9" in str(b.failure)
        else:
            assert b.figures == dataclasses.replace(a.figures, metric=1.0)


def test_memory_decides_how_many_run(monkeypatch: pytest.MonkeyPatch) -> None:
    survey = _Survey(provenance=None, fixed=500 << 20)  # type: ignore[arg-type]  # not looked at
    calls = counting(monkeypatch, "relrep_onnx.sweeps.run.processes", processes)
    for limit in (4 << 30, 1200 << 20, 100 << 20):
        _, share = _engine(survey, dataclasses.replace(BASE, max_memory=limit), 4)
        assert share is not None
        assert calls[-1] == (1,) or calls[-1][0] * (2 * share + (500 << 20)) <= limit
    assert calls == [(4,), (2,), (1,)]


def test_latency_is_timed_at_the_end_and_models_go(tmp_path: Path) -> None:
    grid = Grid((0.5,), allocate=("uniform",), repair=("none",))
    found = run(tmp_path, grid, measures=("error", "latency"), pick="latency min")
    figures = found.points[0].figures
    assert figures is not None
    assert figures.latency is not None
    assert figures.latency > 0
    folder = tmp_path / "points" / found.points[0].name
    assert [path.name for path in folder.iterdir()] == ["point.json"]
    assert found.output == str(tmp_path / "picked" / "model.onnx")
    onnx.checker.check_model(found.output, full_check=True)
    (tmp_path / "picked" / "model.onnx").unlink()
    again = run(tmp_path, grid, measures=("error", "latency"), pick="latency min")
    assert (again.points, again.picked, again.output) == (
        found.points,
        found.picked,
        found.output,
    )  # figures stay, the model is new
    assert Path(found.output).exists()
    kept = run(tmp_path, grid, keep=True)
    assert kept.points[0].figures == dataclasses.replace(figures, latency=None, speedup=None)
    assert (folder / "model.onnx").read_bytes() == (tmp_path / "picked" / "model.onnx").read_bytes()


def test_a_lossy_form_is_judged_by_the_file_itself(tmp_path: Path) -> None:
    held = inputs(32, seed=7)
    config = dataclasses.replace(BASE, values="int8", threads=1)
    grid = Grid((0.5,), allocate=("uniform",), repair=("none",))
    found = sweep(small_net(), tmp_path, inputs(), grid, config, holdout=held, keep=True)
    figures = found.points[0].figures
    assert figures is not None
    dense = tmp_path / "dense.onnx"
    file = tmp_path / "points" / found.points[0].name / "model.onnx"
    judged = compare(dense, file, held[16:], dataclasses.replace(config, forms=("onnx",), values="float32"))
    assert figures.error == judged.relative_l2
    exact = sweep(small_net(), tmp_path / "exact", inputs(), grid, BASE, holdout=held).points[0].figures
    assert exact is not None
    assert figures.error != exact.error


@pytest.mark.parametrize(("form", "name"), [("sparse-ort", "model.onnx"), ("ort", "model.ort"), ("int8+ort", "model.ort")])
def test_points_have_the_name_their_form_needs(form: str, name: str) -> None:
    assert file_name(dataclasses.replace(BASE, forms=(form,))) == name


def test_feeds_that_come_once_serve_every_point(tmp_path: Path) -> None:
    grid = Grid((0.5, 0.7), allocate=("uniform",), repair=("none",))
    feeds = ({"x": sample} for sample in inputs()[:, None])
    assert sweep(small_net(), tmp_path / "a", feeds, grid, BASE).points == run(tmp_path / "b", grid).points


def test_the_front_holds_what_no_other_point_beats() -> None:
    rng = random.Random(0)
    points = tuple(point(str(n), rng.randrange(6) / 10, rng.randrange(6)) for n in range(40))
    found = Sweep(BASE, None, ("error", "size"), points, None, None)  # type: ignore[arg-type]
    assert cost_of(found) == "size"
    at = {(p.figures.size, p.figures.error) for p in points if p.figures}
    best = {(s, e) for s, e in at if not any(s2 <= s and e2 <= e and (s2, e2) != (s, e) for s2, e2 in at)}  # type: ignore[operator]
    assert [(p.figures.size, p.figures.error) for p in front(found) if p.figures] == sorted(best)


def test_the_choice() -> None:
    points = [point("a", 0.1, 300, metric=-0.4), point("b", 0.04, 200, agreement=0.98), point("c", 0.03, 250, agreement=1.0)]
    points += [dataclasses.replace(points[0], name="failed", figures=None, failure="no")]
    for words, name in [
        ("size min", "b"),
        ("size max", "a"),
        ("error<0.035 & size min", "c"),
        ("error <= 4% & size min", "b"),
        ("agreement > 98% & error max", "c"),
        ("size>=0.2k & size max & error < 5e-2", "c"),
        ("agreement >= 98% & size min", "b"),
        ("metric > -0.5 & size max", "a"),
    ]:
        assert Pick.parse(words).choose(points).name == name, words
    with pytest.raises(VerificationError, match=r"none of 3 points meets all conditions \(error<0.01: 0 points\)"):
        Pick.parse("size<1M & error<0.01 & size min").choose(points)
    with pytest.raises(VerificationError, match="no point has a figure 'latency'"):
        Pick.parse("latency min").choose(points)


@pytest.mark.parametrize("percent", range(1, 100))
def test_percents_are_what_counting_gives(percent: int) -> None:
    figures = point("p", 0.1, 1, agreement=percent / 100).figures
    assert figures is not None
    assert Pick.parse(f"agreement>={percent}% & size min").conditions[0].holds(figures)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "cannot read ''"),
        ("error<0.05", "has 0 goals"),
        ("size min & error min", "has 2 goals"),
        ("speed min", "no figure is called 'speed'"),
        ("error=0.05 & size min", "cannot read 'error=0.05'"),
        ("error<1.2.3 & size min", "'1.2.3' in"),
        ("error<0.1 | size min", "cannot read"),
        ("__class__ min", "no figure is called"),
    ],
)
def test_what_is_no_choice(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match="--pick") as error:
        Pick.parse(words)
    assert says in str(error.value)


def test_sparsities() -> None:
    assert parse_sparsities("0.5:0.95:0.05") == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    assert parse_sparsities("0.3,0.8:0.9:0.04") == (0.3, 0.8, 0.84, 0.88)
    for text in ("", "x", "0.5:0.9", "0.9:0.5:0.1", "0.5:0.9:0", "0:1:1e-9", "nan", "0.5:inf:0.1", "0.1:nan:0.1"):
        with pytest.raises(ConfigError, match="the sparsities are"):
            parse_sparsities(text)


@pytest.mark.parametrize(
    ("grid", "config", "options", "says"),
    [
        (Grid((0.5,), repair=("x",)), BASE, {}, "repair is 'x'"),
        (Grid((1.5,)), BASE, {}, "the sparsity is 1.5"),
        (Grid(()), BASE, {}, "the sweep has 0 points"),
        (Grid(pattern=("4:2",)), BASE, {}, "the pattern is '4:2'"),
        (Grid(), Config(max_drop="0.1"), {}, "max_drop looks for a sparsity itself"),
        (Grid(), Config(forms=("onnx", "compact")), {}, "a sweep measures one form"),
        (Grid(), BASE, {"measures": ("speed",)}, "nothing called 'speed' can be measured"),
        (Grid(), BASE, {"pick": "latency min"}, "add latency to --measure"),
        (Grid(), BASE, {"pick": "metric max"}, "give --eval"),
        (Grid(), BASE, {"jobs": 0}, "jobs is 0"),
    ],
)
def test_what_cannot_be_swept_is_said_first(
    tmp_path: Path, grid: Grid, config: Config, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        run(tmp_path / "new", grid, config, **options)
    assert not (tmp_path / "new").exists()


def test_a_model_that_no_point_can_take(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs 32 input channels"):
        run(tmp_path, Grid((0.5,), ("3:32",)))
    found = run(tmp_path, Grid((0.5,), ("3:32", "unstructured"), ("uniform",), ("none",)))
    assert "needs 32 input channels" in str(found.points[0].failure)
    assert found.points[1].figures is not None
    with pytest.raises(ModelError, match=r"no point of the sweep could run; the first: a sparsity of 0.9"):
        run(tmp_path, Grid((0.9,), ("2:4",), ("uniform",), ("none",)))


def test_a_sweep_over_predicted_latency(tmp_path: Path) -> None:
    onnx.save(small_net(), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", inputs())
    arguments = (
        f"sweep {tmp_path}/net.onnx {tmp_path}/out --calib {tmp_path}/x.npy --min-size 64 --threads 1 --sparsity 0.5 --quiet "
        "--allocate uniform --repair none --budget latency"
    ).split()
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    config = dataclasses.replace(BASE, sparsity=0.5, budget="latency", allocate="uniform", repair="none", forms=("onnx",))
    figures = json.loads((tmp_path / "out" / "table.json").read_text())["points"][0]["figures"]
    assert figures["sparsity"] == optimize(small_net(), None, inputs(), config).sparsity


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    onnx.save(small_net(), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", inputs())
    arguments = (
        f"sweep {tmp_path}/net.onnx {tmp_path}/out --calib {tmp_path}/x.npy --min-size 64 --threads 1 --sparsity 0.5,0.7 "
        f"--allocate uniform --repair none,variance --plot {tmp_path}/front.svg --json {tmp_path}/all.json"
    ).split()
    done = CliRunner().invoke(main, [*arguments, "--pick", "error<50% & size min"])
    assert done.exit_code == 0, done.output
    assert "picked unstructured_uniform_" in done.output
    assert "<svg" in (tmp_path / "front.svg").read_text()
    assert (tmp_path / "all.json").read_text() == (tmp_path / "out" / "table.json").read_text()
    lines = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    known = json.loads((tmp_path / "all.json").read_text())
    assert [float(line["sparsity"]) for line in lines] == [p["sparsity"] for p in known["points"]]
    assert [int(line["size"]) for line in lines] == [p["figures"]["size"] for p in known["points"]]
    picked = min((p["figures"] for p in known["points"] if p["figures"]["error"] < 0.5), key=lambda f: f["size"])
    assert (tmp_path / "out" / "picked" / "model.onnx").stat().st_size == picked["size"]
    missed = CliRunner().invoke(main, [*arguments, "--pick", "error<1e-9 & size min"])
    assert missed.exit_code == 3
    assert "none of 4 points meets all conditions" in missed.output
    assert not (tmp_path / "out" / "statistics").exists()
    assert CliRunner().invoke(main, [*arguments, "--pick", "error"]).exit_code == 2
