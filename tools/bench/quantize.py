"""The choices behind the `int8` export, one table: `python -m tools.bench.quantize`.

The sparse ResNet-20 is quantized by ONNX Runtime with what the export adds switched on and off.  Columns: top-1 on the test
images, agreement with the sparse model, relative L2 of the outputs against it.  The first row depends on the processor: without
VNNI, products of uint8 activations and int8 weights are added in 16 bits and overflow.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import ModelProto
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

from relrep_onnx import Config
from relrep_onnx.export.int8 import FeedsReader, guards, prepare, rounded_weights, rounding_shifts
from relrep_onnx.graph import Graph, read_weight, write_layer
from relrep_onnx.runtime import RuntimeOptions, quiet_tools
from relrep_onnx.types import Feeds, RepairedLayer
from tools.bench.data import DATA, TASKS, Array, environment, infer, markdown_table, open_session
from tools.bench.exports import sparse_model
from tools.bench.options import fractions

MODEL: Final = "resnet20_bn"
HEADER: Final = ("sparsity", "activations", "weights", "dead channels", "bias", "top-1 %", "agreement %", "L2")
VARIANTS: Final = (
    ("uint8", 127, False, False),
    ("uint8", 64, False, False),
    ("uint8", 64, True, False),
    ("uint8", 64, True, True),
    ("int8", 127, False, False),
    ("int8", 127, True, False),
    ("int8", 127, True, True),
)
"""Activations, levels of the weights on each side of zero, dead channels guarded, biases corrected."""


def quantized(model: ModelProto, batches: Sequence[Feeds], variant: tuple[str, int, bool, bool], folder: Path) -> Path:
    """The file of one variant."""
    kind, levels, guarded, corrected = variant
    copy = ModelProto()
    copy.CopyFrom(model)
    weights = rounded_weights(Graph(copy), levels)
    if corrected:
        shifts = rounding_shifts(copy, weights, batches, RuntimeOptions())
        for w in weights:
            weight = read_weight(Graph(copy), w.layer)
            write_layer(copy, w.layer, RepairedLayer(weight, shifts[w.layer.name], np.zeros(w.layer.rows)))
    onnx.save_model(copy, folder / "source.onnx")
    with quiet_tools():
        quantize_static(
            str(folder / "source.onnx"),
            str(folder / "target.onnx"),
            FeedsReader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=levels == 64,
            activation_type=QuantType.QUInt8 if kind == "uint8" else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"TensorQuantOverrides": guards(weights) if guarded else {}},
        )
    return folder / "target.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=fractions, default=[0.8, 0.9], metavar="S,S")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the sparse models here")
    options = parser.parse_args()
    config, task = Config(threads=2), TASKS[MODEL](DATA, 1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for sparsity in options.sparsity:
            sparse = sparse_model(task, sparsity, options.keep or folder, config)
            reference = infer(open_session(sparse, config.threads), task.test_x)
            rows.append([f"{sparsity:.2f}", "float32", "float32", "", "", *scores(reference, reference, task.test_y)])
            with quiet_tools():
                model = prepare(onnx.load_model(sparse), folder)
            samples: Array = task.calibration[0]
            batches = [{model.graph.input[0].name: samples[i : i + 32]} for i in range(0, len(samples), 32)]
            for variant in VARIANTS:
                given = infer(open_session(quantized(model, batches, variant, folder), config.threads), task.test_x)
                kind, levels, guarded, corrected = variant
                words = [kind, f"-{levels}..{levels}", "guarded" * guarded, "corrected" * corrected]
                rows.append([f"{sparsity:.2f}", *words, *scores(given, reference, task.test_y)])
    versions = ", ".join(f"{key} {value}" for key, value in environment().items())
    print(f"{MODEL}, 512 unlabelled samples; {versions}\n\n{markdown_table(HEADER, rows)}")


def scores(given: Array, reference: Array, labels: Array) -> list[str]:
    """The last columns of a row."""
    answers = given.argmax(axis=1)
    error = float(np.linalg.norm(given - reference) / np.linalg.norm(reference))
    agreement = float(np.mean(answers == reference.argmax(axis=1)))
    return [f"{100 * float(np.mean(answers == labels)):.1f}", f"{100 * agreement:.1f}", f"{error:.3f}"]


if __name__ == "__main__":
    main()
