"""The pictures of docs/concepts.md, drawn from the shipped sample: `python -m tools.docs.pictures` (needs matplotlib).

`curves`: what pruning does to the output of two layers, and what repair leaves of it.  `patterns`: one weight under four
patterns.  `sizes`: bytes of the written forms by sparsity.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure
from onnx import TensorProto, helper, numpy_helper

from relrep_onnx import Config, analyze, optimize
from relrep_onnx.graph import Graph, find_layers
from relrep_onnx.masks import pattern_named
from relrep_onnx.types import Selection
from relrep_onnx.verify import gzip_size
from tools.bench.data import SAMPLES
from tools.bench.options import names

FOLDER: Final = Path(__file__).resolve().parents[2] / "docs"
MODEL: Final = SAMPLES / "fashion.onnx"
CONFIG: Final = Config(mean=(0.286,), std=(0.353,), num_samples=128, threads=1, repair="variance", allocate="rr-curve")
PATTERNS: Final = ("unstructured", "2:4", "4x1", "1x4")
SIZES: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Sparsities of the picture of sizes."""


def curves() -> Figure:
    """Raw and residual distortion of the layers with the least and the most RR at 80 %, as shares of the layer's signal."""
    layers = analyze(MODEL, SAMPLES / "fashion_calib.npz", CONFIG).layers
    ordered = sorted(layers, key=lambda report: report.curve.rr_at(0.8))
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for panel, report in zip(panels, (ordered[0], ordered[-1]), strict=True):
        curve = report.curve
        panel.plot(curve.sparsity, curve.raw / curve.signal, "--", color="0.4", label="after pruning")
        panel.plot(curve.sparsity, curve.residual / curve.signal, color="tab:blue", label="after repair")
        panel.fill_between(curve.sparsity, curve.residual / curve.signal, curve.raw / curve.signal, color="tab:blue", alpha=0.1)
        panel.set_title(f"{curve.layer.strip('/')}\nRR {curve.rr_at(0.8):.2f} at 80 %")
        panel.set(xlabel="sparsity", xlim=(0, 1), ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("error / signal")
    panels[0].legend(loc="upper left")
    return figure


def patterns() -> Figure:
    """What survives of one weight of 16 output by 32 input channels when half of it goes."""
    weight = np.random.default_rng(0).standard_normal((16, 32))
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 32), ("y", 16))]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], [numpy_helper.from_array(weight.astype(np.float32), "w")])
    (layer,), _ = find_layers(Graph(helper.make_model(graph)), Selection(min_size=1))
    figure, panels = pyplot.subplots(1, len(PATTERNS), figsize=(8, 1.9), layout="constrained")
    for panel, name in zip(panels, PATTERNS, strict=True):
        mask = pattern_named(name).mask(layer, weight**2, layer.size // 2)
        panel.imshow(np.where(mask, np.abs(weight), np.nan), cmap="Blues", vmin=-1, aspect="auto")
        panel.set(title=name, xticks=[], yticks=[], xlabel="input channels")
    panels[0].set_ylabel("output channels")
    return figure


def sizes() -> Figure:
    """Bytes of the written forms, in percent of the dense file."""
    forms: Mapping[str, tuple[str, bool]] = {
        "onnx": ("onnx", False),
        "onnx, gzip": ("onnx", True),
        "compact": ("compact", False),
        "int8+compact": ("int8+compact", False),
    }
    dense = MODEL.stat().st_size
    figure, panel = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    lines: dict[str, list[float]] = {label: [] for label in forms}
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in SIZES:
            config = dataclasses.replace(CONFIG, sparsity=sparsity, forms=("onnx", "compact", "int8+compact"))
            result = optimize(MODEL, Path(folder) / f"{sparsity}", SAMPLES / "fashion_calib.npz", config)
            files = {export.form: Path(export.output) for export in result.exports}
            for label, (form, packed) in forms.items():
                lines[label].append(100 * (gzip_size(files[form]) if packed else files[form].stat().st_size) / dense)
    for (label, shares), marker in zip(lines.items(), "osD^", strict=True):
        panel.plot([100 * s for s in SIZES], shares, marker=marker, label=label)
    panel.set(xlabel="sparsity, %", ylabel="bytes, % of dense", ylim=(0, 105))
    panel.grid(alpha=0.3)
    panel.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    return figure


PICTURES: Final[Mapping[str, Callable[[], Figure]]] = {"curves": curves, "patterns": patterns, "sizes": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action=names(list(PICTURES)), default=list(PICTURES), metavar="A,B", help=", ".join(PICTURES))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "relrep", "font.size": 9}
    for name in options.only:
        figure = PICTURES[name]()
        figure.savefig(options.folder / f"concepts-{name}.png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)


if __name__ == "__main__":
    main()
