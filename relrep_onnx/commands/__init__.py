"""The commands, a file each: options become a `Config`, results become text."""

from relrep_onnx.commands.analyze import analyze
from relrep_onnx.commands.benchmark import benchmark
from relrep_onnx.commands.compare import compare
from relrep_onnx.commands.export import export
from relrep_onnx.commands.inspect import inspect
from relrep_onnx.commands.optimize import optimize
from relrep_onnx.commands.refine import refine
from relrep_onnx.commands.sweep import sweep

COMMANDS = (inspect, analyze, optimize, export, refine, sweep, compare, benchmark)

__all__ = ["COMMANDS"]
