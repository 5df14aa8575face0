"""What people read: a result becomes a document (`content.py`), and each face draws the same document."""

from relrep_onnx.report.content import (
    of_analysis,
    of_benchmark,
    of_exports,
    of_fidelity,
    of_inspection,
    of_refined,
    of_result,
    of_sweep,
)
from relrep_onnx.report.document import Document
from relrep_onnx.report.plot import NO_PICTURES, PICTURES, plot_curves, plot_front
from relrep_onnx.report.terminal import console_for, render
from relrep_onnx.report.words import decisions, speed_verdict
from relrep_onnx.report.write import FACES, write

__all__ = [
    "FACES",
    "NO_PICTURES",
    "PICTURES",
    "Document",
    "console_for",
    "decisions",
    "of_analysis",
    "of_benchmark",
    "of_exports",
    "of_fidelity",
    "of_inspection",
    "of_refined",
    "of_result",
    "of_sweep",
    "plot_curves",
    "plot_front",
    "render",
    "speed_verdict",
    "write",
]
