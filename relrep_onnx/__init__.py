"""Prune any exported ONNX model with a few hundred unlabelled samples, and repair what pruning breaks."""

from importlib.metadata import version

from relrep_onnx.config import Config
from relrep_onnx.export import Exported
from relrep_onnx.pipeline import analyze, compare, export_model, optimize, refine
from relrep_onnx.results import Analysis, LayerReport, Refined, Result
from relrep_onnx.types import (
    BudgetError,
    CalibrationError,
    ConfigError,
    ModelError,
    RelRepError,
    VerificationError,
)
from relrep_onnx.verify import Fidelity

__version__ = version("relrep-onnx")

__all__ = [
    "Analysis",
    "BudgetError",
    "CalibrationError",
    "Config",
    "ConfigError",
    "Exported",
    "Fidelity",
    "LayerReport",
    "ModelError",
    "Refined",
    "RelRepError",
    "Result",
    "VerificationError",
    "__version__",
    "analyze",
    "compare",
    "export_model",
    "optimize",
    "refine",
]
