"""Top-1 by model, allocator, repair, pattern and sparsity, as a Markdown table: `python -m tools.bench.accuracy`.

Each row is the mean over its calibration subsets, with half the range as its spread; one subset gives no spread.  The error is
the relative L2 of the outputs against the dense model on held-out images, the seconds are the median over the runs of a whole
`optimize`, nothing kept between runs.  `batchnorm` among the repairs prunes without repair and then re-estimates the BatchNorm
statistics; it exists only here.  A sparsity of "all" prunes all that an N:M pattern allows.

Without a choice of models, allocators, repairs, patterns or sparsities a fixed table runs, about fifteen minutes on two idle
cores (where others use the cores too, set OPENBLAS_NUM_THREADS=1: NumPy's threads wait for each other by spinning):

    python -m tools.bench.accuracy --json accuracy.json
    python -m tools.bench.accuracy --models resnet20_bn --allocate lamp,rr-curve --repair affine --sparsity 0.9 --subsets 1
    python -m tools.bench.accuracy --models resnet20_folded --pattern 2:4,1:4
    python -m tools.bench.accuracy --models resnet20_bn --sparsity 0.5,0.9 --peer
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Final, Literal

from onnx import ModelProto

import relrep_onnx
from relrep_onnx import Config, RelRepError
from relrep_onnx.allocate import ALLOCATORS, AUTO
from relrep_onnx.graph import Graph, count_zeros
from relrep_onnx.masks import pattern_named
from relrep_onnx.repair import REPAIRS
from relrep_onnx.types import ConfigError
from tools.bench import peer
from tools.bench.batchnorm import recalibrate
from tools.bench.data import DATA, SUBSETS, TASKS, Array, Task, environment, markdown_table, open_session, top1, write_json
from tools.bench.options import fractions, names

BATCHNORM: Final = "batchnorm"
UNSTRUCTURED: Final = "unstructured"
MODELS: Final = ("resnet20_bn", "resnet20_folded", "resnet20_dynamo18")
LARGE: Final = "resnet18_bn"
SPARSITIES: Final = (0.8, 0.9)
"""Where none are chosen."""
HEADER: Final = (
    "model",
    "allocator",
    "repair",
    "pattern",
    "budget",
    "sparsity",
    "runs",
    "top-1 %",
    "spread",
    "L2 error",
    "weights removed %",
    "MACs removed %",
    "seconds",
)


@dataclass(frozen=True)
class Case:
    """One row to be measured; a sparsity of None prunes all that the pattern allows."""

    model: str
    allocate: str
    repair: str
    sparsity: float | None
    pattern: str = UNSTRUCTURED
    budget: Literal["weights", "macs"] | None = "weights"
    subsets: int = 1


@dataclass(frozen=True)
class Trial:
    """One run on one calibration subset; fractions, not percent; `allocator` is the one that was used."""

    top1: float
    error: float
    weights_removed: float
    macs_removed: float
    seconds: float = 0.0
    allocator: str = ""


@dataclass(frozen=True)
class Row:
    """A case with its trials; `failure` says why there are none."""

    case: Case
    trials: tuple[Trial, ...]
    failure: str = ""

    def label(self) -> list[str]:
        """What was measured, as text."""
        case, trials = self.case, self.trials
        used = ", ".join(dict.fromkeys(trial.allocator for trial in trials))
        allocator = f"{AUTO}: {used}" if case.allocate == AUTO and trials else case.allocate
        reached = f"{fmean(t.weights_removed for t in trials):.2f}" if trials else "all"
        sparsity = reached if case.sparsity is None else f"{case.sparsity:.2f}"
        return [case.model, allocator, case.repair, case.pattern, case.budget or "", sparsity]

    def cells(self) -> list[str]:
        """The row as text."""
        left = [*self.label(), str(len(self.trials))]
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
            f"{median(t.seconds for t in self.trials):.1f}" if self.case.repair else "",
        ]


def spread(values: Sequence[float]) -> float:
    """Half the range."""
    return (max(values) - min(values)) / 2


def default_cases(*, large: bool = False) -> list[Case]:
    """What runs when nothing is chosen; the peer's rows are `peer_cases`."""
    allocate, repair = Config().allocate, Config().repair
    several = {("resnet20_folded", 0.9), ("resnet20_folded", 0.95)}
    cases = [
        Case(model, allocate, repair, sparsity, subsets=len(SUBSETS) if (model, sparsity) in several else 1)
        for model in MODELS
        for sparsity in (0.8, 0.9, 0.95)
    ]
    cases += [Case(model, allocate, repair, None, "2:4") for model in MODELS]
    folded = "resnet20_folded"
    cases += [Case(folded, name, repair, 0.9) for name in ("global", "erk", "lamp", "rr-curve")]
    cases += [Case(folded, "rr-curve", name, 0.9) for name in ("none", "variance", "asr", "affine", repair)]
    cases += [Case(folded, allocate, repair, s, pattern) for pattern, s in (("4x1", 0.9), ("1x4", 0.9), ("1:4", None))]
    cases += [Case("mlperf_tiny_resnet8", allocate, repair, sparsity) for sparsity in (0.5, 0.6, 0.7)]
    cases += [Case("fashion", allocate, repair, sparsity) for sparsity in (0.8, 0.9)]
    if large:
        cases += [Case(LARGE, allocate, repair, 0.9), Case(LARGE, allocate, repair, 0.9, budget="macs")]
    return list(dict.fromkeys(cases))


def peer_cases(models: Sequence[str] = (), sparsities: Sequence[float] = ()) -> list[Case]:
    """The peer on what was chosen, or beside the fixed table."""
    if models or sparsities:
        pairs = list(product(models or MODELS[:2], sparsities or SPARSITIES))
    else:
        pairs = [*product(("resnet20_bn",), (0.5, 0.7, 0.9)), ("mlperf_tiny_resnet8", 0.5)]
    return [Case(model, "uniform", peer.PEER, sparsity) for model, sparsity in pairs]


def chosen_cases(
    models: Sequence[str],
    allocators: Sequence[str],
    repairs: Sequence[str],
    sparsities: Sequence[float],
    patterns: Sequence[str] = (),
    *,
    budget: Literal["weights", "macs"] = "weights",
    subsets: int = len(SUBSETS),
) -> list[Case]:
    """Every combination of what was chosen; what was left open takes the package's default.

    Sparsities left open are 0.8 and 0.9, or all that an N:M pattern allows.
    """
    settings = Config()
    cases = []
    for model, allocator, repair, pattern in product(
        models or MODELS[:2], allocators or (settings.allocate,), repairs or (settings.repair,), patterns or (settings.pattern,)
    ):
        levels = sparsities or ((None,) if pattern_named(pattern).selective else SPARSITIES)
        cases += [Case(model, allocator, repair, sparsity, pattern, budget, subsets) for sparsity in levels]
    return cases


def select(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for, those of a peer that is not installed left out."""
    chosen = (options.models, options.allocate, options.repair, options.sparsity, options.pattern)
    if any(chosen):
        cases = chosen_cases(*chosen, budget=options.budget, subsets=options.subsets)
        peers = peer_cases(options.models or MODELS[:2], options.sparsity or SPARSITIES) if options.peer else []
        peers = [dataclasses.replace(case, subsets=options.subsets) for case in peers]
    else:
        cases = [dataclasses.replace(c, subsets=min(c.subsets, options.subsets)) for c in default_cases(large=options.large)]
        peers = peer_cases()
    if peers and not peer.available():
        print(peer.describe(), file=sys.stderr)
        peers = []
    return cases + peers


def measure_cases(cases: Sequence[Case], data: Path, config: Config) -> Iterator[Row]:
    """Measures model by model, the dense model first."""
    for name in dict.fromkeys(case.model for case in cases):
        mine = [case for case in cases if case.model == name]
        task = TASKS[name](data, max(case.subsets for case in mine))
        dense = Trial(top1(task.model, task.test_x, task.test_y, config.threads), 0.0, 0.0, 0.0)
        yield Row(Case(name, "dense", "", 0.0, "", None), (dense,))
        for case in mine:
            yield measure_case(case, task, config)


def measure_case(case: Case, task: Task, config: Config) -> Row:
    """Runs one case on its subsets; a failure becomes a row, so that it does not cost the others."""
    run = peer_trial if case.repair == peer.PEER else measure_trial
    try:
        return Row(case, tuple(run(case, task, samples, config) for samples in task.calibration[: case.subsets]))
    except (RelRepError, ValueError, RuntimeError) as error:
        return Row(case, (), str(error))


def measure_trial(case: Case, task: Task, samples: Array, config: Config) -> Trial:
    """Prunes once and scores the result."""
    repair = "none" if case.repair == BATCHNORM else case.repair
    settings = dataclasses.replace(
        config,
        allocate=case.allocate,
        repair=repair,
        sparsity=case.sparsity,
        pattern=case.pattern,
        budget=case.budget or config.budget,
    )
    started = time.perf_counter()
    result = relrep_onnx.optimize(task.model, None, samples, settings)
    model: ModelProto = result.model
    if case.repair == BATCHNORM:
        name = open_session(model, config.threads).get_inputs()[0].name
        model = recalibrate(model, {name: samples})
    seconds = time.perf_counter() - started
    return score(task, model, config, result.sparsity, result.macs_sparsity, seconds, result.allocator)


def peer_trial(case: Case, task: Task, samples: Array, config: Config) -> Trial:
    """The peer on the same samples, counted over the layers that this package prunes."""
    model, seconds = peer.prune(task.model, samples, case.sparsity or 0.0, config.batch_size)
    layers = relrep_onnx.analyze(task.model, samples[: config.batch_size], dataclasses.replace(config, repair="none")).layers
    zeros = count_zeros(Graph(model), [report.layer for report in layers])
    weights = sum(zeros.values()) / sum(report.layer.size for report in layers)
    macs = sum(r.macs * zeros[r.layer.name] / r.layer.size for r in layers) / sum(r.macs for r in layers)
    return score(task, model, config, weights, macs, seconds, case.allocate)


def score(task: Task, model: ModelProto, config: Config, weights: float, macs: float, seconds: float, allocator: str) -> Trial:
    """A sparse model on the held-out and on the test images."""
    fidelity = relrep_onnx.compare(task.model, model, task.held_out, config)
    return Trial(top1(model, task.test_x, task.test_y, config.threads), fidelity.relative_l2, weights, macs, seconds, allocator)


def describe(config: Config, subsets: int, *, with_peer: bool) -> str:
    """The line above the table."""
    parts = [f"{name} {value}" for name, value in environment().items()]
    samples = SUBSETS[0][1] - SUBSETS[0][0]
    return (
        f"up to {subsets} calibration subset{'s' * (subsets > 1)} of {samples} unlabelled samples each (column runs), "
        f"seed {config.seed}, threads {config.threads or 'chosen by ONNX Runtime'}; {', '.join(parts)}"
        + f"; {peer.describe()}"
        * with_peer
    )


def _pattern(text: str) -> list[str]:
    """Names of patterns, each one checked."""
    try:
        return [pattern_named(name).name for name in text.split(",")]
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action=names(list(TASKS)), default=[], metavar="A,B", help=", ".join(TASKS))
    allocators, repairs = [AUTO, *ALLOCATORS], [*REPAIRS, BATCHNORM]
    parser.add_argument("--allocate", action=names(allocators), default=[], metavar="A,B", help=", ".join(allocators))
    parser.add_argument("--repair", action=names(repairs), default=[], metavar="A,B", help=", ".join(repairs))
    parser.add_argument("--sparsity", type=fractions, default=[], metavar="S,S", help="fractions of zeros")
    parser.add_argument("--pattern", type=_pattern, default=[], metavar="P,P", help="such as unstructured,2:4,4x1")
    parser.add_argument("--peer", action="store_true", help=f"also {peer.PEER} on chosen cases; the fixed table has it anyway")
    parser.add_argument("--large", action="store_true", help=f"the fixed table with {LARGE}, 11 million weights")
    parser.add_argument(
        "--subsets", type=int, choices=range(1, len(SUBSETS) + 1), default=len(SUBSETS), help="calibration subsets, at most"
    )
    parser.add_argument("--budget", choices=("weights", "macs"), default="weights", help="what the chosen cases count")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime; 0: its own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 files and models (docs/data.md)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every trial here")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    config = Config(threads=options.threads, seed=options.seed)
    cases = select(options)
    rows: list[Row] = []
    started = time.perf_counter()
    for row in measure_cases(cases, options.data, config):
        rows.append(row)
        print(f"{time.perf_counter() - started:5.0f} s  {'  '.join(row.cells())}  {row.failure}", file=sys.stderr, flush=True)
    with_peer = options.peer or any(case.repair == peer.PEER for case in cases)
    title = describe(config, options.subsets, with_peer=with_peer)
    print(f"{title}\n\n{markdown_table(HEADER, [row.cells() for row in rows])}")
    if options.json:
        settings = {"seed": config.seed, "threads": config.threads, "subsets": options.subsets, "peer": peer.describe()}
        write_json(
            options.json, {"settings": settings, "environment": environment(), "rows": [dataclasses.asdict(r) for r in rows]}
        )
    failures = [f"{' '.join(row.label())}: {row.failure}" for row in rows if row.failure]
    if failures:
        raise SystemExit("\n".join(["", "these rows failed:", *failures]))


if __name__ == "__main__":
    main()
