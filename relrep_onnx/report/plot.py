"""Results as picture files, by matplotlib: `--plot` of `analyze` and `sweep`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from relrep_onnx.escape import clean
from relrep_onnx.files import write_bytes
from relrep_onnx.report.swept import error_by_cost
from relrep_onnx.results import Analysis, Sweep
from relrep_onnx.sweeps import cost_of, front
from relrep_onnx.types import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES: Final = (".png", ".svg", ".pdf")
NO_PICTURES: Final = "--plot needs matplotlib: pip install 'relrep-onnx[plots]'"
LABELS: Final = {"size": "bytes of the file", "latency": "latency, ms", "nonzeros": "weights that are left"}


def plot_curves(analysis: Analysis, path: Path) -> None:
    """RR and repaired signal-to-noise ratio of every layer against sparsity, as a picture (PNG, SVG or PDF by suffix).

    Raises:
        ConfigError: matplotlib is missing, or cannot write this kind of file.
    """
    with _picture(path, 11, 5) as figure:
        left, right = figure.subplots(1, 2)
        shades = [i / max(1, len(analysis.layers) - 1) for i in range(len(analysis.layers))]
        for shade, report in zip(shades, analysis.layers, strict=True):
            color = (0.1 + 0.8 * shade, 0.25, 0.85 - 0.7 * shade)
            curve = report.curve
            left.plot(curve.sparsity, curve.rr, color=color, linewidth=1.2, label=_label(report.layer.name))
            right.plot(curve.sparsity, [curve.snr_db(s) for s in curve.sparsity], color=color, linewidth=1.2)
        left.set(
            xlabel="sparsity", ylabel="RR = residual / raw", title="Relative Repairability (low: repairable)", ylim=(0, None)
        )
        right.set(xlabel="sparsity", ylabel="signal / residual, dB", title="Signal-to-noise ratio after repair")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        if len(analysis.layers) <= 30:
            figure.legend(loc="outside right upper", fontsize=6)


def plot_front(found: Sweep, path: Path) -> None:
    """Error against cost, a color for each pattern, allocator and repair, a line for the front (PNG, SVG or PDF by suffix).

    Raises:
        ConfigError: matplotlib is missing, or cannot write this kind of file.
    """
    with _picture(path, 8, 5) as figure:
        axes, cost = figure.subplots(), cost_of(found)
        for number, (label, pairs) in enumerate(error_by_cost(found).items()):
            x, y = zip(*pairs, strict=True)
            axes.scatter(x, y, s=24, color=f"C{number % 10}", label=label, zorder=3)
        best = [(getattr(p.figures, cost), p.figures.error) for p in front(found) if p.figures is not None]
        axes.plot(*zip(*best, strict=True), color="0.6", linewidth=1, label="front")
        if found.picked is not None and found.picked.figures is not None:
            chosen = getattr(found.picked.figures, cost), found.picked.figures.error
            axes.scatter([chosen[0]], [chosen[1]], s=120, facecolors="none", edgecolors="black", label="picked", zorder=4)
        axes.set(xlabel=LABELS[cost], ylabel="relative L2 of the outputs, held-out samples", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


@contextmanager
def _picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, written once it is drawn, whole or not at all; the suffix says in which format.

    Raises:
        ConfigError: matplotlib is missing, or cannot write this kind of file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(NO_PICTURES) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, dpi=150, format=path.suffix.lower().removeprefix("."))
    except ValueError as error:
        raise ConfigError(f"cannot write the plot {str(path)!r}: {error}") from error
    write_bytes(path, drawn.getvalue())


def _label(name: str) -> str:
    """The end of a name for a legend, in which matplotlib leaves out what starts with an underscore and reads TeX at dollars."""
    end = clean(name)[-28:].replace("$", r"\$")
    return f" {end}" if end.startswith("_") else end
