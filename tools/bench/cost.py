"""Time and memory of `optimize` as multiples of plain inference, as Markdown tables: `python -m tools.bench.cost`.

Time: one plain inference pass over the same samples, with the same threads and batch size, right before and right after each run
in the same process; the multiple is the median over the rounds.  Memory: the peak of a process that only infers against the peak
of one that optimizes; libraries and samples are in both.  Beside it stand the moments of the widest layer, cols^2 numbers of 8
bytes for each group, whatever the number of samples.

Growth, one table each: with depth, over chains of equal convolutions (while each node runs a constant number of times, the time
per layer stays flat); with width, over two convolutions of more and more channels; with the inputs of one Gemm; with samples,
on ResNet-20.  `--peer` runs onnxsim's SparseGPT in turn with this package, on the same samples and in processes with the same
threads; but it runs the model on one thread, whatever it is given, so compare with `--threads 1` too.  Other work on the same
cores makes NumPy's threads wait for each other by spinning, and a run several times slower: measure on idle cores, or with
`--threads 1`.

    python -m tools.bench.cost --json cost.json
    python -m tools.bench.cost --peer --no-growth
    python -m tools.bench.cost --large --rounds 2
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from relrep_onnx import Config
from relrep_onnx.allocate import ALLOCATORS, AUTO
from relrep_onnx.repair import REPAIRS
from tools.bench import peer
from tools.bench.data import DATA, TASKS, environment, markdown_table, write_json
from tools.bench.growth import GROWTH
from tools.bench.measured import Cost, measure, orders, run_worker
from tools.bench.worker import Measurement

MODELS: Final = ("resnet20_bn", "fashion")
LARGE: Final = "resnet18_bn"
PEER_MODEL: Final = "resnet20_bn"
PEER_SPARSITY: Final = 0.9

COST_HEADER: Final = (
    "model",
    "samples",
    "plain s",
    "optimize s",
    "time, multiple",
    "plain MB",
    "optimize MB",
    "memory, multiple",
    "largest moments MB",
)
PEER_HEADER: Final = ("model", "sparsity", "samples", "plain s", "ours s", "peer s", "peer / ours")


@dataclass(frozen=True)
class PeerCost:
    """Both on the same samples; the ratio is taken within a round, before the median."""

    name: str
    samples: int
    sparsity: float
    plain_seconds: float
    seconds: float
    peer_seconds: float
    ratio: float


def measure_peer(options: argparse.Namespace, folder: Path) -> PeerCost:
    """This package and the peer in turn."""
    task = TASKS[PEER_MODEL](options.data, 1)
    samples = task.calibration[0]
    order = dataclasses.replace(orders(task.model, samples, options, folder), sparsity=PEER_SPARSITY)
    ours, theirs = [], []
    for number in range(options.rounds):
        ours.append(run_worker(dataclasses.replace(order, mode="optimize")))
        theirs.append(run_worker(dataclasses.replace(order, mode="peer")))
        seconds = f"{ours[-1].optimize:.2f} s, peer {theirs[-1].optimize:.2f} s"
        print(f"{PEER_MODEL}, round {number + 1}: {seconds}", file=sys.stderr, flush=True)
    return compare(PEER_MODEL, len(samples), PEER_SPARSITY, ours, theirs)


def compare(name: str, samples: int, sparsity: float, ours: Sequence[Measurement], theirs: Sequence[Measurement]) -> PeerCost:
    """Medians of rounds in which both ran."""
    return PeerCost(
        name=name,
        samples=samples,
        sparsity=sparsity,
        plain_seconds=median(seconds for run in (*ours, *theirs) for seconds in run.plain),
        seconds=median(run.optimize for run in ours),
        peer_seconds=median(run.optimize for run in theirs),
        ratio=median(their.optimize / own.optimize for own, their in zip(ours, theirs, strict=True)),
    )


def measure_models(names: Sequence[str], options: argparse.Namespace, folder: Path) -> list[Cost]:
    """The given models on their first calibration subset."""
    costs = []
    for name in names:
        task = TASKS[name](options.data, 1)
        costs.append(measure(name, task.model, task.calibration[0], options, folder))
    return costs


def cost_cells(cost: Cost) -> list[str]:
    """A row of the first table."""
    return [
        cost.name,
        str(cost.samples),
        f"{cost.plain_seconds:.2f}",
        f"{cost.optimize_seconds:.2f}",
        f"{cost.time_multiple:.1f}",
        *(f"{value / 1e6:.0f}" for value in (cost.plain_bytes, cost.optimize_bytes)),
        f"{cost.memory_multiple:.2f}",
        f"{cost.moments_bytes / 1e6:.1f}",
    ]


def peer_cells(cost: PeerCost) -> list[str]:
    """A row of the table with the peer."""
    seconds = (cost.plain_seconds, cost.seconds, cost.peer_seconds)
    return [cost.name, f"{cost.sparsity:.2f}", str(cost.samples), *(f"{s:.2f}" for s in seconds), f"{cost.ratio:.1f}"]


def describe(options: argparse.Namespace) -> str:
    """The line above the tables."""
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    return (
        f"allocator {options.allocate}, repair {options.repair}, sparsity {options.sparsity:g}, seed 0, "
        f"{options.threads} threads, batches of {options.batch_size}, median of {options.rounds} rounds "
        f"({options.growth_rounds} for growth); {versions}" + f"; {peer.describe()}" * bool(options.peer)
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    defaults = Config()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help=f"also {LARGE}, 11 million weights")
    parser.add_argument("--no-growth", action="store_true", help="leave out growth with depth, width and samples")
    parser.add_argument("--peer", action="store_true", help=f"also {peer.PEER} on {PEER_MODEL} at {PEER_SPARSITY}")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each model")
    parser.add_argument("--growth-rounds", type=int, default=2, help="measurements in the tables of growth")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime and of NumPy's matrix products")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--sparsity", type=float, default=defaults.goal)
    parser.add_argument("--allocate", choices=[AUTO, *ALLOCATORS], default=defaults.allocate)
    parser.add_argument("--repair", choices=list(REPAIRS), default=defaults.repair)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 files and models (docs/data.md)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.growth_rounds, options.threads, options.batch_size) < 1:
        parser.error("--rounds, --growth-rounds, --threads and --batch-size start at 1")
    if options.peer and not peer.available():
        parser.error(peer.describe())
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="relrep-bench-") as name:
        folder = Path(name)
        costs = measure_models([*MODELS, *[LARGE] * options.large], options, folder)
        peers = [measure_peer(options, folder)] if options.peer else []
        growth = {} if options.no_growth else {what: run(options, folder) for what, (run, _, _) in GROWTH.items()}
    print(f"{describe(options)}\n\n{markdown_table(COST_HEADER, [cost_cells(cost) for cost in costs])}")
    if peers:
        print(f"\n{markdown_table(PEER_HEADER, [peer_cells(cost) for cost in peers])}")
    for what, rows in growth.items():
        _, header, cells = GROWTH[what]
        print(f"\nGrowth with {what}:\n\n{markdown_table(header, [cells(cost) for cost in rows])}")
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("data", "json")}
        figures = {
            "models": [dataclasses.asdict(c) for c in costs],
            "peer": [dataclasses.asdict(c) for c in peers],
            "growth": {what: [dataclasses.asdict(c) for c in rows] for what, rows in growth.items()},
        }
        write_json(options.json, {"settings": settings, "environment": environment(), **figures})


if __name__ == "__main__":
    main()
