"""Where the sparse kernels win and where not: dense engines beside them, `python -m tools.bench.engines`.

One network with random weights and masks (as in `tools.bench.kernels`), dense in ONNX Runtime and in OpenVINO, float32 and int8,
and sparse with the kernels.  All run in the same rounds of one process; a figure is the median of the rounds' ratios.  OpenVINO's
rows are left out where it is not installed; it is told to compute in float32 and for latency.

    python -m tools.bench.engines --networks resnet18 mobilenetv2 --threads 1 2
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from onnx import ModelProto

from relrep_onnx import kernels
from relrep_onnx.benchmark import Runner, interleaved
from relrep_onnx.export import Order, make
from relrep_onnx.export.sparse_ort import to_sparse_ort
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Array, Feeds
from tools.bench.data import environment, markdown_table
from tools.bench.kernels import made
from tools.bench.networks import NETWORKS, prune

OTHER: Final = "openvino"
SPARSITIES: Final = (0.8, 0.9)
HEADER: Final = ("model", "threads", "engine", "weights", "ms", "times as fast as ONNX Runtime, float32", "quartiles")


class OpenVino:
    """A model compiled by OpenVINO."""

    def __init__(self, model: ModelProto, threads: int) -> None:
        import openvino  # not on top: it is optional

        core: Any = openvino.Core()
        wishes = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", wishes)

    def run(self, feeds: Feeds) -> object:
        """Its outputs."""
        return self.compiled(dict(feeds))


def runners(dense: ModelProto, feeds: dict[str, Array], threads: int) -> dict[tuple[str, str], Runner]:
    """What runs, by engine and weights; the dense float32 model in ONNX Runtime first."""
    shapes = {name: x.shape for name, x in feeds.items()}
    order = Order(calibration=lambda: iter([feeds]))
    plain = RuntimeOptions(threads=threads)
    served = plain.with_library(kernels.library_path())

    def session(model: ModelProto, options: RuntimeOptions) -> Session:
        return Session(model.SerializeToString(), options)

    quantized = made(make("int8", dense, order))
    found: dict[tuple[str, str], Runner] = {
        ("ONNX Runtime", "float32"): session(dense, plain),
        ("ONNX Runtime", "int8"): session(quantized, plain),
    }
    if importlib.util.find_spec(OTHER) is not None:
        found |= {("OpenVINO", "float32"): OpenVino(dense, threads), ("OpenVINO", "int8"): OpenVino(quantized, threads)}
    for sparsity in SPARSITIES:
        percent = f"{100 * sparsity:.0f} %"
        for name, block in (("unstructured", 1), ("4x1", 4)):
            sparse = to_sparse_ort(prune(dense, sparsity, block=block), input_shapes=shapes)
            found["sparse kernels", f"float32, {percent} {name}"] = session(sparse, served)
        small = made(make("int8", prune(dense, sparsity, block=4, along=1), order))
        found["sparse kernels", f"int8, {percent} 1x4"] = session(to_sparse_ort(small, input_shapes=shapes), served)
    return found


def rows(name: str, threads: int, rounds: int) -> Iterator[list[str]]:
    """The table's rows for one network."""
    dense = NETWORKS[name]()
    size = dense.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    feeds = {"input": np.random.default_rng(1).standard_normal((1, 3, size, size)).astype(np.float32)}
    found = runners(dense, feeds, threads)
    times = interleaved(list(found.values()), feeds, rounds)
    for (engine, weights), spent in zip(found, times, strict=True):
        low, middle, high = np.percentile(times[0] / spent, [25, 50, 75])
        yield [name, str(threads), engine, weights, f"{1e3 * np.median(spent):.2f}", f"{middle:.2f}x", f"{low:.2f}-{high:.2f}"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["resnet18", "mobilenetv2"], choices=list(NETWORKS))
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    table = [row for name in arguments.networks for n in arguments.threads for row in rows(name, n, arguments.rounds)]
    other = "OpenVINO is not installed, its rows are left out"
    if importlib.util.find_spec(OTHER) is not None:
        import openvino

        other = f"OpenVINO {openvino.__version__}"
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    print(
        f"batch 1, {arguments.rounds} rounds, kernels: {', '.join(kernels.instruction_sets())}; {versions}; {other}\n\n"
        f"{markdown_table(HEADER, table)}"
    )


if __name__ == "__main__":
    main()
