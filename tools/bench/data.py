"""What the benchmarks share: tasks (a model with its samples), top-1, Markdown tables, JSON files.

No command of its own: see `accuracy.py` and `cost.py`.  Labels are read for scoring only.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto

Array = NDArray[Any]

ROOT: Final = Path(__file__).resolve().parents[2]
DATA: Final = ROOT.parent / "shared" / "data"
SAMPLES: Final = ROOT / "samples"

SUBSETS: Final = ((0, 512), (1024, 1536), (2048, 2560))
"""First and one past the last training image of each calibration subset; the first one gives the main figures."""
HELD_OUT: Final = (512, 1024)
"""Training images that no calibration subset holds."""

CIFAR_MEAN: Final = (0.485, 0.456, 0.406)
CIFAR_STD: Final = (0.229, 0.224, 0.225)
FASHION_MEAN: Final = (0.286,)
FASHION_STD: Final = (0.353,)


@dataclass(frozen=True, eq=False)
class Task:
    """A model with ready-made inputs: calibration subsets, held-out samples, labelled test samples."""

    name: str
    model: Path
    calibration: tuple[Array, ...]
    held_out: Array
    test_x: Array
    test_y: Array


def load_images(path: Path, images: str = "x", labels: str = "y") -> tuple[Array, Array]:
    """Reads uint8[n, height, width, channels] and the labels int64[n]."""
    with np.load(path) as archive:
        return archive[images], archive[labels]


def normalise(images: Array, mean: Sequence[float] = CIFAR_MEAN, std: Sequence[float] = CIFAR_STD) -> Array:
    """uint8[n, height, width, channels] to float32[n, channels, height, width], (pixel / 255 - mean) / std."""
    scaled = (images.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def raw_pixels(images: Array) -> Array:
    """uint8[n, height, width, channels] to float32 of the same values and layout."""
    return images.astype(np.float32)


def subsets(images: Array, count: int = len(SUBSETS)) -> tuple[Array, ...]:
    """The first `count` calibration subsets of the training images.

    Raises:
        ValueError: there are not so many images.
    """
    if len(images) < SUBSETS[count - 1][1]:
        raise ValueError(f"{count} calibration subsets need {SUBSETS[count - 1][1]} images; there are {len(images)}")
    return tuple(images[first:last] for first, last in SUBSETS[:count])


def _cifar(model: str, prepare: Callable[[Array], Array] = normalise) -> Callable[[Path, int], Task]:
    def load(folder: Path, count: int) -> Task:
        train, _ = load_images(folder / "cifar10_train4660.npz")
        test, labels = load_images(folder / "cifar10_test932.npz")
        calibration = tuple(prepare(part) for part in subsets(train, count))
        held_out = prepare(train[slice(*HELD_OUT)])
        return Task(model, folder / f"{model}.onnx", calibration, held_out, prepare(test), labels)

    return load


def _jpeg(folder: Path, _: int) -> Task:
    train, _labels = load_images(folder / "cifar10_jpeg_calib1024.npz")
    test, labels = load_images(folder / "cifar10_jpeg_test2000.npz")
    calibration = tuple(normalise(part) for part in subsets(train, 1))
    return Task(
        "resnet18_bn", folder / "resnet18_bn.onnx", calibration, normalise(train[slice(*HELD_OUT)]), normalise(test), labels
    )


def _fashion(_: Path, __: int) -> Task:
    with np.load(SAMPLES / "fashion_calib.npz") as archive:
        calibration = normalise(archive["image"], FASHION_MEAN, FASHION_STD)
    images, labels = load_images(SAMPLES / "fashion_test.npz", "image", "label")
    test = normalise(images, FASHION_MEAN, FASHION_STD)
    # The sample has no further training images; the pictures (not the labels) of the test set stand in as held-out samples.
    return Task("fashion", SAMPLES / "fashion.onnx", (calibration,), test[:512], test, labels)


TASKS: Final[Mapping[str, Callable[[Path, int], Task]]] = {
    "resnet20_bn": _cifar("resnet20_bn"),
    "resnet20_folded": _cifar("resnet20_folded"),
    "resnet20_dynamo18": _cifar("resnet20_dynamo18"),
    "mlperf_tiny_resnet8": _cifar("mlperf_tiny_resnet8", raw_pixels),
    "resnet18_bn": _jpeg,
    "fashion": _fashion,
}
"""Loaders by model name: (data folder, calibration subsets wanted) -> task; the last two have one subset only."""


def open_session(model: ModelProto | Path, threads: int) -> onnxruntime.InferenceSession:
    """A plain session on the CPU, ONNX Runtime's own defaults but for the threads (0: its own choice)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def infer(session: onnxruntime.InferenceSession, x: Array, batch: int = 32) -> Array:
    """The first output for every sample, batch by batch."""
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: x[start : start + batch]})[0] for start in range(0, len(x), batch)]
    return np.concatenate(parts)


def top1(model: ModelProto | Path, x: Array, y: Array, threads: int = 0) -> float:
    """Top-1 accuracy as a fraction."""
    return float(np.mean(infer(open_session(model, threads), x).argmax(axis=1) == y))


def environment() -> dict[str, str]:
    """Versions and processor: what a figure depends on besides the settings."""
    packages = ("relrep-onnx", "onnx", "onnxruntime", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first column is aligned left, the others right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) + " |"

    rule = ["-" * w if not i else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file; numbers that are not finite are refused."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
