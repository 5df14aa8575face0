"""What pruning does to transformers: `python -m tools.bench.transformers`.

Two networks of `transformer_networks.py`, an encoder of 12 layers and a decoder of 4, are pruned by half, unstructured and 2:4,
by magnitude alone, by this package, and by the peer, on the same samples; the table has the relative L2 of the outputs on samples
that none of them saw, and how many times that of the default it is; below it stands what was found in each network.  Weights
are random: figures compare methods on these, and say nothing on the accuracy of a trained model.

    python -m tools.bench.transformers --json transformers.json
    python -m tools.bench.transformers --models decoder --samples 64
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import ModelProto

from relrep_onnx import Config, optimize
from relrep_onnx.graph import Graph, count_zeros, find_layers
from relrep_onnx.inspection import inspect
from relrep_onnx.types import Selection
from tools.bench import peer
from tools.bench.data import environment, markdown_table, open_session, write_json
from tools.bench.options import names
from tools.bench.transformer_networks import NETWORKS, Feed, Network, Size

MAGNITUDE: Final = {"repair": "none"}
OURS: Final[Mapping[str, Mapping[str, Any]]] = {
    "magnitude, uniform": {**MAGNITUDE, "allocate": "uniform"},
    "magnitude, global": {**MAGNITUDE, "allocate": "global"},
    "reconstruct, uniform": {"allocate": "uniform"},
    "reconstruct, auto": {},
}
PATTERNS: Final[Mapping[str, tuple[int, int] | None]] = {"unstructured": None, "2:4": (2, 4)}
"""Names, and what the peer calls them."""
HEADER: Final = ("model", "pattern", "method", "zeros %", "error", "of the default's", "s")


@dataclass(frozen=True)
class Row:
    """One method on one model: the share of zeros in what can be pruned, and the relative L2 of the outputs on unseen samples."""

    model: str
    pattern: str
    method: str
    zeros: float
    error: float
    seconds: float

    def cells(self, best: float) -> list[str]:
        """A row of the table; `best` is the error of the default."""
        ratio = f"{self.error / best:.2f}"
        return [
            *(self.model, self.pattern, self.method, f"{100 * self.zeros:.1f}", f"{self.error:.4f}"),
            *(ratio, f"{self.seconds:.0f}"),
        ]


@dataclass(frozen=True)
class Question:
    """One model and what it is asked with."""

    name: str
    model: ModelProto
    path: Path
    calibration: Feed
    unseen: Feed
    options: argparse.Namespace

    def row(self, pattern: str, method: str, sparse: ModelProto, seconds: float) -> Row:
        """Judges one result."""
        layers, _ = find_layers(Graph(self.model), Selection())
        zeros = sum(count_zeros(Graph(sparse), layers).values()) / sum(layer.size for layer in layers)
        dense, moved = (open_session(model, self.options.threads).run(None, self.unseen)[0] for model in (self.model, sparse))
        error = float(np.linalg.norm(moved - dense) / np.linalg.norm(dense))
        print(f"{self.name} {pattern} {method}: {error:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)
        return Row(self.name, pattern, method, zeros, error, seconds)

    def answers(self, pattern: str) -> list[Row]:
        """Every method."""
        rows = []
        for method, settings in OURS.items():
            if pattern != "unstructured" and "uniform" not in method:
                continue  # all layers are full: there is nothing to allocate
            started = time.perf_counter()
            given = {name: getattr(self.options, name) for name in ("positions", "threads", "seed")}
            config = Config(**{"sparsity": 0.5, "pattern": pattern, **given, **settings})
            sparse = optimize(self.path, None, self.calibration, config).model
            rows.append(self.row(pattern, method, sparse, time.perf_counter() - started))
        if peer.available():
            sparse, seconds = peer.prune(self.path, self.calibration, 0.5, 32, PATTERNS[pattern])
            rows.append(self.row(pattern, peer.PEER, sparse, seconds))
        return rows


def stays(network: Network, size: Size, model: ModelProto) -> list[str]:
    """Sentences on what was found: all projections, and no product of activations.

    Raises:
        SystemExit: the package finds something else.
    """
    found = inspect(model)
    if len(found.layers) != network.projections * size.layers:
        raise SystemExit(f"{len(found.layers)} layers were found; there are {network.projections * size.layers} projections")
    reasons = Counter(f"{skipped.op}: {skipped.reason}" for skipped in found.skipped)
    weights = sum(facts.layer.size for facts in found.layers)
    return [
        f"{len(found.layers)} projections of {weights:,} weights in all are pruned",
        *(f"{count} x {reason}" for reason, count in reasons.items()),
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action=names(list(NETWORKS)), default=list(NETWORKS), metavar="A,B")
    parser.add_argument("--patterns", action=names(list(PATTERNS)), default=list(PATTERNS), metavar="A,B")
    parser.add_argument("--samples", type=int, default=256, help="for calibration; an eighth decides and verifies")
    parser.add_argument("--layers", type=int, help="instead of 12 and 4")
    parser.add_argument("--width", type=int, default=384, help="inner width is four times that")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--positions", type=int, default=Config().positions, help="tokens of a sample that this package sees")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, list[str]]]:
    """All rows, and what stayed of each model."""
    rows, found = [], {}
    for name in options.models:
        network = NETWORKS[name]
        size = dataclasses.replace(
            network.size,
            layers=options.layers or network.size.layers,
            width=options.width,
            inner=4 * options.width,
            heads=options.heads,
        )
        model = network.make(size, options.seed)
        found[name] = stays(network, size, model)
        samples, unseen = (network.samples(size, options.samples, options.seed + n) for n in (1, 2))
        with tempfile.TemporaryDirectory(prefix="relrep-bench-") as folder:
            path = Path(folder) / "dense.onnx"
            onnx.save(model, path)
            question = Question(name, model, path, samples, unseen, options)
            rows += [row for pattern in options.patterns for row in question.answers(pattern)]
    return rows, found


def report(rows: Sequence[Row], found: Mapping[str, Sequence[str]]) -> str:
    """The table, and what stayed."""
    best = {(row.model, row.pattern): row.error for row in rows if row.method.startswith("reconstruct")}  # the last: the default
    table = markdown_table(HEADER, [row.cells(best[row.model, row.pattern]) for row in rows])
    return "\n".join([table, "", *(f"- {name}: {'; '.join(sentences)}" for name, sentences in found.items())])


def main() -> None:
    options = parse()
    rows, found = measure(options)
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    settings = f"{options.samples} samples, as many unseen, seed {options.seed}, {options.threads} threads"
    print(f"{settings}; {versions}; {peer.describe()}\n\n{report(rows, found)}")
    if options.json:
        document = {"settings": settings, "environment": environment(), "rows": [dataclasses.asdict(row) for row in rows]}
        write_json(options.json, document)


if __name__ == "__main__":
    main()
