"""RR curves as a picture file, by matplotlib: `analyze --plot`."""

from __future__ import annotations

from pathlib import Path

from relrep_onnx.escape import clean
from relrep_onnx.results import Analysis
from relrep_onnx.types import ConfigError


def plot_curves(analysis: Analysis, path: Path) -> None:
    """RR and repaired signal-to-noise ratio of every layer against sparsity, as a picture (PNG, SVG or PDF by suffix).

    Raises:
        ConfigError: matplotlib is missing, or cannot write this kind of file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'relrep-onnx[plots]'") from error
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = [i / max(1, len(analysis.layers) - 1) for i in range(len(analysis.layers))]
    for shade, report in zip(shades, analysis.layers, strict=True):
        color = (0.1 + 0.8 * shade, 0.25, 0.85 - 0.7 * shade)
        curve = report.curve
        left.plot(curve.sparsity, curve.rr, color=color, linewidth=1.2, label=_label(report.layer.name))
        right.plot(curve.sparsity, [curve.snr_db(s) for s in curve.sparsity], color=color, linewidth=1.2)
    left.set(xlabel="sparsity", ylabel="RR = residual / raw", title="Relative Repairability (low: repairable)", ylim=(0, None))
    right.set(xlabel="sparsity", ylabel="signal / residual, dB", title="Signal-to-noise ratio after repair")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if len(analysis.layers) <= 30:
        figure.legend(loc="outside right upper", fontsize=6)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {str(path)!r}: {error}") from error


def _label(name: str) -> str:
    """The end of a name for a legend, in which matplotlib leaves out what starts with an underscore and reads TeX at dollars."""
    end = clean(name)[-28:].replace("$", r"\$")
    return f" {end}" if end.startswith("_") else end
