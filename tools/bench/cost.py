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
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Final

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from relrep_onnx import Config
from relrep_onnx.allocate import ALLOCATORS, AUTO
from relrep_onnx.repair import REPAIRS
from tools.bench import peer
from tools.bench.data import DATA, ROOT, TASKS, Array, environment, markdown_table, write_json
from tools.bench.worker import Measurement, Order

MODELS: Final = ("resnet20_bn", "fashion")
LARGE: Final = "resnet18_bn"
DEPTHS: Final = (4, 8, 16, 32)
CHAIN_SHAPE: Final = (256, 16, 16, 16)
"""Samples, channels, height and width that a chain gets."""
WIDTHS: Final = (64, 128, 256, 512)
WIDE_SHAPE: Final = (512, 8, 8)
"""Samples, height and width that a wide pair of convolutions gets: more sampled positions than the widest has columns."""
COLUMNS: Final = (1_024, 4_608, 25_088)
"""Inputs of one Gemm: the last are those of VGG's first one, which reconstruction takes in blocks."""
GEMM_SHAPE: Final = (512, 256)
"""Samples and outputs of that Gemm."""
COUNTS: Final = (128, 256, 512)
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
GROWTH_HEADER: Final = ("convolutions", "plain s", "optimize s", "ms per layer", "time, multiple", "optimize MB")
WIDTH_HEADER: Final = (
    "channels",
    "columns",
    "plain s",
    "optimize s",
    "s per layer",
    "time, multiple",
    "optimize MB",
    "largest moments MB",
)
COLUMNS_HEADER: Final = ("inputs", "plain s", "optimize s", "optimize MB", "its moments MB")
SAMPLES_HEADER: Final = ("samples", "plain s", "optimize s", "ms per sample", "time, multiple", "optimize MB")
PEER_HEADER: Final = ("model", "sparsity", "samples", "plain s", "ours s", "peer s", "peer / ours")


@dataclass(frozen=True)
class Cost:
    """Medians over the rounds: seconds, peak bytes."""

    name: str
    samples: int
    layers: int
    plain_seconds: float
    optimize_seconds: float
    time_multiple: float
    plain_bytes: int
    optimize_bytes: int
    memory_multiple: float
    moments_bytes: int


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


def chain(depth: int, channels: int = CHAIN_SHAPE[1], seed: int = 0, classes: int = 10) -> ModelProto:
    """A chain of equal 3x3 convolutions and Relus with a pooled head: x[N, channels, H, W] -> y[N, classes]."""
    rng = np.random.default_rng(seed)
    nodes, tensors = [], []
    value = "x"
    for number in range(depth):
        weight = rng.normal(scale=np.sqrt(2 / (9 * channels)), size=(channels, channels, 3, 3))
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{number}"))
        nodes.append(helper.make_node("Conv", [value, f"w{number}"], [f"c{number}"], name=f"conv{number}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        value = f"r{number}"
    tensors.append(numpy_helper.from_array(rng.normal(size=(channels, classes)).astype(np.float32), "head"))
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "head"], ["y"]))
    graph = helper.make_graph(
        nodes,
        f"chain{depth}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", classes])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def gemm(columns: int, rows: int, seed: int = 0) -> ModelProto:
    """One matrix product: x[N, columns] -> y[N, rows]."""
    weight = np.random.default_rng(seed).normal(scale=columns**-0.5, size=(columns, rows)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], name="gemm")],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", rows])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run_worker(order: Order) -> Measurement:
    """Carries out one order in a fresh process, with NumPy's matrix products on as many threads as ONNX Runtime.

    Raises:
        SystemExit: the process failed; its messages are on stderr.
    """
    threads = {f"{library}_NUM_THREADS": str(order.threads) for library in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM")}
    command = [sys.executable, "-m", "tools.bench.worker", json.dumps(dataclasses.asdict(order))]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the measurement of {order.model} failed")
    values = json.loads(done.stdout)
    return Measurement(**{**values, "plain": tuple(values["plain"])})


def summarise(name: str, samples: int, plain: Sequence[Measurement], runs: Sequence[Measurement]) -> Cost:
    """Medians of the rounds; the multiple is taken within each round, before the median."""
    plain_bytes, optimize_bytes = (round(median(run.peak for run in part)) for part in (plain, runs))
    return Cost(
        name=name,
        samples=samples,
        layers=runs[0].layers,
        plain_seconds=median(seconds for run in runs for seconds in run.plain),
        optimize_seconds=median(run.optimize for run in runs),
        time_multiple=median(run.optimize / fmean(run.plain) for run in runs),
        plain_bytes=plain_bytes,
        optimize_bytes=optimize_bytes,
        memory_multiple=optimize_bytes / plain_bytes,
        moments_bytes=runs[0].moments,
    )


def orders(model: Path, samples: Array, options: argparse.Namespace, folder: Path) -> Order:
    """The order of a plain pass; those of a run differ in the mode."""
    file = folder / "samples.npy"
    np.save(file, samples)
    return Order(
        "plain",
        str(model.resolve()),
        str(file),
        options.threads,
        options.batch_size,
        options.sparsity,
        options.allocate,
        options.repair,
    )


def measure(name: str, model: Path, samples: Array, options: argparse.Namespace, folder: Path, rounds: int | None = None) -> Cost:
    """Measures one model, a round of plain inference and a round of optimizing in turn."""
    order = orders(model, samples, options, folder)
    plain, runs = [], []
    for number in range(rounds or options.rounds):
        plain.append(run_worker(order))
        runs.append(run_worker(dataclasses.replace(order, mode="optimize")))
        ratio = runs[-1].optimize / fmean(runs[-1].plain)
        print(f"{name}, round {number + 1}: {runs[-1].optimize:.2f} s, {ratio:.1f} passes", file=sys.stderr, flush=True)
    return summarise(name, len(samples), plain, runs)


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


def measure_growth(options: argparse.Namespace, folder: Path) -> list[Cost]:
    """Chains of growing depth on the same random samples."""
    samples = np.random.default_rng(0).normal(size=CHAIN_SHAPE).astype(np.float32)
    costs = []
    for depth in DEPTHS:
        path = folder / f"chain{depth}.onnx"
        onnx.save(chain(depth), path)
        costs.append(measure(f"chain of {depth}", path, samples, options, folder, options.growth_rounds))
    return costs


def measure_width(options: argparse.Namespace, folder: Path) -> list[Cost]:
    """Two convolutions of growing width; the head has one output, so that it stays too small to be pruned."""
    count, *size = WIDE_SHAPE
    costs = []
    for channels in WIDTHS:
        path = folder / f"width{channels}.onnx"
        onnx.save(chain(2, channels, classes=1), path)
        samples = np.random.default_rng(0).normal(size=(count, channels, *size)).astype(np.float32)
        costs.append(measure(str(channels), path, samples, options, folder, options.growth_rounds))
    return costs


def measure_columns(options: argparse.Namespace, folder: Path) -> list[Cost]:
    """One Gemm with more and more inputs."""
    count, rows = GEMM_SHAPE
    costs = []
    for columns in COLUMNS:
        path = folder / f"gemm{columns}.onnx"
        onnx.save(gemm(columns, rows), path)
        samples = np.random.default_rng(0).normal(size=(count, columns)).astype(np.float32)
        costs.append(measure(str(columns), path, samples, options, folder, options.growth_rounds))
    return costs


def measure_counts(options: argparse.Namespace, folder: Path) -> list[Cost]:
    """ResNet-20 on growing parts of its first calibration subset."""
    task = TASKS[PEER_MODEL](options.data, 1)
    samples = task.calibration[0]
    return [
        measure(f"{PEER_MODEL} on {count}", task.model, samples[:count], options, folder, options.growth_rounds)
        for count in COUNTS
    ]


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


def growth_cells(cost: Cost) -> list[str]:
    """A row of the second table."""
    return [
        str(cost.layers),
        f"{cost.plain_seconds:.3f}",
        f"{cost.optimize_seconds:.2f}",
        f"{1000 * cost.optimize_seconds / cost.layers:.0f}",
        f"{cost.time_multiple:.1f}",
        f"{cost.optimize_bytes / 1e6:.0f}",
    ]


def width_cells(cost: Cost) -> list[str]:
    """A row of the table of widths; the moments are a square of the columns."""
    return [
        cost.name,
        str(math.isqrt(cost.moments_bytes // 8)),
        f"{cost.plain_seconds:.2f}",
        f"{cost.optimize_seconds:.2f}",
        f"{cost.optimize_seconds / cost.layers:.2f}",
        f"{cost.time_multiple:.1f}",
        f"{cost.optimize_bytes / 1e6:.0f}",
        f"{cost.moments_bytes / 1e6:.1f}",
    ]


def columns_cells(cost: Cost) -> list[str]:
    """A row of the table of inputs."""
    sizes = (cost.optimize_bytes, cost.moments_bytes)
    return [cost.name, f"{cost.plain_seconds:.3f}", f"{cost.optimize_seconds:.1f}", *(f"{size / 1e6:.0f}" for size in sizes)]


def samples_cells(cost: Cost) -> list[str]:
    """A row of the table of sample counts."""
    return [
        str(cost.samples),
        f"{cost.plain_seconds:.2f}",
        f"{cost.optimize_seconds:.2f}",
        f"{1000 * cost.optimize_seconds / cost.samples:.1f}",
        f"{cost.time_multiple:.1f}",
        f"{cost.optimize_bytes / 1e6:.0f}",
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


GROWTH: Final = {
    "depth": (measure_growth, GROWTH_HEADER, growth_cells),
    "width": (measure_width, WIDTH_HEADER, width_cells),
    "inputs of a Gemm": (measure_columns, COLUMNS_HEADER, columns_cells),
    "samples": (measure_counts, SAMPLES_HEADER, samples_cells),
}
"""The tables of growth: how each is measured and printed."""


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
