"""Speed of the sparse kernels against stock ONNX Runtime on the dense model, as Markdown tables: `python -m tools.bench.kernels`.

Networks have random weights and random masks, the same sparsity in every layer (depthwise layers stay dense).  Every round runs
the dense and all sparse files once; a figure is the median of the rounds' ratios.  `--products` does the same for single matrix
products.  `--int8` quantizes the networks, with 1x4 blocks of input channels, and shows ONNX Runtime's dense int8 beside; errors
are then against the pruned model in float32.  `--fit` measures a grid of single layers from ONNX Runtime's own profile, so that
changes of layout do not count as the layer's time, and prints the row of `relrep_onnx.kernels.costs.COSTS` for this machine, or
with `--int8` the lines of `INT8_COSTS`.

    python -m tools.bench.kernels --json kernels.json
    python -m tools.bench.kernels --int8
    python -m tools.bench.kernels --fit
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from relrep_onnx import kernels
from relrep_onnx.benchmark import interleaved, relative_error
from relrep_onnx.export import Order, Product, make
from relrep_onnx.export.sparse_ort import plan, to_sparse_ort
from relrep_onnx.kernels.costs import COSTS, REFERENCE, Kind, Line
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Feeds
from tools.bench.data import Array, environment, markdown_table, write_json
from tools.bench.networks import NETWORKS, prune

SPARSITIES: Final = (0.8, 0.9)
PRODUCTS: Final = ((1, 768, 3072), (16, 768, 3072), (128, 768, 3072))
"""Rows of X, inputs, outputs."""
HEADER: Final = (
    "model",
    "threads",
    "sparsity",
    "pattern",
    "sparse layers",
    "file",
    "dense ms",
    "ms",
    "faster",
    "quartiles",
    "error",
)

FIT_LAYERS: Final[dict[Kind, Sequence[tuple[int, int, int, int, int]]]] = {
    "conv": (
        (64, 64, 3, 1, 56), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14), (512, 512, 3, 1, 7), (128, 64, 3, 2, 56),
        (16, 16, 3, 1, 32), (32, 32, 3, 1, 16), (64, 64, 3, 1, 8), (64, 3, 7, 2, 224),
    ),
    "pointwise": (
        (144, 24, 1, 1, 56), (24, 144, 1, 1, 56), (384, 64, 1, 1, 14), (96, 576, 1, 1, 14), (960, 160, 1, 1, 7),
        (1280, 320, 1, 1, 7), (128, 64, 1, 2, 56), (96, 16, 1, 1, 112), (256, 256, 1, 1, 28),
    ),
    "depthwise": (
        (96, 1, 3, 2, 112), (144, 1, 3, 1, 56), (384, 1, 3, 1, 14), (960, 1, 3, 1, 7), (192, 1, 3, 2, 28), (240, 1, 5, 1, 14),
        (96, 1, 5, 1, 28), (72, 1, 5, 2, 56),
    ),
    "product": ((1000, 512, 1, 1, 1), (3072, 768, 1, 1, 1), (768, 768, 1, 1, 16), (3072, 768, 1, 1, 128), (768, 3072, 1, 1, 64)),
}  # fmt: skip
"""Outputs, inputs, kernel, stride, and the image's height or the rows of X."""
FIT_DENSITIES: Final = (0.1, 0.2, 0.4)
INT8_FIT_LAYERS: Final[dict[Kind, Sequence[tuple[int, int, int, int, int]]]] = {
    "conv": ((64, 64, 3, 1, 56), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14), (16, 16, 3, 1, 32), (64, 64, 3, 1, 8)),
    "pointwise": ((144, 24, 1, 1, 56), (384, 64, 1, 1, 14), (128, 64, 1, 2, 56), (256, 256, 1, 1, 28)),
    "product": ((1000, 512, 1, 1, 1), (768, 768, 1, 1, 16), (256, 768, 1, 1, 64)),
}
INT8_FIT_DENSITIES: Final = (0.1, 0.3)


@dataclass(frozen=True)
class Row:
    """One sparse file against its dense one."""

    model: str
    threads: int
    sparsity: float
    pattern: str
    layers: str
    file_share: float
    dense_ms: float
    ms: float
    faster: float
    quartiles: tuple[float, float]
    error: float

    def cells(self) -> list[str]:
        """The row of the table."""
        spread = f"{self.quartiles[0]:.2f}-{self.quartiles[1]:.2f}"
        return [self.model, str(self.threads), f"{self.sparsity:.0%}", self.pattern, self.layers, f"{self.file_share:.1%}",
                f"{self.dense_ms:.2f}", f"{self.ms:.2f}", f"{self.faster:.2f}x", spread, f"{self.error:.1e}"]  # fmt: skip


def options(threads: int) -> RuntimeOptions:
    """Sessions that know the kernels."""
    return RuntimeOptions(threads=threads).with_library(kernels.library_path())


def compare(name: str, dense: ModelProto, x: Array, threads: int, rounds: int, sparsities: Sequence[float]) -> Iterator[Row]:
    """The rows of one network: all patterns and sparsities in the same rounds."""
    isa = isa_with_costs()
    pruned = {(s, block): prune(dense, s, block=block) for s in sparsities for block in (1, 4)}
    shapes = {"input": x.shape}
    sparse = {key: to_sparse_ort(model, instruction_set=isa, input_shapes=shapes) for key, model in pruned.items()}
    feeds = {"input": x}
    sessions = {key: Session(model.SerializeToString(), options(threads)) for key, model in sparse.items()}
    reference = Session(dense.SerializeToString(), RuntimeOptions(threads=threads))
    times = interleaved([reference, *sessions.values()], feeds, rounds)
    for index, (key, model) in enumerate(sparse.items(), 1):
        wanted = Session(pruned[key].SerializeToString(), RuntimeOptions()).run(feeds)
        low, middle, high = (float(v) for v in np.percentile(times[0] / times[index], [25, 50, 75]))
        choices = plan(pruned[key], instruction_set=isa, input_shapes=shapes)
        yield Row(
            model=name,
            threads=threads,
            sparsity=key[0],
            pattern="unstructured" if key[1] == 1 else "4x1",
            layers=f"{sum(c.sparse for c in choices)} of {len(choices)}",
            file_share=model.ByteSize() / dense.ByteSize(),
            dense_ms=1e3 * float(np.median(times[0])),
            ms=1e3 * float(np.median(times[index])),
            faster=middle,
            quartiles=(low, high),
            error=relative_error(sessions[key].run(feeds), wanted),
        )


def compare_int8(name: str, dense: ModelProto, x: Array, threads: int, rounds: int, sparsities: Sequence[float]) -> Iterator[Row]:
    """Quantized files against the dense float32 model: ONNX Runtime's dense int8 first (sparsity 0), then the sparse ones."""
    feeds = {"input": x}
    order = Order(calibration=lambda: iter([feeds]))
    pruned = {0.0: dense, **{s: prune(dense, s, block=4, along=1) for s in sparsities}}
    quantized = {s: made(make("int8", model, order)) for s, model in pruned.items()}
    shapes = {"input": x.shape}
    files = {s: model if s == 0 else to_sparse_ort(model, input_shapes=shapes) for s, model in quantized.items()}
    sessions = {s: Session(model.SerializeToString(), options(threads)) for s, model in files.items()}
    reference = Session(dense.SerializeToString(), RuntimeOptions(threads=threads))
    times = interleaved([reference, *sessions.values()], feeds, rounds)
    for index, (sparsity, model) in enumerate(files.items(), 1):
        wanted = Session(pruned[sparsity].SerializeToString(), RuntimeOptions()).run(feeds)
        low, middle, high = (float(v) for v in np.percentile(times[0] / times[index], [25, 50, 75]))
        choices = plan(quantized[sparsity], input_shapes=shapes)
        yield Row(
            model=name,
            threads=threads,
            sparsity=sparsity,
            pattern="int8 1x4" if sparsity else "int8 dense",
            layers=f"{sum(c.sparse for c in choices) if sparsity else 0} of {len(choices)}",
            file_share=model.ByteSize() / dense.ByteSize(),
            dense_ms=1e3 * float(np.median(times[0])),
            ms=1e3 * float(np.median(times[index])),
            faster=middle,
            quartiles=(low, high),
            error=relative_error(sessions[sparsity].run(feeds), wanted),
        )


def made(product: Product) -> ModelProto:
    """The model of a form that is one."""
    assert isinstance(product.content, ModelProto)
    return product.content


def isa_with_costs() -> str:
    """This machine's instruction set, or the reference where its costs were not measured."""
    return next((name for name in kernels.instruction_sets() if name in COSTS), REFERENCE)


def single_layer(kind: Kind, weight: Array, stride: int = 1, size: int = 1) -> tuple[ModelProto, dict[str, Array]]:
    """A model of one layer, and an input for it."""
    rng = np.random.default_rng(0)
    if kind == "product":
        nodes = [helper.make_node("MatMul", ["input", "w"], ["y"], name="layer")]
        stored, shape = np.ascontiguousarray(weight.T), [size, weight.shape[1]]
    else:
        group = weight.shape[0] if kind == "depthwise" else 1
        pads = [weight.shape[2] // 2] * 4
        nodes = [helper.make_node("Conv", ["input", "w"], ["y"], name="layer", strides=[stride] * 2, pads=pads, group=group)]
        stored, shape = weight, [1, weight.shape[1] * group, size, size]
    x = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "layer", [x], [y], [numpy_helper.from_array(stored, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model, {"input": rng.standard_normal(shape).astype(np.float32)}


def node_times(model: ModelProto, feeds: dict[str, Array], rounds: int) -> tuple[float, float]:
    """Microseconds of the layer itself, and of the changes of layout around it."""
    with tempfile.TemporaryDirectory() as folder:
        session = Session(model.SerializeToString(), options(1), profile=Path(folder) / "profile")
        for _ in range(rounds):
            session.run(feeds)
        found = session.end_profile()
    reorders = sum(spent for op, spent in found.values() if op.startswith("Reorder"))
    return sum(spent for op, spent in found.values() if not op.startswith("Reorder")), reorders


def non_negative(rows: Array, wanted: Array) -> Array:
    """The least |rows c - wanted| with c >= 0: the best free solution of any subset of columns that has none below 0."""
    best, least = np.zeros(rows.shape[1]), float(np.sum(wanted**2))
    for subset in range(1, 1 << rows.shape[1]):
        columns = [i for i in range(rows.shape[1]) if subset >> i & 1]
        solution = np.linalg.lstsq(rows[:, columns], wanted, rcond=None)[0]
        left = float(np.sum((rows[:, columns] @ solution - wanted) ** 2))
        if left < least and (solution >= 0).all():
            best, least = np.zeros(rows.shape[1]), left
            best[columns] = solution
    return best


def fit(rounds: int) -> str:
    """The source of one row of COSTS."""
    lines: dict[str, dict[str, Line]] = {"dense": {}, "single": {}, "quad": {}}
    reorders: list[float] = []
    for kind, layers in FIT_LAYERS.items():
        points: dict[str, list[tuple[float, float, float, float]]] = {"dense": [], "single": [], "quad": []}
        for rows, channels, kernel, stride, size in layers:
            shape = (rows, channels) if kind == "product" else (rows, channels, kernel, kernel)
            for density in (1.0,) if kind == "depthwise" else (1.0, *FIT_DENSITIES):
                for pattern, block in (("dense", 1),) if density == 1.0 else (("single", 1), ("quad", 4)):
                    weight = masked(shape, density, block)
                    model, feeds = single_layer(kind, weight, stride, size)
                    outputs = float(size * rows) if kind == "product" else float(rows * (-(-size // stride)) ** 2)
                    work = (outputs * weight[0].size * density, outputs, float(feeds["input"].size))
                    if pattern == "dense":
                        spent, moved = node_times(model, feeds, rounds)
                        points["dense"].append((*work, spent))
                        if moved:
                            reorders.append(1e6 * moved / (work[1] + work[2]))
                    if pattern != "dense" or kind == "depthwise":
                        spent, _ = node_times(to_sparse_ort(model, layers=["layer"]), feeds, rounds)
                        points["single" if kind == "depthwise" else pattern].append((*work, spent))
        points["quad"] = points["quad"] or points["single"]
        for pattern, measured in points.items():
            values = np.array(measured)
            design = np.column_stack([np.ones(len(values)), values[:, :3] / 1e6]) / values[:, 3:]
            call, mac, out, into = (round(float(c), 1) for c in non_negative(design, np.ones(len(values))))
            lines[pattern][kind] = Line(call, mac, out, into)
    text = [f'    "{kernels.instruction_sets()[0]}": Costs(']
    for pattern, by_kind in lines.items():
        text.append(f"        {pattern}={{")
        text += [f'            "{kind}": Line({x.call}, {x.mac}, {x.out}, {x.into}),' for kind, x in by_kind.items()]
        text.append("        },")
    return "\n".join([*text, f"        reorder={np.median(reorders):.1f},", "    ),"])


def fit_int8(rounds: int) -> str:
    """The lines of INT8_COSTS, and what changing a layout costs."""
    points: dict[tuple[str, Kind], list[tuple[float, ...]]] = {}
    reorders: list[float] = []
    for kind, layers in INT8_FIT_LAYERS.items():
        for rows, channels, kernel, stride, size in layers:
            shape = (rows, channels) if kind == "product" else (rows, channels, kernel, kernel)
            for density in INT8_FIT_DENSITIES:
                weight = masked((channels, rows, *shape[2:]), density, 4).swapaxes(0, 1)
                model, feeds = single_layer(kind, weight, stride, size)
                samples: list[Feeds] = [feeds]
                quantized = made(make("int8", model, Order(calibration=samples.copy)))
                sparse = to_sparse_ort(quantized, layers=[plan(quantized)[0].layer])
                outputs = float(size * rows) if kind == "product" else float(rows * (-(-size // stride)) ** 2)
                inputs = float(feeds["input"].size)
                for which, file in (("dense", quantized), ("single", sparse)):
                    spent, moved = int8_times(file, feeds, rounds)
                    share = 1.0 if which == "dense" else density
                    points.setdefault((which, kind), []).append((outputs * weight[0].size * share, outputs, inputs, spent))
                    reorders += [1e6 * moved / (outputs + inputs)] if moved else []
    text = []
    for (which, kind), measured in points.items():
        values = np.array(measured)
        design = np.column_stack([np.ones(len(values)), values[:, :3] / 1e6]) / values[:, 3:]
        call, mac, out, into = (round(float(c), 1) for c in non_negative(design, np.ones(len(values))))
        text.append(f'{which} "{kind}": Line({call}, {mac}, {out}, {into})')
    return "\n".join([*text, f"reorder={np.median(reorders):.1f}"])


def int8_times(model: ModelProto, feeds: dict[str, Array], rounds: int) -> tuple[float, float]:
    """Microseconds of the layer itself, and of the changes of layout around it."""
    with tempfile.TemporaryDirectory() as folder:
        session = Session(model.SerializeToString(), options(1), profile=Path(folder) / "profile")
        for _ in range(rounds):
            session.run(feeds)
        found = session.end_profile()
    layers = sum(spent for op, spent in found.values() if op.startswith(("QLinear", "QGemm", "Sparse")))
    return layers, sum(spent for op, spent in found.values() if op == "Transpose")


def masked(shape: tuple[int, ...], density: float, block: int) -> Array:
    """A random weight with a share of nonzeros, `block` output channels alike."""
    rng = np.random.default_rng([*shape, block])
    kept = np.repeat(rng.random((shape[0] // block, *shape[1:])) < density, block, 0)
    return (rng.standard_normal(shape) * kept).astype(np.float32)


def products(threads: int, rounds: int) -> Iterator[list[str]]:
    """Single matrix products, dense against sparse."""
    for batch, inputs, outputs in PRODUCTS:
        cells = [f"{batch} x {inputs} x {outputs}", str(threads)]
        model, feeds = single_layer("product", masked((outputs, inputs), 1.0, 1), size=batch)
        sessions = [Session(model.SerializeToString(), options(threads))]
        for block in (1, 4):
            sparse, _ = single_layer("product", masked((outputs, inputs), 0.1, block), size=batch)
            sessions.append(Session(to_sparse_ort(sparse, layers=["layer"]).SerializeToString(), options(threads)))
        times = interleaved(sessions, feeds, rounds)
        yield [*cells, f"{1e3 * float(np.median(times[0])):.2f}", *(f"{float(np.median(times[0] / t)):.2f}x" for t in times[1:])]


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"instruction set {kernels.instruction_sets()[0]}\n")
    if arguments.fit:
        print(fit_int8(arguments.rounds) if arguments.int8 else fit(arguments.rounds))
        return
    if arguments.products:
        header = ("rows x inputs x outputs", "threads", "dense ms", "90 % unstructured", "90 % 4x1")
        print(markdown_table(header, [row for n in arguments.threads for row in products(n, arguments.rounds)]))
        return
    rows = []
    for name in arguments.networks:
        model = NETWORKS[name]()
        size = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
        x = np.random.default_rng(1).standard_normal((1, 3, size, size)).astype(np.float32)
        for threads in arguments.threads:
            rows += list((compare_int8 if arguments.int8 else compare)(name, model, x, threads, arguments.rounds, SPARSITIES))
    print(markdown_table(HEADER, [row.cells() for row in rows]))
    if arguments.json is not None:
        write_json(arguments.json, {"environment": environment(), "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
