"""What refinement gains, and what a step of it costs, as Markdown tables: `python -m tools.bench.refine`.

Accuracy: each row is optimized, then refined on the same samples; top-1 on test images before and after, and the relative L2
of the outputs on the samples that only verify.  Speed: one step (dense forward, sparse forward, backward, update) at a batch of
64 against plain inference of the same batch in stock ONNX Runtime, and against the same step in torch where torch is installed;
medians of interleaved rounds.  Memory: peaks of processes that only infer, and only step.

    python -m tools.bench.refine --speed --json refine.json       # about an hour on two idle cores
    python -m tools.bench.refine --rows folded-0.9,fashion-0.95 --speed
    python -m tools.bench.refine --rows none --speed              # the second table alone
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any, Final

import numpy as np
import onnx

from relrep_onnx import Config, optimize, refine
from relrep_onnx.adam import Buffers
from relrep_onnx.config import EFFORTS
from relrep_onnx.distill import Distillation, plan
from relrep_onnx.graph import Graph, find_layers, parameters, with_tensors
from relrep_onnx.refinement import BATCH, RATE, Recipe, Stepper, scales
from relrep_onnx.runtime import RuntimeOptions
from relrep_onnx.types import Selection
from tools.bench.data import (
    DATA,
    TASKS,
    Array,
    Task,
    environment,
    load_images,
    markdown_table,
    normalise,
    open_session,
    top1,
    write_json,
)
from tools.bench.options import names

MANY: Final = 4096
"""Images of the row that asks what more data is worth."""


@dataclass(frozen=True)
class Row:
    """One setting: `subsets` calibration subsets are averaged; `images` other than those of a subset."""

    model: str
    epochs: int
    config: Mapping[str, Any]
    subsets: int = 1
    images: int | None = None


ROWS: Final[Mapping[str, Row]] = {
    "bn-0.9": Row("resnet20_bn", 80, {"sparsity": 0.9}),
    "folded-0.9": Row("resnet20_folded", 80, {"sparsity": 0.9}),
    "dynamo-0.9": Row("resnet20_dynamo18", 80, {"sparsity": 0.9}),
    "folded-0.95": Row("resnet20_folded", 80, {"sparsity": 0.95}, subsets=3),
    "folded-0.8": Row("resnet20_folded", 40, {"sparsity": 0.8}),
    "folded-1x4": Row("resnet20_folded", 80, {"sparsity": 0.9, "pattern": "1x4"}),
    "folded-4x1": Row("resnet20_folded", 80, {"sparsity": 0.9, "pattern": "4x1"}),
    "folded-many": Row("resnet20_folded", 10, {"sparsity": 0.9}, images=MANY),
    "resnet8-0.7": Row("mlperf_tiny_resnet8", 80, {"sparsity": 0.7}),
    "resnet18-macs": Row("resnet18_bn", 12, {"sparsity": 0.9, "budget": "macs"}),
    "fashion-0.95": Row("fashion", 80, {"sparsity": 0.95}),
}


@dataclass(frozen=True)
class Run:
    """One row on one subset; fractions, not percent; seconds of refinement alone."""

    row: str
    subset: int
    dense: float
    start: float
    refined: float
    error_before: float
    error_after: float
    augment: str
    trials: Mapping[str, float]
    optimize_seconds: float
    seconds: float


def samples_of(row: Row, task: Task, subset: int, folder: Path) -> Array:
    """The calibration samples of a row."""
    if row.images is None:
        return task.calibration[subset]
    images, _ = load_images(folder / "cifar10_train4660.npz")
    return normalise(images[: row.images])


def measure(name: str, options: argparse.Namespace) -> list[Run]:
    """Optimizes and refines each subset of a row."""
    row = ROWS[name]
    task = TASKS[row.model](options.data, row.subsets)
    dense = top1(task.model, task.test_x, task.test_y, options.threads)
    runs = []
    for subset in range(row.subsets):
        config = Config(threads=options.threads, seed=options.seed, augment=options.augment, **row.config)
        samples = samples_of(row, task, subset, options.data)
        began = time.perf_counter()
        start = optimize(task.model, None, samples, dataclasses.replace(config, augment="auto")).model
        middle = time.perf_counter()
        result = refine(task.model, start, None, samples, dataclasses.replace(config, refine=row.epochs))
        run = Run(
            row=name,
            subset=subset,
            dense=dense,
            start=top1(start, task.test_x, task.test_y, options.threads),
            refined=top1(result.model, task.test_x, task.test_y, options.threads),
            error_before=result.before.relative_l2,
            error_after=result.after.relative_l2,
            augment=",".join(result.refinement.augment) or "none",
            trials=result.refinement.trials,
            optimize_seconds=middle - began,
            seconds=result.refinement.seconds,
        )
        change = f"{100 * run.start:.1f} -> {100 * run.refined:.1f} %, {run.error_before:.3f} -> {run.error_after:.3f}"
        print(f"{name} {subset}: {change}, {run.augment} {run.trials}, {run.seconds:.0f} s", file=sys.stderr, flush=True)
        runs.append(run)
    return runs


def accuracy_table(runs: Sequence[Run]) -> str:
    """A row of the table for each row of the benchmark; several subsets as mean and spread."""
    rows = []
    for name in dict.fromkeys(run.row for run in runs):
        mine, row = [run for run in runs if run.row == name], ROWS[name]
        setting = ", ".join(f"{key} {value}" for key, value in row.config.items())
        images = f", {row.images} images" if row.images else ""
        rows.append(
            [
                f"{row.model}, {setting}{images}, {row.epochs} epochs",
                f"{100 * mine[0].dense:.1f}",
                _percent([run.start for run in mine]),
                _percent([run.refined for run in mine]),
                f"{fmean(run.error_before for run in mine):.3f}",
                f"{fmean(run.error_after for run in mine):.3f}",
                " / ".join(dict.fromkeys(run.augment for run in mine)),
                f"{fmean(run.seconds / max(run.optimize_seconds, 1e-9) for run in mine):.1f}",
            ]
        )
    header = ["setting", "dense %", "start %", "refined %", "error", "refined", "augmentation", "time / optimize"]
    return markdown_table(header, rows)


def _percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * pstdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"


@dataclass(frozen=True)
class Speed:
    """Medians in seconds of one step and of what it is held against, torch's 0 where torch is not installed; peak bytes."""

    model: str
    plain: float
    step: float
    torch: float
    plain_bytes: int
    step_bytes: int
    state_bytes: int


EFFORT_MODEL: Final = "resnet20_folded"
EFFORT_SPARSITY: Final = 0.8
SPEED_MODELS: Final = ("resnet20_bn", "resnet18_bn")


class Bench:
    """A model with a batch: plain inference, and a step on it after pruning by magnitude, whose values do not matter here."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self._task, self._threads = TASKS[name](folder, 1), threads
        self.dense = onnx.load(self._task.model)
        stored = {tensor.name for tensor in self.dense.graph.initializer}
        self._input = next(value.name for value in self.dense.graph.input if value.name not in stored)
        self.feeds = {self._input: self._task.calibration[0][:BATCH]}

    def plain(self) -> Callable[[], object]:
        """Inference of the batch."""
        session = open_session(self._task.model, self._threads)
        return lambda: session.run(None, self.feeds)

    def step(self) -> tuple[Callable[[], object], Distillation, onnx.ModelProto, int]:
        """A step, its plan, the sparse model, and the bytes of the optimizer's state."""
        graph = Graph(self.dense)
        layers = find_layers(graph, Selection(min_size=1))[0]
        weights = {p.tensor: graph.stored(p.tensor) for p in parameters(graph, layers) if p.is_weight}
        masked = {name: w * (np.abs(w) > np.quantile(np.abs(w), 0.9)) for name, w in weights.items()}
        sparse, runtime = with_tensors(self.dense, masked), RuntimeOptions(self._threads)
        d = plan(self.dense, sparse, layers, {name: array[:1] for name, array in self.feeds.items()}, runtime)
        values = {tensor: Graph(sparse).stored(tensor) for tensor in d.names}
        buffers = Buffers(values, [p.tensor for p in d.parameters if p.is_weight], scales(d, values))
        stepper = Stepper(d, buffers, Recipe(1, (), 0, 1 << 40, runtime))

        def run() -> None:
            stepper.run(self.feeds)
            buffers.step(RATE)

        return run, d, sparse, 6 * buffers.values.nbytes  # values, gradients, two moments, mask, scale


def peak(name: str, folder: Path, threads: int, mode: str) -> tuple[int, int]:
    """Peak bytes of a process that only infers, or only steps, and those of the optimizer's state; for a process of its own."""
    bench, state = Bench(name, folder, threads), 0
    if mode == "plain":
        run = bench.plain()
    else:
        run, _, _, state = bench.step()
    for _ in range(3):
        run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, state


def speed(name: str, options: argparse.Namespace) -> Speed:
    """Times a step of one model, and measures its memory."""
    alone = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with alone:
        modes = [alone.submit(peak, name, options.data, options.threads, mode).result() for mode in ("plain", "step")]
    bench = Bench(name, options.data, options.threads)
    ours, d, sparse, _ = bench.step()
    contenders: dict[str, Callable[[], object]] = {"plain": bench.plain(), "step": ours}
    if importlib.util.find_spec("torch") is not None:
        contenders["torch"] = torch_step(bench.dense, sparse, d.names, (d.ends, d.outputs), bench.feeds, options.threads)
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    for number in range(options.rounds + 1):
        for key, contender in contenders.items():
            began = time.perf_counter()
            contender()
            if number:  # the first round warms up
                seconds[key].append(time.perf_counter() - began)
    times = {key: median(values) for key, values in seconds.items()}
    found = Speed(name, times["plain"], times["step"], times.get("torch", 0.0), modes[0][0], *modes[1])
    print(f"{name}: a step is {found.step / found.plain:.1f} plain inferences", file=sys.stderr, flush=True)
    return found


def torch_step(
    dense: onnx.ModelProto,
    sparse: onnx.ModelProto,
    moving: Sequence[str],
    groups: Sequence[Sequence[str]],
    feeds: Mapping[str, Array],
    threads: int,
) -> Callable[[], object]:
    """The same step in torch, with its own Adam."""
    import torch

    from tools.bench import torch_graph

    if threads:
        torch.set_num_threads(threads)
    inputs = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    teacher_values, values = torch_graph.values_of(dense), torch_graph.values_of(sparse)
    for name in moving:
        values[name].requires_grad_()
    masks = {name: (values[name].detach() != 0).float() for name in moving}
    adam = torch.optim.Adam([values[name] for name in moving], lr=1e-4)

    def step() -> None:
        with torch.no_grad():
            teacher = torch_graph.run(dense, {**teacher_values, **inputs})
        student = torch_graph.run(sparse, {**values, **inputs})
        parts = [
            sum(((student[n] - teacher[n]) ** 2).sum() / (teacher[n] ** 2).sum() for n in group) / len(group)
            for group in groups
            if group
        ]
        adam.zero_grad()
        torch.stack(parts).sum().backward()
        for name in moving:
            values[name].grad *= masks[name]
        adam.step()

    return step


def speed_table(speeds: Sequence[Speed]) -> str:
    """A step as multiples."""
    rows = [
        [
            s.model,
            f"{1000 * s.plain:.0f}",
            f"{1000 * s.step:.0f}",
            f"{s.step / s.plain:.1f}",
            f"{s.step / s.torch:.2f}" if s.torch else "-",
            f"{s.plain_bytes / 1e6:.0f}",
            f"{s.step_bytes / 1e6:.0f}",
            f"{(s.step_bytes - s.state_bytes) / s.plain_bytes:.1f}",
        ]
        for s in speeds
    ]
    times, sizes = ["plain ms", "step ms", "step / plain", "step / torch's"], ["plain MB", "step MB", "less state, / plain"]
    return markdown_table(["model", *times, *sizes], rows)


def efforts_table(options: argparse.Namespace) -> str:
    """What each `--effort` gives on one model at one sparsity, and its time as a multiple of the first one's."""
    task = TASKS[EFFORT_MODEL](options.data, 1)
    rows, first = [], 0.0
    for name, preset in EFFORTS.items():
        config = Config(sparsity=EFFORT_SPARSITY, threads=options.threads, seed=options.seed, **preset)
        began = time.perf_counter()
        model = optimize(task.model, None, task.calibration[0], config).model
        seconds = time.perf_counter() - began
        first = first or seconds
        score = top1(model, task.test_x, task.test_y, options.threads)
        rows.append([name, f"{100 * score:.1f}", f"{seconds / first:.0f}"])
        print(f"effort {name}: {100 * score:.1f} %, {seconds:.0f} s", file=sys.stderr, flush=True)
    return markdown_table([f"effort ({EFFORT_MODEL}, {EFFORT_SPARSITY:g})", "top-1 %", "time"], rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action=names([*ROWS, "none"]), default=list(ROWS), metavar="A,B", help=", ".join(ROWS))
    parser.add_argument("--speed", action="store_true", help="also time and memory of a step")
    parser.add_argument("--efforts", action="store_true", help="also what each --effort gives")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the time of a step")
    parser.add_argument("--augment", default="auto", help="as of relrep-onnx")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime and torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 files and models (docs/data.md)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run here")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    chosen = [name for name in options.rows if name != "none"]
    runs = [run for name in chosen for run in measure(name, options)]
    speeds = [speed(name, options) for name in SPEED_MODELS] if options.speed else []
    print(f"first 512 images, seed {options.seed}, {options.threads} threads; {versions}")
    if runs:
        print(f"\n{accuracy_table(runs)}")
    if speeds:
        print(f"\n{speed_table(speeds)}")
    if options.efforts:
        print(f"\n{efforts_table(options)}")
    if options.json:
        figures = {"runs": [dataclasses.asdict(r) for r in runs], "speed": [dataclasses.asdict(s) for s in speeds]}
        settings = {name: value for name, value in vars(options).items() if name not in ("data", "json")}
        write_json(options.json, {"settings": settings, "environment": environment(), **figures})


if __name__ == "__main__":
    main()
