"""Which nodes the `int8` export should quantize, one table: `python -m tools.bench.quantized_nodes [--models minilm,magika]`.

Real dense models (`python tools/fetch_models.py` puts them into a cache folder) are quantized on 64 samples or 16 feeds of
`subjects.py`: all operators that ONNX Runtime's quantizer takes, layers alone, and what the bytes of layers reach.  Columns:
relative L2 of the worst output on samples that calibration did not see, megabytes, processor milliseconds of one run of the
first feed on one thread, in turn with the dense model's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import onnx
from onnx import ModelProto
from onnxruntime import InferenceSession

from relrep_onnx import RelRepError
from relrep_onnx.export import Order, int8, make
from relrep_onnx.export.int8_nodes import WEIGHT_SLOTS, unreached_nodes
from relrep_onnx.graph import Graph
from relrep_onnx.runtime import FAILURES, RuntimeOptions
from relrep_onnx.types import Feeds
from tools.bench.data import environment, markdown_table, open_session
from tools.bench.options import names
from tools.bench.subjects import SUBJECTS
from tools.fetch_models import cache_folder

MODELS: Final = ("minilm", "magika", "silero", "ppocr_rec", "ppocr_det")
BATCH: Final = 4
FEEDS: Final = 16
ROUNDS: Final = 15
HEADER: Final = ("model", "quantized", "error", "MB", "ms", "dense ms")
Choice = Callable[[Graph, Sequence[str]], list[str]]
"""As `unreached_nodes`: names of what stays floating-point."""


def layers_only(graph: Graph, wrong: Sequence[str]) -> list[str]:
    """All but operators with weights."""
    unreached_nodes(graph, wrong)  # gives names
    return [*wrong, *(node.name for node in graph.model.graph.node if node.op_type not in WEIGHT_SLOTS)]


CHOICES: Final[Mapping[str, Choice]] = {
    "all operators": lambda graph, wrong: list(wrong),
    "layers": layers_only,
    "what layers reach": unreached_nodes,
}


def feeds(model: ModelProto, samples: Any) -> list[Feeds]:
    """The first samples, a few to a feed; feeds as they are."""
    if isinstance(samples, list):
        return samples[:FEEDS]
    arrays = {model.graph.input[0].name: samples} if isinstance(samples, np.ndarray) else samples
    return [{name: array[i : i + BATCH] for name, array in arrays.items()} for i in range(0, BATCH * FEEDS, BATCH)]


def error(dense: InferenceSession, small: InferenceSession, batches: Sequence[Feeds]) -> float:
    """Relative L2 of the worst output."""
    pairs = [zip(*(session.run(None, dict(batch)) for session in (dense, small)), strict=True) for batch in batches]
    norms = np.array([[(np.linalg.norm(b.astype(np.float64) - a), np.linalg.norm(a)) for a, b in pair] for pair in pairs])
    off, whole = np.square(norms).sum(axis=0).T
    return float(np.sqrt(off / whole).max())


def milliseconds(sessions: Sequence[InferenceSession], batch: Feeds) -> list[float]:
    """Median processor time of each, run in turns."""
    spent: list[list[float]] = [[] for _ in sessions]
    for _ in range(ROUNDS):
        for times, session in zip(spent, sessions, strict=True):
            started = time.process_time()
            session.run(None, dict(batch))
            times.append(1e3 * (time.process_time() - started))
    return [median(times) for times in spent]


def rows(name: str, cache: Path) -> Iterator[list[str]]:
    """One model's."""
    subject = SUBJECTS[name]
    model = onnx.load(cache / subject.file)
    learn, unseen = (feeds(model, samples(cache)) for samples in (subject.calibration, subject.unseen))
    dense = open_session(model, 1)
    for label, choice in CHOICES.items():
        with patch.object(int8, "unreached_nodes", choice):
            try:
                small = make("int8", model, Order(calibration=lambda: learn, runtime=RuntimeOptions(threads=1))).content
            except RelRepError as refused:
                yield [name, label, str(refused), "", "", ""]
                continue
        assert isinstance(small, ModelProto)
        try:
            session = open_session(small, 1)
        except FAILURES:
            yield [name, label, "does not load", "", "", ""]
            continue
        ours, theirs = milliseconds((session, dense), unseen[0])
        off, size = error(dense, session, unseen), small.ByteSize() / 1e6
        row = [name, label, f"{off:.3f}", f"{size:.2f}", f"{ours:.1f}", f"{theirs:.1f}"]
        print(*row, file=sys.stderr, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action=names(list(SUBJECTS)), default=MODELS, help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder of the models")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print(markdown_table(HEADER, [row for name in options.models for row in rows(name, options.cache)]))


if __name__ == "__main__":
    main()
