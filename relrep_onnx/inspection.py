"""A look at a model without data: what can be pruned, what stays and why, how much work each layer is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from relrep_onnx import graph as graphs
from relrep_onnx.patches import macs
from relrep_onnx.runtime import symbolic_shapes
from relrep_onnx.types import Layer, Selection, Skipped

NO_SHAPES: Final = "needs the extra [ort-tools]" if find_spec("sympy") is None else "unknown"
"""Said of MACs where the shapes of the inputs are known."""


@dataclass(frozen=True)
class LayerFacts:
    """One prunable layer; MACs per sample are None where its input's shape is not known without data."""

    layer: Layer
    macs: int | None
    zeros: int


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect`; `cure` says what MACs need that are not known."""

    model: str
    opset: int
    ir_version: int
    weight_bytes: int
    layers: tuple[LayerFacts, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    cure: str


def inspect(
    model: graphs.ModelSource,
    selection: Selection | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Inspection:
    """Lists prunable layers and skipped weights of a model.

    Args:
        model: a path or a ModelProto.
        selection: which weights may be pruned.
        input_shapes: fixes open dimensions, by input name; an open first dimension counts as one sample.

    Raises:
        ModelError: the model cannot be read.
        ConfigError: a pattern or an input shape does not fit the model.
    """
    loaded = graphs.load(model, lazily=True)
    graph = graphs.Graph(graphs.flatten(loaded.model).model)
    layers, skipped = graphs.find_layers(graph, selection or Selection())
    shapes = graphs.activation_shapes(graph.model, input_shapes or {}, symbolic_shapes)
    zeros = graphs.count_zeros(graph, layers)
    inputs_of_model = [value.name for value in graph.model.graph.input if value.name not in graph.tensors]
    batches = {shapes[name][:1] for name in inputs_of_model if name in shapes}
    samples = batches.pop()[0] if len(batches) == 1 and () not in batches else 1
    facts = []
    for layer in layers:
        inputs = [shapes.get(use.activation) for use in layer.uses]
        work = sum(macs(layer, shape) for shape in inputs if shape is not None) // samples if None not in inputs else None
        facts.append(LayerFacts(layer, work, zeros[layer.name]))
    return Inspection(
        model=loaded.name,
        opset=graph.opset,
        ir_version=loaded.model.ir_version,
        weight_bytes=sum(graph.bytes_of(name) for name in graph.tensors),
        layers=tuple(facts),
        skipped=tuple(skipped),
        notes=loaded.notes,
        cure="needs --input-shape" if any(name not in shapes for name in inputs_of_model) else NO_SHAPES,
    )
