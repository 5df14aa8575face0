"""The points of a sweep as a picture: error against cost, and the front."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from relrep_onnx.results import Sweep
from relrep_onnx.sweeps.tables import cost_of, front
from relrep_onnx.types import ConfigError

LABELS: Final = {"size": "bytes of the file", "latency": "latency, ms", "nonzeros": "weights that are left"}


def plot_front(found: Sweep, path: Path) -> None:
    """Error against cost, a color for each pattern, allocator and repair, a line for the front (PNG, SVG or PDF by suffix).

    Raises:
        ConfigError: matplotlib is missing, or cannot write this kind of file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'relrep-onnx[plots]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, cost = figure.subplots(), cost_of(found)
    series: dict[str, list[tuple[float, float]]] = {}
    for p in found.points:
        if p.figures is not None:
            label = f"{p.pattern}, {p.allocate}, {p.repair}"
            series.setdefault(label, []).append((getattr(p.figures, cost), p.figures.error))
    for number, (label, pairs) in enumerate(series.items()):
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
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {str(path)!r}: {error}") from error
