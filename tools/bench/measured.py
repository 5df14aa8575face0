"""Runs and plain inference in processes of their own, a round of each in turn: seconds and peak bytes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np

from tools.bench.data import ROOT, Array
from tools.bench.worker import Measurement, Order


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
