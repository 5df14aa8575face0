"""A sweep: the dense statistics once, each point a run of its own, then timing, the table and the choice.

Finished points stay in the folder under a key of all they depend on, so a sweep that was killed goes on where it was.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from onnx import ModelProto

from relrep_onnx import graph as graphs
from relrep_onnx.benchmark import Plan, benchmark, random_feeds
from relrep_onnx.cache import Cache
from relrep_onnx.calibrate import default_memory
from relrep_onnx.config import Config
from relrep_onnx.data import lasting
from relrep_onnx.estimate import fixed_memory
from relrep_onnx.export import check_forms
from relrep_onnx.exporting import inputs_of, order_of
from relrep_onnx.files import check_separate, write_text
from relrep_onnx.job import prepare, quiet
from relrep_onnx.results import Figures, Point, Provenance, Sweep, to_json
from relrep_onnx.statistics import dense_statistics
from relrep_onnx.sweeps.book import TABLES, Book, key_of, written_in
from relrep_onnx.sweeps.cluster import Cluster, connected
from relrep_onnx.sweeps.engines import Engine, here, processes
from relrep_onnx.sweeps.grid import Grid
from relrep_onnx.sweeps.pick import Pick
from relrep_onnx.sweeps.tables import NEEDS, to_csv, to_markdown
from relrep_onnx.sweeps.trial import Task, file_name
from relrep_onnx.types import ConfigError, ModelError, Progress, VerificationError

MEASURES: Final = ("error", "size", "latency")
ROUNDS: Final = 30
"""Of timing, dense and sparse in turn."""
LEAST: Final = 16 << 20
"""Waiting activations get at least this."""


def sweep(
    model: graphs.ModelSource,
    folder: str | os.PathLike[str],
    calib: Any,
    grid: Grid | None = None,
    config: Config | None = None,
    *,
    holdout: Any = None,
    measures: Sequence[str] = ("error", "size"),
    jobs: int = 1,
    scheduler: str | None = None,
    keep: bool = False,
    pick: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress = quiet,
) -> Sweep:
    """Runs `optimize` at every point of a grid; goes on where an earlier call with the same folder ended.

    Args:
        model: a path or a ModelProto.
        folder: where finished points, the tables (`table.json`, `table.csv`, `table.md`) and the picked model go.
        calib: samples as in `optimize`; feeds that come once are kept in memory.
        grid: the settings to combine.
        config: all other settings; `forms` names the one form that is measured, `compact` if no configuration is given.
        holdout: samples that stay out of calibration, as in `optimize`.
        measures: "error", "size" and "latency"; latency is timed at the end, one model at a time.
        jobs: points that run at the same time, in processes of their own (call it under `if __name__ == "__main__"`); fewer where
            `config.max_memory`, by default half of what is free, does not hold so many.
        scheduler: address of a Dask scheduler, whose workers see the folder, the model and the data under the same paths: points
            and the dense pass run there.  `config.max_memory` is then for each of them.
        keep: the models of all points stay in the folder.
        pick: which point to choose, such as "error<0.05 & size min"; its model is written to `picked` in the folder.
        cache_dir: where the dense model's statistics are kept; by default in the folder while points are left to do.
        progress: called with (phase, steps done, steps in all, a note).

    Raises:
        VerificationError: no point meets the conditions of `pick`; the points and tables are there.
        RelRepError: one of its other kinds, where no point can run at all; a point that fails alone is listed with the reason.
    """
    config, rule = config or Config(forms=("compact",)), None if pick is None else Pick.parse(pick)
    configs = (grid or Grid()).configs(config)
    _check(config, measures, rule, jobs)
    if scheduler is not None and jobs > 1:
        raise ConfigError("jobs counts processes of this machine; it cannot apply together with a Dask scheduler")
    check_separate(written_in(Path(folder)), inputs_of({"MODEL": model}, {"--calib": calib, "--holdout": holdout}))
    book, timed = Book(Path(folder)), "latency" in measures
    source = _on_disk(model, book)
    statistics = Path(cache_dir).absolute() if cache_dir is not None else book.folder / "statistics"
    cache, calib, holdout = Cache(statistics), lasting(calib), lasting(holdout)
    tasks = {
        name: Task(name, source, calib, holdout, c, statistics, book.model(name, file_name(c)) if keep or timed else None)
        for name, c in configs.items()
    }
    with book.locked(), nullcontext() if scheduler is None else connected(scheduler) as cluster:
        survey = _survey(model, tasks, book, cache, cluster, progress, keep=keep, timed=timed)
        todo = [task for name, task in tasks.items() if name not in survey.figures.keys() | survey.reasons.keys()]
        engine, shared = _engine(survey, config, jobs) if cluster is None else (cluster.run, config.max_memory)
        _run([_shared(task, shared) for task in todo], engine, book, survey, progress)
        if timed:
            _time(tasks, book, survey, progress, keep=keep)
        points = tuple(_point(name, c, survey, timed=timed) for name, c in configs.items())
        found = Sweep(config, survey.provenance, tuple(measures), points, None, None)
        _write_tables(found, book)
        if not survey.figures:
            raise ModelError(f"no point of the sweep could run; the first: {points[0].failure}")
        if rule is not None:
            try:
                chosen = rule.choose(points)
            except VerificationError:  # all is done but the choice
                _forget(statistics, cache_dir)
                raise
            found = replace(found, picked=chosen, output=str(_fetch(tasks[chosen.name], book, engine, keep=keep)))
            _write_tables(found, book)
    _forget(statistics, cache_dir)
    return found


def _forget(statistics: Path, cache_dir: str | os.PathLike[str] | None) -> None:
    """Removes the statistics once no point is left to do, unless the caller keeps them in a folder of their own."""
    if cache_dir is None:
        shutil.rmtree(statistics, ignore_errors=True)


@dataclass(eq=False)
class _Survey:
    """What is known of the points: keys, figures of finished ones, reasons of those that failed; bytes that a run holds."""

    provenance: Provenance
    keys: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Figures] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    fixed: int = 0


def _check(config: Config, measures: Sequence[str], rule: Pick | None, jobs: int) -> None:
    if unknown := sorted(set(measures) - set(MEASURES)):
        raise ConfigError(f"nothing called {unknown[0]!r} can be measured; choose from {', '.join(MEASURES)}")
    if len(config.forms) != 1:
        raise ConfigError(f"a sweep measures one form, not {', '.join(config.forms)}; give one --to")
    check_forms(config.forms, order_of(config, None))
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; it must be at least 1")
    for name in rule.names if rule is not None else ():
        if name in NEEDS and NEEDS[name] not in measures:
            raise ConfigError(f"--pick asks for {name!r}; add {NEEDS[name]} to --measure")
        if name == "metric" and config.eval is None:
            raise ConfigError("--pick asks for 'metric'; give --eval, the function that measures it")


def _on_disk(model: graphs.ModelSource, book: Book) -> Path:
    """The model as a file that other processes can read."""
    if not isinstance(model, ModelProto):
        return Path(model).absolute()
    with graphs.staged(book.folder / "dense.onnx") as stage:
        stage.write(model, {})
        stage.commit()
    return book.folder / "dense.onnx"


def _survey(
    model: graphs.ModelSource,
    tasks: Mapping[str, Task],
    book: Book,
    cache: Cache,
    cluster: Cluster | None,
    progress: Progress,
    *,
    keep: bool,
    timed: bool,
) -> _Survey:
    """Looks which points are finished, and gathers the dense statistics of the others, once for each pattern's layers.

    Raises:
        RelRepError: no point can run.
    """
    survey: _Survey | None = None
    refused: dict[str, ModelError] = {}
    patterns = dict.fromkeys(task.config.pattern for task in tasks.values())
    for pattern in sorted(patterns, key=lambda name: name != "unstructured"):  # it has all the layers that others have
        members = {name: task for name, task in tasks.items() if task.config.pattern == pattern}
        first = next(iter(members.values()))
        try:
            job = prepare(model, first.calib, first.config, first.holdout, progress)
        except ModelError as error:
            refused.update(dict.fromkeys(members, error))
            continue
        if timed:  # refuses shapes that stay open before any work is done
            random_feeds(job.session.inputs, 1, first.config.input_shape, first.config.seed)
        survey = survey or _Survey(job.provenance)
        survey.fixed = max(survey.fixed, fixed_memory(job))
        unfinished = False
        for name, task in members.items():
            key = key_of(job.statistics_key, job.verification.fingerprint(), replace(task.config, max_memory=None).to_json())
            survey.keys[name], figures = key, book.find(name, key)
            gone = task.output is not None and not task.output.exists()
            if figures is None or (gone and (keep or figures.latency is None)):
                book.clear(name)
                unfinished = True
            else:
                survey.figures[name] = figures
        if unfinished:
            walk = cluster.dense_pass(first) if cluster is not None else None
            for _ in dense_statistics(job.graph, job.layers, job.feeds(), job.settings, cache, job.statistics_key, walk):
                pass
    if survey is None:
        raise next(iter(refused.values()))
    survey.reasons.update({name: str(error) for name, error in refused.items()})
    return survey


def _engine(survey: _Survey, config: Config, jobs: int) -> tuple[Engine, int | None]:
    """Where points run, and the bytes each may use for waiting activations and for targets; None leaves it to the run."""
    if jobs == 1:
        return here, config.max_memory
    limit = config.max_memory or 2 * default_memory()
    fit = max(1, min(jobs, limit // (survey.fixed + 2 * LEAST)))
    return processes(fit), max(LEAST, (limit // fit - survey.fixed) // 2)


def _shared(task: Task, memory: int | None) -> Task:
    return replace(task, config=replace(task.config, max_memory=memory))


def _run(tasks: Sequence[Task], engine: Engine, book: Book, survey: _Survey, progress: Progress) -> None:
    """Runs the points that are left, and notes each as it ends."""
    started, before, total = time.monotonic(), len(survey.figures), len(survey.keys)
    progress("sweep", before, total)
    for done, (task, outcome) in enumerate(engine(tasks), start=1):
        if isinstance(outcome, Figures):
            book.put(task.name, survey.keys[task.name], outcome)
            survey.figures[task.name] = outcome
        else:
            book.clear(task.name)
            survey.reasons[task.name] = outcome
        left = (time.monotonic() - started) / done * (len(tasks) - done)
        progress("sweep", before + done, total, f"about {left:.0f} s left")


def _time(tasks: Mapping[str, Task], book: Book, survey: _Survey, progress: Progress, *, keep: bool) -> None:
    """Times each model beside the dense one, while nothing else runs."""
    for number, (name, figures) in enumerate(list(survey.figures.items())):
        progress("time", number, len(survey.figures))
        task = tasks[name]
        if figures.latency is None and task.output is not None:
            config = task.config
            plan = Plan((config.threads,), (1,), ROUNDS, shapes=config.input_shape, seed=config.seed)
            timing = benchmark([Path(str(task.model)), task.output], plan, config.as_runtime(), quiet)[0].timings[1]
            survey.figures[name] = replace(figures, latency=timing.milliseconds, speedup=timing.ratio)
            book.put(name, survey.keys[name], survey.figures[name])
        if not keep:
            book.drop_models(name)
    progress("time", len(survey.figures), len(survey.figures))


def _point(name: str, config: Config, survey: _Survey, *, timed: bool) -> Point:
    figures = survey.figures.get(name)
    if figures is not None and not timed:
        figures = replace(figures, latency=None, speedup=None)
    reason = survey.reasons.get(name)
    return Point(name, config.goal, config.pattern, config.allocate, config.repair, figures, reason)


def _fetch(task: Task, book: Book, engine: Engine, *, keep: bool) -> Path:
    """The picked point's model in its own folder: copied where it was kept, made again where not."""
    output = book.model(task.name, file_name(task.config))
    if not output.exists():
        for _, outcome in engine([replace(task, output=output)]):
            if not isinstance(outcome, Figures):
                raise ModelError(f"the picked point {task.name} failed when it ran again: {outcome}")
    target = book.copy_picked(task.name)
    if not keep:
        book.drop_models(task.name)
    return target / output.name


def _write_tables(found: Sweep, book: Book) -> None:
    for name, text in zip(TABLES, (to_json(found), to_csv(found), to_markdown(found)), strict=True):
        write_text(book.folder / name, text)
