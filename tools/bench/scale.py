"""What grows with what, for docs/scale.md: `python -m tools.bench.scale`.

Sweeps of the shipped sample with one job and two: wall seconds, processor seconds of all processes, and the largest process.  One
thread each.  Rounds in turn, medians.

Shares: where the processor seconds of one `optimize` go, and so what could be spread over machines: the dense walk with its
moments, the sequential walk with its moments, the repair of the layers in between, all else.

Single layers: processor seconds of `optimize` on one matrix product, one thread, allocator uniform, against the terms of the cost
of reconstruction, a + b in^3 + c out in^2 (samples grow with the inputs).  From these, and from the rate of plain matrix
products, a transformer of a billion parameters is computed, not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import onnx

from relrep_onnx import Config, optimize, steps
from relrep_onnx.calibrate import sequential_pass
from relrep_onnx.statistics import dense_statistics
from relrep_onnx.types import Array
from tools.bench.data import DATA, ROOT, SAMPLES, TASKS, environment, markdown_table
from tools.bench.growth import gemm

JOBS: Final = (1, 2)
GRID: Final = ("--sparsity", "0.6:0.9:0.1", "--allocate", "uniform", "--repair", "variance,reconstruct")
POINTS: Final = 8
LAYERS: Final = ((768, 768), (1024, 256), (1024, 1024))
"""Inputs and outputs of the layers that are measured."""
SAMPLES_PER_INPUT: Final = 2
RATE_SIZE: Final = 2048

WIDTH, INNER, BLOCKS, TOKENS, CALIBRATION, POSITIONS = 2048, 8192, 20, 128, 512, 20
"""The computed transformer: four matrices WIDTH x WIDTH and two WIDTH x INNER in a block; its samples."""
WALKS: Final = 4
"""Dense, sequential, the trials of single layers (about one pass together), verification."""


@dataclass(frozen=True)
class Spent:
    """Of a process and all that it started: wall and processor seconds, bytes of the largest one."""

    wall: float
    processor: float
    peak: int


def run(arguments: Sequence[str]) -> Spent:
    """The command line in a fresh process, NumPy's matrix products on one thread."""
    body = "import relrep_onnx.cli\nif __name__ == '__main__': relrep_onnx.cli.main()"
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM")}
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", body, *arguments, "--quiet"], cwd=ROOT, env={**os.environ, **threads})
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return Spent(time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def sweeps(rounds: int) -> dict[int, Spent]:
    """Sweeps of the sample by their number of jobs."""
    base = f"--calib {SAMPLES}/fashion_calib.npz --mean 0.286 --std 0.353 --threads 1".split()
    found: dict[int, list[Spent]] = {jobs: [] for jobs in JOBS}
    for _ in range(rounds):
        for jobs in JOBS:
            with tempfile.TemporaryDirectory(prefix="relrep-bench-") as folder:
                found[jobs].append(run(["sweep", f"{SAMPLES}/fashion.onnx", folder, *base, *GRID, "--jobs", str(jobs)]))
                print(f"jobs {jobs}: {found[jobs][-1]}", file=sys.stderr, flush=True)
    return {jobs: _median(spent) for jobs, spent in found.items()}


def layers(rounds: int) -> dict[tuple[int, int], Spent]:
    """`optimize` on single matrix products."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="relrep-bench-") as name:
        folder = Path(name)
        for columns, rows in LAYERS:
            onnx.save(gemm(columns, rows), folder / "net.onnx")
            count = SAMPLES_PER_INPUT * columns * 8 // 7  # an eighth is held out
            np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(count, columns)).astype(np.float32))
            command = f"optimize {folder}/net.onnx {folder}/sparse.onnx --calib {folder}/x.npy --allocate uniform --threads 1"
            found[columns, rows] = _median([run(command.split()) for _ in range(rounds)])
            print(f"{columns} -> {rows}: {found[columns, rows]}", file=sys.stderr, flush=True)
    return found


def _median(spent: Sequence[Spent]) -> Spent:
    wall, processor, peak = (median(column) for column in zip(*map(dataclasses.astuple, spent), strict=True))
    return Spent(wall, processor, round(peak))


def split(model: Path, samples: Array) -> list[float]:
    """Processor seconds of the dense walk, the sequential walk, repair, and all else of one `optimize` in this process."""
    spent = {"dense": 0.0, "sequential": 0.0, "repair": 0.0}

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        spent[name] += time.process_time() - started

    def dense(*arguments: Any) -> Iterator[Any]:
        walk = dense_statistics(*arguments)
        while True:
            with clock("dense"):
                found = next(walk, None)
            if found is None:
                return
            yield found

    def sequential(graph: Any, layers: Any, feeds: Any, settings: Any, targets: Any, repair: Any, **named: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            with clock("repair"):
                return repair(*arguments)

        with clock("sequential"):
            return sequential_pass(graph, layers, feeds, settings, targets, timed, **named)

    started = time.process_time()
    with patch.object(steps, "dense_statistics", dense), patch.object(steps, "sequential_pass", sequential):
        optimize(model, None, samples, Config(sparsity=0.8, allocate="uniform", threads=1))
    total = time.process_time() - started
    walk = spent["sequential"] - spent["repair"]
    return [spent["dense"], walk, spent["repair"], total - spent["dense"] - spent["sequential"]]


def fit(measured: dict[tuple[int, int], Spent]) -> tuple[float, float, float]:
    """The a, b and c of seconds = a + b in^3 + c out in^2, as many as measured layers."""
    seconds = np.array([spent.processor for spent in measured.values()])
    terms = np.array([[1.0, columns**3, rows * columns**2] for columns, rows in measured])
    found = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    return float(found[0]), float(found[1]), float(found[2])


def rate(dtype: type[np.floating]) -> float:
    """Operations per processor second of matrix products, on as many threads as the environment gives NumPy."""
    a = np.random.default_rng(0).normal(size=(RATE_SIZE, RATE_SIZE)).astype(dtype)
    _ = a @ a
    started = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for _ in range(3):
        _ = a @ a
    return 3 * 2 * RATE_SIZE**3 / (resource.getrusage(resource.RUSAGE_SELF).ru_utime - started)


def billion(b: float, c: float) -> list[list[str]]:
    """Terms of a transformer of a billion parameters, in processor hours and gigabytes."""
    single, double = rate(np.float32), rate(np.float64)
    matrices = [(WIDTH, WIDTH)] * 4 + [(WIDTH, INNER), (INNER, WIDTH)]
    weights = BLOCKS * sum(columns * rows for columns, rows in matrices)
    sampled = CALIBRATION * POSITIONS

    repair = BLOCKS * sum(b * columns**3 + c * rows * columns**2 for columns, rows in matrices)
    moments = BLOCKS * sum(2 * 2 * sampled * columns**2 for columns, _ in matrices) / double
    walks = WALKS * 2 * weights * CALIBRATION * TOKENS / single
    grams = BLOCKS * sum(8 * columns**2 for columns, _ in matrices)
    targets = BLOCKS * sum(4 * sampled * rows for _, rows in matrices)
    held = 4 * 4 * weights + 5 * 8 * INNER**2
    return [
        ["weights", f"{weights / 1e9:.2f} billion"],
        [f"walks ({WALKS} passes of {CALIBRATION} samples, {TOKENS} tokens each)", f"{walks / 3600:.1f} hours of one core"],
        [f"moments ({sampled:,} positions, twice)", f"{moments / 3600:.1f} hours of one core"],
        ["reconstruction", f"{repair / 3600:.1f} hours of one core"],
        ["memory: copies of the weights, the widest layer's moments", f"{held / 1e9:.0f} GB"],
        ["disk: statistics of a sweep (Gram matrices and targets)", f"{(grams + targets) / 1e9:.0f} GB"],
    ]


def sweep_table(rounds: int) -> str:
    """Sweeps by jobs."""
    header = ("jobs", "wall s", "processor s", "largest process MB", "points per minute")
    return markdown_table(
        header,
        [
            [str(jobs), f"{s.wall:.1f}", f"{s.processor:.1f}", f"{s.peak / 1e6:.0f}", f"{60 * POINTS / s.wall:.1f}"]
            for jobs, s in sweeps(rounds).items()
        ],
    )


def layer_tables(rounds: int) -> str:
    """Single layers, the fit, and what is computed from it."""
    measured = layers(rounds)
    a, b, c = fit(measured)
    body = [[str(i), str(o), f"{s.processor:.1f}", f"{s.peak / 1e6:.0f}"] for (i, o), s in measured.items()]
    table = markdown_table(("inputs", "outputs", "processor s", "peak MB"), body)
    computed = markdown_table(("", "computed"), billion(b, c))
    return f"{table}\n\na = {a:.3g}, b = {b:.3g}, c = {c:.3g}; computed for a billion parameters:\n\n{computed}"


def share_table(rounds: int) -> str:
    """The shares of a run, of the sample and of single layers; medians of each."""
    with tempfile.TemporaryDirectory(prefix="relrep-bench-") as name:
        models = {"the sample": (SAMPLES / "fashion.onnx", TASKS["fashion"](DATA, 1).calibration[0])}
        for columns, rows in LAYERS:
            path = Path(name) / f"{columns}-{rows}.onnx"
            onnx.save(gemm(columns, rows), path)
            count = SAMPLES_PER_INPUT * columns * 8 // 7
            models[f"{columns} -> {rows}"] = path, np.random.default_rng(0).normal(size=(count, columns)).astype(np.float32)
        body = [
            [label, *(f"{part:.2f}" for part in np.median([split(*given) for _ in range(rounds)], axis=0))]
            for label, given in models.items()
        ]
    return markdown_table(("one thread", "dense walk s", "sequential walk s", "repair s", "all else s"), body)


PARTS: Final = {"sweeps": sweep_table, "layers": layer_tables, "shares": share_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="only this; repeatable")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in environment().items()), f"median of {options.rounds} rounds", sep="; ")
    for name in options.part or PARTS:
        print(f"\n{PARTS[name](options.rounds)}")


if __name__ == "__main__":
    main()
