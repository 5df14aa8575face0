"""Accuracy against measured speed, pattern by pattern: `python -m tools.bench.front`.

One model is pruned and repaired to several sparsities under a MAC or latency budget, unstructured and in blocks, and written with
the sparse kernels in float32 or int8.  Each point has the top-1 of the written file on the test images, and how many times as
fast it is as the dense model in stock ONNX Runtime: the median ratio of interleaved runs of all of them at batch 1.  The dense
model in ONNX Runtime's own int8 stands beside.  Timing needs idle cores.

    python -m tools.bench.front --plot front.png --json front.json
    python -m tools.bench.front --model resnet20_bn --sparsity 0.8,0.9 --forms unstructured,4x1
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnxruntime

from relrep_onnx import Config, kernels, optimize
from relrep_onnx.benchmark import Plan, benchmark
from relrep_onnx.inspection import inspect
from relrep_onnx.pipeline import export_model
from relrep_onnx.runtime import RuntimeOptions
from tools.bench.data import DATA, TASKS, Task, environment, infer, markdown_table, write_json
from tools.bench.options import fractions, names

DENSE_INT8: Final = "ONNX Runtime int8"
FORMS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "unstructured": ("unstructured", {"forms": ("sparse-ort",)}),
    "4x1": ("4x1", {"forms": ("sparse-ort",)}),
    "1x4 int8": ("1x4", {"forms": ("sparse-ort",), "values": "int8"}),
}
"""Patterns, and how a model pruned so is written."""
HEADER: Final = ("pattern", "sparsity", "weights removed %", "top-1 %", "faster (quartiles)", "bytes")


@dataclass(frozen=True)
class Point:
    """One file; fractions, not percent; `faster` relative to the dense model, with its quartiles."""

    form: str
    sparsity: float
    removed: float
    top1: float
    faster: float
    quartiles: tuple[float, float]
    bytes: int

    def cells(self) -> list[str]:
        """A row of the table."""
        low, high = self.quartiles
        return [
            self.form,
            f"{self.sparsity:.2f}",
            f"{100 * self.removed:.1f}",
            f"{100 * self.top1:.1f}",
            f"{self.faster:.2f}x ({low:.2f}-{high:.2f})",
            str(self.bytes),
        ]


@dataclass(frozen=True)
class Written:
    """A file before it is timed."""

    form: str
    sparsity: float
    removed: float
    path: Path


def pruned(task: Task, pattern: str, sparsity: float, config: Config, folder: Path) -> Path:
    """The model pruned and repaired, made where it is not there yet."""
    path = folder / f"{task.name}.{pattern}.{config.budget}.{sparsity:g}.onnx"
    if not path.exists():
        optimize(str(task.model), path, task.calibration[0], dataclasses.replace(config, sparsity=sparsity, pattern=pattern))
    return path


def write(task: Task, form: str, sparsity: float, config: Config, folder: Path) -> Written:
    """One point's file."""
    pattern, settings = FORMS[form]
    source = pruned(task, pattern, sparsity, config, folder)
    path = source.with_suffix(".sparse-ort.onnx")
    export_model(str(source), path, task.calibration[0], dataclasses.replace(config, **settings))
    removed = zero_share(source)
    print(f"{form} {sparsity:g}: {removed:.1%} of the weights", file=sys.stderr, flush=True)
    return Written(form, sparsity, removed, path)


def zero_share(path: Path) -> float:
    """Zeros among the weights that are pruned by default."""
    layers = inspect(str(path)).layers
    return sum(facts.zeros for facts in layers) / sum(facts.layer.size for facts in layers)


def top1(task: Task, path: Path, threads: int) -> float:
    """Top-1 of a file, with the kernels loaded where there are some."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if kernels.available():
        kernels.register(options)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return float((infer(session, task.test_x).argmax(axis=1) == task.test_y).mean())


def measure(options: argparse.Namespace, folder: Path) -> list[Point]:
    """Every point of the front, the dense model first."""
    task = TASKS[options.model](options.data, 1)
    chosen = {"allocate": options.allocate, "positions": options.positions}
    config = Config(budget=options.budget, threads=options.threads, seed=options.seed, **chosen)
    files = [Written("dense", 0.0, 0.0, task.model)]
    int8 = folder / "dense-int8.onnx"
    export_model(str(task.model), int8, task.calibration[0], dataclasses.replace(config, forms=("int8",), max_error=1.0))
    files.append(Written(DENSE_INT8, 0.0, 0.0, int8))
    files += [write(task, form, sparsity, config, folder) for form in options.forms for sparsity in options.sparsity]
    shapes = {"rounds": options.rounds, "threads": (options.threads,)}
    (setting,) = benchmark([file.path for file in files], Plan(**shapes), RuntimeOptions(), lambda *_: None)
    return [
        Point(
            form=file.form,
            sparsity=file.sparsity,
            removed=file.removed,
            top1=top1(task, file.path, options.threads),
            faster=timing.ratio,
            quartiles=timing.ratio_quartiles,
            bytes=file.path.stat().st_size,
        )
        for file, timing in zip(files, setting.timings, strict=True)
    ]


def plot(points: Sequence[Point], title: str, path: Path) -> None:
    """Speed to the right, top-1 upwards, a line per pattern."""
    from matplotlib.figure import Figure  # not on top: only --plot needs it

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for marker, form in zip("sXoD^v", dict.fromkeys(p.form for p in points), strict=False):
        line = sorted((p.faster, 100 * p.top1) for p in points if p.form == form)
        axes.plot([x for x, _ in line], [y for _, y in line], marker=marker, markersize=5, linewidth=1.4, label=form)
    axes.set(title=title, xlabel="times as fast as dense in stock ONNX Runtime", ylabel="top-1 %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(TASKS), default="resnet18_bn")
    parser.add_argument("--forms", action=names(list(FORMS)), default=list(FORMS), metavar="A,B", help=", ".join(FORMS))
    parser.add_argument("--sparsity", type=fractions, default=[0.5, 0.7, 0.8, 0.9], metavar="S,S", help="of the budget")
    parser.add_argument("--budget", choices=("macs", "latency"), default="macs", help="what sparsity counts")
    parser.add_argument("--allocate", default=Config.allocate, help="as in optimize")
    parser.add_argument("--positions", type=int, default=Config.positions, help="as in optimize")
    parser.add_argument("--rounds", type=int, default=60, help="interleaved runs of each file")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 files and models (docs/data.md)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the pruned models here, and take those that are there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the points here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them (needs matplotlib)")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="relrep-bench-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        points = measure(options, folder)
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    print(
        f"{options.model}, budget {options.budget}, allocate {options.allocate}, {options.positions} positions, "
        f"first calibration subset, seed {options.seed}, "
        f"{options.threads} threads, batch 1, {options.rounds} rounds, kernels: {', '.join(kernels.instruction_sets())}; "
        f"{versions}\n\n{markdown_table(HEADER, [point.cells() for point in points])}"
    )
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("data", "keep", "json", "plot")}
        rows = [dataclasses.asdict(point) for point in points]
        write_json(options.json, {"settings": settings, "environment": environment(), "points": rows})
    if options.plot:
        plot(points, f"{options.model}, {options.threads} thread(s), batch 1", options.plot)


if __name__ == "__main__":
    main()
