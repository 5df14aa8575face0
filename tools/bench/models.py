"""Real models taken through the package, one row each, as a Markdown table: `python -m tools.bench.models`.

`python tools/fetch_models.py` puts the models into a cache folder first; `subjects.py` has the data and the measures.  Each row
is a process of its own: inspect, analyze, optimize, compare with the dense model on samples that calibration never saw, export
as `compact` and `int8`.  Rows go into the JSON file one by one, and those that are there stay until they are measured again.

    python -m tools.bench.models --json models.json
    python -m tools.bench.models --json models.json --models ppocr_rec --sparsity 0.6,0.7
    python -m tools.bench.models --json models.json --keep kept
    python -m tools.bench.models --json models.json --keep kept --time-only    # on a quiet machine, later
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

import relrep_onnx
from relrep_onnx import Config, RelRepError
from relrep_onnx.inspection import inspect
from tools.bench.data import environment, markdown_table, open_session, write_json
from tools.bench.options import fractions, names
from tools.bench.subjects import SUBJECTS
from tools.bench.worker import peak_memory
from tools.fetch_models import cache_folder

FORMS: Final = ("compact", "int8")
ROUNDS: Final = 15
HEADER: Final = (
    "model", "sparsity", "of its weights %", "calibrated with", "analyze s", "optimize s", "peak MB", "error",
    "measure", "dense", "sparse", "time of dense %", "MB", *(f"{form} MB" for form in FORMS),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model at one sparsity; where it was refused, `refused` says why and the numbers are 0.

    `prunable` is the share of all stored bytes that may be pruned, `error` the relative L2 of the worst output on held-out
    samples, `speed` the sparse model's time over the dense one's in stock ONNX Runtime, `forms` bytes or what refused the export.
    """

    model: str
    sparsity: float
    data: str
    skipped: Mapping[str, int]
    refused: str = ""
    prunable: float = 0.0
    analyze: float = 0.0
    optimize: float = 0.0
    peak: int = 0
    error: float = 0.0
    measure: str = ""
    dense: float = 0.0
    sparse: float = 0.0
    speed: float = 0.0
    file_bytes: int = 0
    forms: Mapping[str, int | str] = dataclasses.field(default_factory=dict)

    def cells(self) -> list[str]:
        """The row as text."""
        if self.refused:
            return [self.model, f"{self.sparsity:.2f}", "refused", *[""] * (len(HEADER) - 3)]
        sizes = [f"{size / 1e6:.2f}" if isinstance(size, int) else "refused" for size in self.forms.values()]
        return [
            *(self.model, f"{self.sparsity:.2f}", f"{100 * self.prunable:.0f}", self.data),
            *(f"{self.analyze:.0f}", f"{self.optimize:.0f}", f"{self.peak / 1e6:.0f}", f"{self.error:.3f}"),
            *(self.measure, f"{self.dense:.4f}", f"{self.sparse:.4f}", f"{100 * self.speed:.0f}", f"{self.file_bytes / 1e6:.2f}"),
            *sizes,
        ]


def measure(name: str, sparsity: float, cache: Path, keep: Path | None) -> Row:
    """One row, in this process."""
    subject = SUBJECTS[name]
    path = cache / subject.file
    found = inspect(path)
    skipped = Counter(s.reason.split("'")[0].strip() for s in found.skipped)
    begun = Row(name, sparsity, subject.data, dict(skipped.most_common()))
    samples, unseen = subject.calibration(cache), subject.unseen(cache)
    config = Config(**{"sparsity": sparsity, "threads": 1, **subject.settings})
    with tempfile.TemporaryDirectory() as scratch:
        target = kept(keep or Path(scratch), name, sparsity)
        try:
            started = time.perf_counter()
            relrep_onnx.analyze(path, samples, config, cache_dir=scratch)
            analysed = time.perf_counter() - started
            result = relrep_onnx.optimize(path, target, samples, config)
        except RelRepError as error:
            return dataclasses.replace(begun, refused=str(error))
        peak = peak_memory()
        moved = relrep_onnx.compare(path, target, unseen, config)
        dense, sparse = open_session(path, 1), open_session(target, 1)
        sizes = [facts.layer.size for facts in found.layers]
        return dataclasses.replace(
            begun,
            prunable=4 * sum(sizes) / found.weight_bytes,
            analyze=analysed,
            optimize=result.seconds,
            peak=peak,
            error=moved.relative_l2,
            measure=subject.better,
            dense=subject.measure(dense, dense, unseen),
            sparse=subject.measure(dense, sparse, unseen),
            speed=relative_time(dense, sparse, unseen),
            file_bytes=target.stat().st_size,
            forms={form: exported(target, samples, form, Path(scratch), config) for form in FORMS},
        )


def timed_again(row: Row, cache: Path, keep: Path) -> Row:
    """The row with the speed of its sparse model, if that was kept, measured anew."""
    target = kept(keep, row.model, row.sparsity)
    if not target.exists():
        return row
    subject = SUBJECTS[row.model]
    dense, sparse = open_session(cache / subject.file, 1), open_session(target, 1)
    return dataclasses.replace(row, speed=relative_time(dense, sparse, subject.unseen(cache)))


def kept(folder: Path, name: str, sparsity: float) -> Path:
    """Where a sparse model goes."""
    return folder / f"{name}_{100 * sparsity:.0f}.onnx"


def exported(model: Path, samples: Any, form: str, folder: Path, config: Config) -> int | str:
    """Bytes of an export, or the sentence that refused it."""
    try:
        (one,) = relrep_onnx.export_model(model, folder / f"{form}.onnx", samples, dataclasses.replace(config, forms=(form,)))
    except RelRepError as error:
        return str(error)
    return one.file_bytes


def relative_time(dense: onnxruntime.InferenceSession, sparse: onnxruntime.InferenceSession, unseen: Any) -> float:
    """The sparse model's median time over the dense one's, run in turns on one sample or feed."""
    name = dense.get_inputs()[0].name
    feeds = {name: unseen} if isinstance(unseen, np.ndarray) else unseen[0] if isinstance(unseen, list) else unseen
    if not isinstance(unseen, list):
        feeds = {key: value[:1] for key, value in feeds.items()}
    spent: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(ROUNDS):
        for i, session in enumerate((dense, sparse)):
            started = time.perf_counter()
            session.run(None, dict(feeds))
            spent[i].append(time.perf_counter() - started)
    return statistics.median(spent[1]) / statistics.median(spent[0])


def table(rows: Sequence[Row]) -> str:
    """The rows, then what stayed as it was and why, then what was refused."""
    lines = [markdown_table(HEADER, [row.cells() for row in rows]), ""]
    for row in {row.model: row for row in rows}.values():
        left = "; ".join(f"{count} {reason}" for reason, count in row.skipped.items()) or "nothing"
        lines.append(f"- `{row.model}` leaves alone: {left}")
        if row.refused:
            lines.append(f"- `{row.model}` is refused: {row.refused}")
        lines.extend(f"- `{row.model}` as {form} is refused: {size}" for form, size in row.forms.items() if isinstance(size, str))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action=names(list(SUBJECTS)), default=list(SUBJECTS), metavar="NAME,NAME")
    parser.add_argument("--sparsity", type=fractions, default=[0.5], metavar="S,S")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), metavar="FOLDER", help="where fetch_models.py put the models"
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="rows are added to this file, or replaced")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the sparse models here")
    parser.add_argument("--time-only", action="store_true", help="measure only the speed of models that --keep kept")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one row in this process, for the JSON file only
    options = parser.parse_args()
    if options.time_only and not (options.keep and options.json.exists()):
        parser.error("--time-only needs the --json and the --keep of an earlier run")
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Row] = {}
    if options.json.exists():
        rows = {key: Row(**row) for key, row in json.loads(options.json.read_text(encoding="utf-8"))["rows"].items()}
    for name in options.models:
        for sparsity in options.sparsity:
            key = f"{name} {sparsity:.2f}"
            if options.time_only and key not in rows:
                continue
            if options.time_only:
                rows[key] = timed_again(rows[key], options.cache, options.keep)
            elif options.here:
                rows[key] = measure(name, sparsity, options.cache, options.keep)
            else:
                again = [sys.executable, "-m", "tools.bench.models", "--here", "--json", str(options.json), "--models", name]
                more = ["--sparsity", str(sparsity), "--cache", str(options.cache)]
                subprocess.run([*again, *more, *(["--keep", str(options.keep)] if options.keep else [])], check=True)
                continue
            write_json(options.json, {"environment": environment(), "rows": {k: dataclasses.asdict(r) for k, r in rows.items()}})
    if not options.here:
        document = json.loads(options.json.read_text(encoding="utf-8"))
        versions = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
        print(f"one thread; {versions}\n\n{table([Row(**row) for row in document['rows'].values()])}")


if __name__ == "__main__":
    main()
