"""`onnx`: the dense file, zeros stored as any other number.  Every tool reads it; a package or an update compresses it."""

from __future__ import annotations

from onnx import ModelProto

from relrep_onnx.export.forms import EXACT, Order, Product


def dense(model: ModelProto, _: Order) -> Product:
    """The model as it is."""
    return Product(model, EXACT)
