"""Time and memory of `optimize` as multiples of plain inference, as Markdown tables: `python -m tools.bench.cost`.

Time: one plain inference pass over the same samples, with the same threads and batch size, right before and right after each run
in the same process; the multiple is the median over the rounds.  Memory: the peak of a process that only infers against the peak
of one that optimizes; libraries and samples are in both.  Beside it stand the moments of the widest layer, cols^2 numbers of 8
bytes for each group, whatever the number of samples.  The second table optimizes chains of equal convolutions: while each node
runs a constant number of times, the time per layer stays flat.

    python -m tools.bench.cost --json cost.json
    python -m tools.bench.cost --large --rounds 2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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

from relrep_onnx.allocate import ALLOCATORS
from relrep_onnx.repair import REPAIRS
from tools.bench.data import DATA, ROOT, TASKS, Array, environment, markdown_table, write_json
from tools.bench.worker import Measurement, Order

MODELS: Final = ("resnet20_bn", "fashion")
LARGE: Final = "resnet18_bn"
DEPTHS: Final = (4, 8, 16, 32)
CHAIN_SHAPE: Final = (256, 16, 16, 16)
"""Samples, channels, height and width that a chain gets."""

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


def chain(depth: int, channels: int = CHAIN_SHAPE[1], seed: int = 0) -> ModelProto:
    """A chain of equal 3x3 convolutions and Relus with a pooled head: x[N, channels, H, W] -> y[N, 10]."""
    rng = np.random.default_rng(seed)
    nodes, tensors = [], []
    value = "x"
    for number in range(depth):
        weight = rng.normal(scale=np.sqrt(2 / (9 * channels)), size=(channels, channels, 3, 3))
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{number}"))
        nodes.append(helper.make_node("Conv", [value, f"w{number}"], [f"c{number}"], name=f"conv{number}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        value = f"r{number}"
    tensors.append(numpy_helper.from_array(rng.normal(size=(channels, 10)).astype(np.float32), "head"))
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "head"], ["y"]))
    graph = helper.make_graph(
        nodes,
        f"chain{depth}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        tensors,
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


def measure(name: str, model: Path, samples: Array, options: argparse.Namespace, folder: Path) -> Cost:
    """Measures one model, a round of plain inference and a round of optimizing in turn."""
    file = folder / "samples.npy"
    np.save(file, samples)
    order = Order(
        "plain",
        str(model.resolve()),
        str(file),
        options.threads,
        options.batch_size,
        options.sparsity,
        options.allocate,
        options.repair,
    )
    plain, runs = [], []
    for number in range(options.rounds):
        plain.append(run_worker(order))
        runs.append(run_worker(dataclasses.replace(order, mode="optimize")))
        ratio = runs[-1].optimize / fmean(runs[-1].plain)
        print(f"{name}, round {number + 1}: {runs[-1].optimize:.2f} s, {ratio:.1f} passes", file=sys.stderr, flush=True)
    return summarise(name, len(samples), plain, runs)


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
        costs.append(measure(f"chain of {depth}", path, samples, options, folder))
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


def describe(options: argparse.Namespace) -> str:
    """The line above the tables."""
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    return (
        f"allocator {options.allocate}, repair {options.repair}, sparsity {options.sparsity:g}, seed 0, "
        f"{options.threads} threads, batches of {options.batch_size}, median of {options.rounds} rounds; {versions}"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help=f"also {LARGE}, 11 million weights")
    parser.add_argument("--no-growth", action="store_true", help="leave out the chains")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each model")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime and of NumPy's matrix products")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--allocate", choices=list(ALLOCATORS), default="rr-curve")
    parser.add_argument("--repair", choices=list(REPAIRS), default="variance")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 files and models (docs/data.md)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.threads, options.batch_size) < 1:
        parser.error("--rounds, --threads and --batch-size start at 1")
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="relrep-bench-") as name:
        folder = Path(name)
        costs = measure_models([*MODELS, *[LARGE] * options.large], options, folder)
        growth = [] if options.no_growth else measure_growth(options, folder)
    print(f"{describe(options)}\n\n{markdown_table(COST_HEADER, [cost_cells(cost) for cost in costs])}")
    if growth:
        print(f"\n{markdown_table(GROWTH_HEADER, [growth_cells(cost) for cost in growth])}")
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("data", "json")}
        figures = {"models": [dataclasses.asdict(c) for c in costs], "growth": [dataclasses.asdict(c) for c in growth]}
        write_json(options.json, {"settings": settings, "environment": environment(), **figures})


if __name__ == "__main__":
    main()
