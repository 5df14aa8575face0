"""Top-1 by model, allocator, repair and sparsity, as a Markdown table: `python -m tools.bench.accuracy`.

Each row is the mean over the calibration subsets, with half the range as its spread; one subset gives no spread.  The error is
the relative L2 of the outputs against the dense model on held-out images.  `batchnorm` among the repairs prunes without repair
and then re-estimates the BatchNorm statistics; it exists only here.

Without a choice of models, allocators, repairs or sparsities the default selection runs, about ten minutes on two idle cores
(where others use the cores too, set OPENBLAS_NUM_THREADS=1: NumPy's threads wait for each other by spinning):

    python -m tools.bench.accuracy --json accuracy.json
    python -m tools.bench.accuracy --models resnet20_bn --allocate lamp,rr-curve --repair affine --sparsity 0.9 --subsets 1
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Final

from onnx import ModelProto

import relrep_onnx
from relrep_onnx import Config, RelRepError
from relrep_onnx.allocate import ALLOCATORS
from relrep_onnx.repair import REPAIRS
from tools.bench.batchnorm import recalibrate
from tools.bench.data import DATA, SUBSETS, TASKS, Array, Task, environment, markdown_table, open_session, top1, write_json

BATCHNORM: Final = "batchnorm"
HEADER: Final = (
    "model",
    "allocator",
    "repair",
    "sparsity",
    "runs",
    "top-1 %",
    "spread",
    "L2 error",
    "weights removed %",
    "MACs removed %",
)


@dataclass(frozen=True)
class Case:
    """One row to be measured."""

    model: str
    allocate: str
    repair: str
    sparsity: float


@dataclass(frozen=True)
class Trial:
    """One run on one calibration subset; fractions, not percent."""

    top1: float
    error: float
    weights_removed: float
    macs_removed: float


@dataclass(frozen=True)
class Row:
    """A case with its trials; `failure` says why there are none."""

    case: Case
    trials: tuple[Trial, ...]
    failure: str = ""

    def cells(self) -> list[str]:
        """The row as text."""
        case = self.case
        left = [case.model, case.allocate, case.repair, f"{case.sparsity:.2f}", str(len(self.trials))]
        if not self.trials:
            return [*left, "failed", *[""] * (len(HEADER) - len(left) - 1)]
        scores = [100 * trial.top1 for trial in self.trials]
        removed = [100 * fmean(getattr(t, name) for t in self.trials) for name in ("weights_removed", "macs_removed")]
        return [
            *left,
            f"{fmean(scores):.1f}",
            f"{spread(scores):.1f}" if len(scores) > 1 else "",
            f"{fmean(t.error for t in self.trials):.3f}",
            *(f"{value:.1f}" for value in removed),
        ]


def spread(values: Sequence[float]) -> float:
    """Half the range."""
    return (max(values) - min(values)) / 2


def default_cases() -> list[Case]:
    """What runs when nothing is chosen."""
    cases = []
    for model in ("resnet20_bn", "resnet20_folded"):
        cases += [Case(model, allocator, "variance", sparsity) for sparsity in (0.8, 0.9) for allocator in ALLOCATORS]
    cases += [Case("resnet20_bn", "global", repair, 0.8) for repair in (*REPAIRS, BATCHNORM)]
    cases += [Case("resnet20_dynamo18", allocator, "variance", 0.8) for allocator in ("global", "rr-curve")]
    cases += [Case("fashion", allocator, "variance", s) for s in (0.5, 0.8, 0.9) for allocator in ("global", "rr-curve")]
    cases += [Case("mlperf_tiny_resnet8", "rr-curve", "variance", sparsity) for sparsity in (0.3, 0.5)]
    return list(dict.fromkeys(cases))


def chosen_cases(
    models: Sequence[str], allocators: Sequence[str], repairs: Sequence[str], sparsities: Sequence[float]
) -> list[Case]:
    """Every combination of what was chosen; what was left open takes the package's default, and sparsities 0.8 and 0.9."""
    settings = Config()
    return [
        Case(*choice)
        for choice in product(
            models or ("resnet20_bn", "resnet20_folded"),
            allocators or (settings.allocate,),
            repairs or (settings.repair,),
            sparsities or (0.8, 0.9),
        )
    ]


def measure_cases(cases: Sequence[Case], data: Path, count: int, config: Config) -> Iterator[Row]:
    """Measures model by model, the dense model first, so that one model's statistics are gathered once per subset."""
    for name in dict.fromkeys(case.model for case in cases):
        task = TASKS[name](data, count)
        yield Row(
            Case(name, "dense", "", 0.0), (Trial(top1(task.model, task.test_x, task.test_y, config.threads), 0.0, 0.0, 0.0),)
        )
        with tempfile.TemporaryDirectory(prefix="relrep-bench-") as cache:
            for case in (case for case in cases if case.model == name):
                yield measure_case(case, task, task.calibration[:count], config, cache)


def measure_case(case: Case, task: Task, calibration: Sequence[Array], config: Config, cache: str) -> Row:
    """Runs one case on every subset; a failure becomes a row, so that it does not cost the others."""
    try:
        return Row(case, tuple(measure_trial(case, task, samples, config, cache) for samples in calibration))
    except (RelRepError, ValueError) as error:
        return Row(case, (), str(error))


def measure_trial(case: Case, task: Task, samples: Array, config: Config, cache: str) -> Trial:
    """Prunes once and scores the result."""
    repair = "none" if case.repair == BATCHNORM else case.repair
    settings = dataclasses.replace(config, allocate=case.allocate, repair=repair, sparsity=case.sparsity)
    result = relrep_onnx.optimize(task.model, None, samples, settings, cache_dir=cache)
    model: ModelProto = result.model
    if case.repair == BATCHNORM:
        name = open_session(model, config.threads).get_inputs()[0].name
        model = recalibrate(model, {name: samples})
    fidelity = relrep_onnx.compare(task.model, model, task.held_out, settings)
    score = top1(model, task.test_x, task.test_y, config.threads)
    return Trial(score, fidelity.relative_l2, result.sparsity, result.macs_sparsity)


def describe(config: Config, count: int) -> str:
    """The line above the table."""
    parts = [f"{name} {value}" for name, value in environment().items()]
    samples = SUBSETS[0][1] - SUBSETS[0][0]
    subsets = "one calibration subset" if count == 1 else f"{count} calibration subsets"
    return (
        f"{subsets} of {samples} unlabelled samples each, budget of {config.budget}, seed {config.seed}, "
        f"threads {config.threads or 'chosen by ONNX Runtime'}; {', '.join(parts)}"
    )


def _names(known: Sequence[str]) -> type[argparse.Action]:
    """An action that splits a comma-separated list and checks each name."""

    class Names(argparse.Action):
        def __call__(
            self, parser: argparse.ArgumentParser, space: argparse.Namespace, values: object, _: str | None = None
        ) -> None:
            names = str(values).split(",")
            unknown = [name for name in names if name not in known]
            if unknown:
                parser.error(f"{self.dest}: {unknown[0]!r} is none of {', '.join(known)}")
            setattr(space, self.dest, names)

    return Names


def _fractions(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError("sparsities are fractions such as 0.8,0.9")
    return values


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action=_names(list(TASKS)), default=[], metavar="A,B", help=", ".join(TASKS))
    parser.add_argument("--allocate", action=_names(list(ALLOCATORS)), default=[], metavar="A,B", help=", ".join(ALLOCATORS))
    repairs = [*REPAIRS, BATCHNORM]
    parser.add_argument("--repair", action=_names(repairs), default=[], metavar="A,B", help=", ".join(repairs))
    parser.add_argument("--sparsity", type=_fractions, default=[], metavar="S,S", help="fractions of zeros")
    parser.add_argument(
        "--subsets", type=int, choices=range(1, len(SUBSETS) + 1), default=len(SUBSETS), help="calibration subsets"
    )
    parser.add_argument("--budget", choices=("weights", "macs"), default="weights", help="what the sparsity counts")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime; 0: its own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 files and models (docs/data.md)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every trial here")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    config = Config(budget=options.budget, threads=options.threads, seed=options.seed)
    chosen = (options.models, options.allocate, options.repair, options.sparsity)
    cases = chosen_cases(*chosen) if any(chosen) else default_cases()
    rows: list[Row] = []
    started = time.perf_counter()
    for row in measure_cases(cases, options.data, options.subsets, config):
        rows.append(row)
        print(f"{time.perf_counter() - started:5.0f} s  {'  '.join(row.cells())}  {row.failure}", file=sys.stderr, flush=True)
    title = describe(config, options.subsets)
    print(f"{title}\n\n{markdown_table(HEADER, [row.cells() for row in rows])}")
    if options.json:
        settings = {"seed": config.seed, "threads": config.threads, "subsets": options.subsets, "budget": config.budget}
        write_json(
            options.json, {"settings": settings, "environment": environment(), "rows": [dataclasses.asdict(r) for r in rows]}
        )
    failures = [f"{' '.join(row.cells()[:4])}: {row.failure}" for row in rows if row.failure]
    if failures:
        raise SystemExit("\n".join(["", "these rows failed:", *failures]))


if __name__ == "__main__":
    main()
