"""`sparse-ort`: the layers that gain from it as operators of the sparse kernels, in a file that also runs without."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from onnx import ModelProto

from relrep_onnx import kernels
from relrep_onnx.benchmark import interleaved, random_feeds
from relrep_onnx.export.forms import EXACT, Order, Product
from relrep_onnx.export.int8 import int8
from relrep_onnx.export.sparse_ort import with_choices
from relrep_onnx.export.tuning import Race, tune
from relrep_onnx.kernels.costs import REFERENCE
from relrep_onnx.runtime import Session
from relrep_onnx.types import Array

ROUNDS: Final = 15
"""Of a race."""


def sparse_ort(model: ModelProto, order: Order) -> Product:
    """Rewrites the layers that are predicted, or with `tune` measured, to make the whole network faster.

    With int8 values the model is quantized first, as `int8` does it for amd64: with weights of seven bits the dense computation
    is exact on every processor too.

    Raises:
        ModelError: the operator set is older than 12 and cannot be raised.
        ConfigError: `tune` where the kernels were not built, or with inputs whose shape is not known.
        RelRepError: what `int8` raises.
    """
    before = int8(model, replace(order, target="amd64")) if order.values == "int8" else Product(model, EXACT)
    source = before.content
    assert isinstance(source, ModelProto)  # int8 gives no other format
    if order.tune:
        tuned = tune(source, race_of(order), instruction_set=REFERENCE, input_shapes=order.shapes)
        content, count, possible = tuned.model, len(tuned.layers), tuned.possible
        basis = f"measured on this machine ({kernels.instruction_sets()[0]})"
        if count:
            basis += f", {tuned.ratio:.2f} times as fast as the dense model"
    else:
        content, choices = with_choices(source, input_shapes=order.shapes)
        count, possible = sum(choice.sparse for choice in choices), len(choices)
        basis = f"predicted for {REFERENCE}; --tune measures"
    notes = [*before.notes, f"{count} of {possible} layers run sparse: {basis}"]
    if not count:
        notes.append("the layers stay dense: sparse ones would not make the network at least 3 % faster")
    elif kernels.available():
        notes.append("computes the same with the sparse kernels and, dense, without them")
    else:
        notes.append("the sparse kernels were not built here: only compared without them")
    return Product(content, before.tolerance, tuple(notes), kernels=count > 0)


def race_of(order: Order) -> Race:
    """Runs models side by side on this machine: sessions as the order opens them, with the kernels, on random inputs.

    Raises:
        ConfigError: the kernels were not built.
    """
    runtime = order.runtime.with_library(kernels.library_path())

    def race(models: list[ModelProto]) -> Array:
        sessions = [Session(model.SerializeToString(), runtime, what="a candidate of --tune") for model in models]
        return interleaved(sessions, random_feeds(sessions[0].inputs, 1, order.shapes, seed=0), ROUNDS)

    return race
