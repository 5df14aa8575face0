"""README's main table: what a network weighs, answers and takes on its way to a device: `python -m tools.bench.readme`.

Rows of each network: dense, sparse, refined, and the refined model in the forms for deployment; beside them the dense model
in the same int8 (ONNX Runtime's `quantize_static` through the `int8` export) and the peer's sparse model.  Columns: bytes of the
file, top-1 on the test images, and milliseconds of one sample in stock ONNX Runtime, and of float models with the sparse
kernels.  All files of a network are timed in the same rounds.

    python -m tools.bench.readme --json readme.json                            # hours on two cores, most of it ResNet-18
    python -m tools.bench.readme --networks fashion --json a.json --no-latency # in parts, which may run on different days
    python -m tools.bench.readme --networks none --merge a.json --merge b.json # the table of all parts
    python -m tools.bench.readme --rows 'dense,refined compact' --keep models  # takes models that are there already

A row measured twice counts as it was measured last.  Above the table stands how busy the machine was while timing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

import relrep_onnx
from relrep_onnx import Config, kernels
from relrep_onnx.benchmark import interleaved
from relrep_onnx.export.sparse_ort import to_sparse_ort
from relrep_onnx.runtime import RuntimeOptions, Session
from tools.bench import peer
from tools.bench.data import DATA, TASKS, Task, environment, infer, markdown_table, open_session, write_json
from tools.bench.options import names


@dataclass(frozen=True)
class Network:
    """How a network is pruned and refined (not at all with 0 epochs: then it goes on as it is); its name is that of a task."""

    title: str
    sparsity: float
    epochs: int
    settings: Mapping[str, Any] = field(default_factory=dict)


NETWORKS: Final[Mapping[str, Network]] = {
    "resnet20_bn": Network("ResNet-20", 0.9, 80),
    # half the time of the defaults; a budget of MACs as in tools.bench.front; refinement gains nothing (docs/refinement.md)
    "resnet18_bn": Network("ResNet-18 (of MACs)", 0.9, 0, {"budget": "macs", "allocate": "lamp", "positions": 10}),
    "mlperf_tiny_resnet8": Network("MLPerf ResNet-8", 0.6, 80),
    "fashion": Network("the sample", 0.9, 80),
}


@dataclass(frozen=True)
class Bench:
    """One network with its samples, a folder for its files, and the settings of every run."""

    network: Network
    task: Task
    folder: Path
    config: Config

    def file(self, row: str) -> Path:
        """The file of a row, made where it is not there yet."""
        if row == "dense":
            return self.task.model
        if row == "refined" and not self.network.epochs:
            return self.file("sparse")
        words = "_".join(re.findall(r"\w+", row))
        path = self.folder / f"{self.task.name}.{words}.onnx"
        if not path.exists():
            ROWS[row](self, path)
        return path


def sparse(bench: Bench, path: Path) -> None:
    """Pruned and repaired."""
    config = dataclasses.replace(bench.config, sparsity=bench.network.sparsity, **bench.network.settings)
    relrep_onnx.optimize(bench.task.model, path, bench.task.calibration[0], config)


def refined(bench: Bench, path: Path) -> None:
    """All survivors moved together, on the same samples."""
    config = dataclasses.replace(bench.config, refine=bench.network.epochs)
    relrep_onnx.refine(bench.task.model, bench.file("sparse"), path, bench.task.calibration[0], config)


def peers(bench: Bench, path: Path) -> None:
    """The peer at the same sparsity, on the same samples."""
    model, _ = peer.prune(bench.task.model, bench.task.calibration[0], bench.network.sparsity, bench.config.batch_size)
    onnx.save(model, path)


def exported(source: str, form: str, **settings: Any) -> Callable[[Bench, Path], None]:
    """Another row's model in a form for deployment."""

    def make(bench: Bench, path: Path) -> None:
        config = dataclasses.replace(bench.config, forms=(form,), **settings)
        relrep_onnx.export_model(bench.file(source), path, bench.task.calibration[0], config)

    return make


ROWS: Final[Mapping[str, Callable[[Bench, Path], None]]] = {
    "dense": exported("dense", "onnx"),
    "dense int8": exported("dense", "int8"),
    peer.PEER: peers,
    "sparse": sparse,
    "refined": refined,
    "refined compact": exported("refined", "compact"),
    "refined compact (int8 values)": exported("refined", "compact", values="int8"),
    "refined int8": exported("refined", "int8"),
    "refined int8+compact": exported("refined", "int8+compact"),
}
FLOATS: Final = ("sparse", "refined")
"""Rows that the sparse kernels are timed on."""
HEADER: Final = ("model", "sparsity", "row", "bytes", "of dense %", "top-1 %", "ms", "ms, sparse kernels")


@dataclass(frozen=True)
class Row:
    """One file; top-1 a fraction, milliseconds None where not timed, `load` the machine's while timing."""

    network: str
    row: str
    sparsity: float
    file_bytes: int
    dense_bytes: int
    top1: float
    ms: float | None = None
    sparse_ms: float | None = None
    load: float | None = None

    def cells(self) -> list[str]:
        """The row of the table."""
        times = ["" if ms is None else f"{ms:.2f}" for ms in (self.ms, self.sparse_ms)]
        share, network = f"{100 * self.file_bytes / self.dense_bytes:.1f}", NETWORKS[self.network]
        row = self.row if network.epochs else self.row.replace("refined", "sparse")
        return [network.title, f"{self.sparsity:g}", row, f"{self.file_bytes:,}", share, f"{100 * self.top1:.1f}", *times]


def measure(bench: Bench, name: str, row: str) -> Row:
    """Size and top-1 of one row."""
    path = bench.file(row)
    answers = infer(open_session(path, bench.config.threads), bench.task.test_x)
    right = float(np.mean(answers.argmax(axis=1) == bench.task.test_y))
    sparsity = 0.0 if row.startswith("dense") else bench.network.sparsity
    found = Row(name, row, sparsity, path.stat().st_size, bench.task.model.stat().st_size, right)
    print("  ".join(found.cells()), file=sys.stderr, flush=True)
    return found


def timed(bench: Bench, rows: Sequence[Row], rounds: int) -> list[Row]:
    """The rows with medians of interleaved runs of one sample each."""
    plain = RuntimeOptions(bench.config.threads)
    sessions = {row.row: Session(bench.file(row.row), plain) for row in rows}
    (given,) = sessions[rows[0].row].inputs
    feeds = {given.name: bench.task.test_x[:1]}
    if kernels.available():
        served = plain.with_library(kernels.library_path())
        for row in FLOATS:
            if row in sessions:
                model = to_sparse_ort(onnx.load(bench.file(row)), input_shapes={given.name: feeds[given.name].shape})
                sessions[f"{row}, kernels"] = Session(model.SerializeToString(), served)
    times = 1e3 * np.median(interleaved(list(sessions.values()), feeds, rounds), axis=1)
    ms, load = dict(zip(sessions, times.tolist(), strict=True)), os.getloadavg()[0]
    return [dataclasses.replace(row, ms=ms[row.row], sparse_ms=ms.get(f"{row.row}, kernels"), load=load) for row in rows]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*NETWORKS, "none"]
    parser.add_argument("--networks", action=names(known), default=list(NETWORKS), metavar="A,B", help=", ".join(known))
    parser.add_argument("--rows", action=names(list(ROWS)), default=list(ROWS), metavar="A,B", help=", ".join(ROWS))
    parser.add_argument("--epochs", type=int, help="of refinement, instead of each network's own")
    parser.add_argument("--no-latency", action="store_true", help="leave the milliseconds out")
    parser.add_argument("--rounds", type=int, default=50, help="of the timing")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 files and models (docs/data.md)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the models here, and take those that are there")
    parser.add_argument("--merge", type=Path, action="append", default=[], metavar="FILE", help="take in the rows of a JSON file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every row here")
    return parser.parse_args(arguments)


def run(name: str, options: argparse.Namespace, folder: Path) -> list[Row]:
    """The rows of one network."""
    network = NETWORKS[name]
    if options.epochs is not None:
        network = dataclasses.replace(network, epochs=options.epochs)
    bench = Bench(network, TASKS[name](options.data, 1), folder, Config(threads=options.threads, seed=options.seed))
    wanted = [row for row in options.rows if (row != peer.PEER or peer.available()) and (row != "refined" or network.epochs)]
    rows = [measure(bench, name, row) for row in wanted]
    return rows if options.no_latency else timed(bench, rows, options.rounds)


def merged(files: Sequence[Path], rows: Sequence[Row]) -> list[Row]:
    """Rows of earlier parts and these, in the order of the tables above; what came last counts."""
    parts = [Row(**row) for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    latest = {(row.network, row.row): row for row in [*parts, *rows]}
    order = [(network, row) for network in NETWORKS for row in ROWS]
    return [latest[key] for key in order if key in latest]


def describe(options: argparse.Namespace, rows: Sequence[Row]) -> str:
    """What stands above and below the table."""
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    busy = max((row.load for row in rows if row.load is not None), default=0.0)
    cores = os.cpu_count() or 1
    note = f"; timed on a busy machine (load {busy:.1f} on {cores} cores): milliseconds are inflated" if busy > cores else ""
    return f"first 512 images, seed {options.seed}, threads {options.threads}; {versions}; {peer.describe()}{note}"


def main() -> None:
    options = parse()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="relrep-bench-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.networks:
            rows += run(name, options, folder) if name != "none" else []
    rows = merged(options.merge, rows)
    print(f"{describe(options, rows)}\n\n{markdown_table(HEADER, [row.cells() for row in rows])}")
    if options.json:
        write_json(options.json, {"environment": environment(), "rows": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
