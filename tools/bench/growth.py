"""Tables of how cost grows: with depth, with width, with the inputs of one Gemm, with samples; printed by `tools.bench.cost`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tools.bench.data import TASKS
from tools.bench.measured import Cost, measure

MODEL: Final = "resnet20_bn"
"""What the samples are counted on."""
DEPTHS: Final = (4, 8, 16, 32)
WIDTHS: Final = (64, 128, 256, 512)
WIDE_SHAPE: Final = (512, 8, 8)
"""Samples, height and width that a wide pair of convolutions gets: more sampled positions than the widest has columns."""
COLUMNS: Final = (1_024, 4_608, 25_088)
"""Inputs of one Gemm: the last are those of VGG's first one, which is reconstructed through the kept rows."""
GEMM_SHAPE: Final = (512, 256)
"""Samples and outputs of that Gemm."""
COUNTS: Final = (128, 256, 512)
GROWTH_HEADER: Final = ("convolutions", "plain s", "optimize s", "ms per layer", "time, multiple", "optimize MB")
WIDTH_HEADER: Final = (
    "channels",
    "columns",
    "plain s",
    "optimize s",
    "s per layer",
    "time, multiple",
    "optimize MB",
    "largest moments MB",
)
COLUMNS_HEADER: Final = ("inputs", "plain s", "optimize s", "optimize MB", "its moments MB")
SAMPLES_HEADER: Final = ("samples", "plain s", "optimize s", "ms per sample", "time, multiple", "optimize MB")
CHAIN_SHAPE: Final = (256, 16, 16, 16)
"""Samples, channels, height and width that a chain gets."""


def chain(depth: int, channels: int = CHAIN_SHAPE[1], seed: int = 0, classes: int = 10) -> ModelProto:
    """A chain of equal 3x3 convolutions and Relus with a pooled head: x[N, channels, H, W] -> y[N, classes]."""
    rng = np.random.default_rng(seed)
    nodes, tensors = [], []
    value = "x"
    for number in range(depth):
        weight = rng.normal(scale=np.sqrt(2 / (9 * channels)), size=(channels, channels, 3, 3))
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{number}"))
        nodes.append(helper.make_node("Conv", [value, f"w{number}"], [f"c{number}"], name=f"conv{number}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        value = f"r{number}"
    tensors.append(numpy_helper.from_array(rng.normal(size=(channels, classes)).astype(np.float32), "head"))
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "head"], ["y"]))
    graph = helper.make_graph(
        nodes,
        f"chain{depth}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", classes])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def gemm(columns: int, rows: int, seed: int = 0) -> ModelProto:
    """One matrix product: x[N, columns] -> y[N, rows]."""
    weight = np.random.default_rng(seed).normal(scale=columns**-0.5, size=(columns, rows)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], name="gemm")],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", rows])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def measure_growth(options: argparse.Namespace, folder: Path) -> list[Cost]:
    """Chains of growing depth on the same random samples."""
    samples = np.random.default_rng(0).normal(size=CHAIN_SHAPE).astype(np.float32)
    costs = []
    for depth in DEPTHS:
        path = folder / f"chain{depth}.onnx"
        onnx.save(chain(depth), path)
        costs.append(measure(f"chain of {depth}", path, samples, options, folder, options.growth_rounds))
    return costs


def measure_width(options: argparse.Namespace, folder: Path) -> list[Cost]:
    """Two convolutions of growing width; the head has one output, so that it stays too small to be pruned."""
    count, *size = WIDE_SHAPE
    costs = []
    for channels in WIDTHS:
        path = folder / f"width{channels}.onnx"
        onnx.save(chain(2, channels, classes=1), path)
        samples = np.random.default_rng(0).normal(size=(count, channels, *size)).astype(np.float32)
        costs.append(measure(str(channels), path, samples, options, folder, options.growth_rounds))
    return costs


def measure_columns(options: argparse.Namespace, folder: Path) -> list[Cost]:
    """One Gemm with more and more inputs."""
    count, rows = GEMM_SHAPE
    costs = []
    for columns in COLUMNS:
        path = folder / f"gemm{columns}.onnx"
        onnx.save(gemm(columns, rows), path)
        samples = np.random.default_rng(0).normal(size=(count, columns)).astype(np.float32)
        costs.append(measure(str(columns), path, samples, options, folder, options.growth_rounds))
    return costs


def measure_counts(options: argparse.Namespace, folder: Path) -> list[Cost]:
    """ResNet-20 on growing parts of its first calibration subset."""
    task = TASKS[MODEL](options.data, 1)
    samples = task.calibration[0]
    return [
        measure(f"{MODEL} on {count}", task.model, samples[:count], options, folder, options.growth_rounds) for count in COUNTS
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


def width_cells(cost: Cost) -> list[str]:
    """A row of the table of widths; the moments are a square of the columns."""
    return [
        cost.name,
        str(math.isqrt(cost.moments_bytes // 8)),
        f"{cost.plain_seconds:.2f}",
        f"{cost.optimize_seconds:.2f}",
        f"{cost.optimize_seconds / cost.layers:.2f}",
        f"{cost.time_multiple:.1f}",
        f"{cost.optimize_bytes / 1e6:.0f}",
        f"{cost.moments_bytes / 1e6:.1f}",
    ]


def columns_cells(cost: Cost) -> list[str]:
    """A row of the table of inputs."""
    sizes = (cost.optimize_bytes, cost.moments_bytes)
    return [cost.name, f"{cost.plain_seconds:.3f}", f"{cost.optimize_seconds:.1f}", *(f"{size / 1e6:.0f}" for size in sizes)]


def samples_cells(cost: Cost) -> list[str]:
    """A row of the table of sample counts."""
    return [
        str(cost.samples),
        f"{cost.plain_seconds:.2f}",
        f"{cost.optimize_seconds:.2f}",
        f"{1000 * cost.optimize_seconds / cost.samples:.1f}",
        f"{cost.time_multiple:.1f}",
        f"{cost.optimize_bytes / 1e6:.0f}",
    ]


GROWTH: Final = {
    "depth": (measure_growth, GROWTH_HEADER, growth_cells),
    "width": (measure_width, WIDTH_HEADER, width_cells),
    "inputs of a Gemm": (measure_columns, COLUMNS_HEADER, columns_cells),
    "samples": (measure_counts, SAMPLES_HEADER, samples_cells),
}
"""The tables of growth: how each is measured and printed."""
