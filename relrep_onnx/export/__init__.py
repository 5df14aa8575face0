"""Deployment forms: one file each, a table of them, and a delivery that loads and compares each file before it counts."""

from relrep_onnx.export.deliver import Exported, deliver
from relrep_onnx.export.forms import EXACT, Exporter, Order, Product, Target, Values
from relrep_onnx.export.table import EXPORTERS, check_forms, make, places_for, suffix_of

__all__ = [
    "EXACT",
    "EXPORTERS",
    "Exported",
    "Exporter",
    "Order",
    "Product",
    "Target",
    "Values",
    "check_forms",
    "deliver",
    "make",
    "places_for",
    "suffix_of",
]
