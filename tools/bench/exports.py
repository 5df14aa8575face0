"""What each export weighs and what it costs, as a Markdown table: `python -m tools.bench.exports`.

A sparse model is made from each network with its calibration samples, then written in every form.  Columns: bytes, as a share of
the dense input's, and after gzip; top-1 on the test images; the relative L2 of the test outputs against the sparse model's.

    python -m tools.bench.exports --json exports.json                        # a minute on two cores
    python -m tools.bench.exports --large                                    # with ResNet-18, some twelve minutes more
    python -m tools.bench.exports --models resnet20_bn --sparsity 0.8 --forms int8,int8+compact

`--keep FOLDER` keeps the sparse models there and takes those that are there already.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np

import relrep_onnx
from relrep_onnx import Config
from relrep_onnx.verify import gzip_size
from tools.bench.data import DATA, TASKS, Task, environment, infer, markdown_table, open_session, write_json
from tools.bench.options import fractions, names

FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "onnx": {"forms": ("onnx",)},
    "compact": {"forms": ("compact",)},
    "compact, float16": {"forms": ("compact",), "values": "float16"},
    "compact, int8": {"forms": ("compact",), "values": "int8"},
    "int8": {"forms": ("int8",)},
    "int8, arm": {"forms": ("int8",), "target": "arm"},
    "int8+compact": {"forms": ("int8+compact",)},
    "ort": {"forms": ("ort",)},
    "int8+ort, arm": {"forms": ("int8+ort",), "target": "arm"},
    "sparse-initializer": {"forms": ("sparse-initializer",)},
}
CASES: Final = (("resnet20_bn", 0.8), ("resnet20_bn", 0.9), ("mlperf_tiny_resnet8", 0.6), ("fashion", 0.9))
LARGE: Final = ("resnet18_bn", 0.9)
LARGE_SETTINGS: Final[Mapping[str, Any]] = {"allocate": "lamp", "positions": 10}
"""Half the time of the defaults; what is measured here is the exports."""
HEADER: Final = ("model", "sparsity", "form", "bytes", "of dense %", "gzip of dense %", "top-1 %", "L2 against sparse")


@dataclass(frozen=True)
class Row:
    """One export; `share` and `gzip` of the dense file's bytes, top-1 a fraction."""

    model: str
    sparsity: float
    form: str
    file_bytes: int
    share: float
    gzip: float
    top1: float
    error: float

    def cells(self) -> list[str]:
        """The row as text."""
        shares = [f"{100 * value:.1f}" for value in (self.share, self.gzip)]
        numbers = [f"{self.file_bytes:,}", *shares, f"{100 * self.top1:.1f}", f"{self.error:.1e}" if self.error else "0"]
        return [self.model, f"{self.sparsity:.2f}", self.form, *numbers]


def sparse_model(task: Task, sparsity: float, folder: Path, config: Config) -> Path:
    """The sparse model in a folder, made where it is not there yet."""
    path = folder / f"{task.name}_{100 * sparsity:.0f}.onnx"
    if not path.exists():
        settings = LARGE_SETTINGS if task.name == LARGE[0] else {}
        relrep_onnx.optimize(task.model, path, task.calibration[0], dataclasses.replace(config, sparsity=sparsity, **settings))
    return path


def measure(task: Task, sparsity: float, forms: Sequence[str], folder: Path, config: Config) -> Iterator[Row]:
    """One network in every form, the dense model first."""
    dense = task.model.stat().st_size
    sparse = sparse_model(task, sparsity, folder, config)
    reference = infer(open_session(sparse, config.threads), task.test_x)
    answers = infer(open_session(task.model, config.threads), task.test_x)
    top1 = float(np.mean(answers.argmax(axis=1) == task.test_y))
    error = float(np.linalg.norm(answers - reference) / np.linalg.norm(reference))
    yield Row(task.name, sparsity, "dense", dense, 1.0, gzip_size(task.model) / dense, top1, error)
    with tempfile.TemporaryDirectory() as place:
        for form in forms:
            settings = dataclasses.replace(config, **FORMS[form])
            target = Path(place) / ("out.ort" if "ort" in form.split(",")[0].split("+") else "out.onnx")
            (exported,) = relrep_onnx.export_model(sparse, target, task.calibration[0], settings)
            given = infer(open_session(target, config.threads), task.test_x)
            yield Row(
                task.name,
                sparsity,
                form,
                exported.file_bytes,
                exported.file_bytes / dense,
                exported.gzip_bytes / dense,
                float(np.mean(given.argmax(axis=1) == task.test_y)),
                float(np.linalg.norm(given - reference) / np.linalg.norm(reference)),
            )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action=names(list(TASKS)), default=[], metavar="A,B", help=", ".join(TASKS))
    parser.add_argument("--sparsity", type=fractions, default=[0.8, 0.9], metavar="S,S", help="with --models; default 0.8,0.9")
    plain = [form for form in FORMS if "," not in form]
    parser.add_argument("--forms", action=names(plain), default=list(FORMS), metavar="A,B", help=", ".join(plain))
    parser.add_argument("--large", action="store_true", help=f"also {LARGE[0]}, 11 million weights")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime; 0: its own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 files and models (docs/data.md)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the sparse models here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every row here")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    config = Config(threads=options.threads, seed=options.seed)
    cases = list(product(options.models, options.sparsity)) if options.models else [*CASES, *([LARGE] if options.large else [])]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for model, sparsity in cases:
            for row in measure(TASKS[model](options.data, 1), sparsity, options.forms, options.keep or Path(folder), config):
                rows.append(row)
                print("  ".join(row.cells()), file=sys.stderr, flush=True)
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    print(f"seed {config.seed}, threads {config.threads}; {versions}\n\n{markdown_table(HEADER, [row.cells() for row in rows])}")
    if options.json:
        write_json(options.json, {"environment": environment(), "rows": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
