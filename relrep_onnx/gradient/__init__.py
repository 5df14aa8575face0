"""Gradients of an ONNX graph, as an ONNX graph of standard operators: one rule per operator, a file per family."""

from relrep_onnx.gradient.reach import MEASURES, Reach
from relrep_onnx.gradient.reverse import gradient_model, without_unused
from relrep_onnx.gradient.table import RULES
from relrep_onnx.gradient.tape import Trace

__all__ = ["MEASURES", "RULES", "Reach", "Trace", "gradient_model", "without_unused"]
