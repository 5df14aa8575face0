"""Residual branches: where a layer's output goes straight into a sum with a tensor that is known before the layer.

    layer -> (BatchNormalization | Add of a constant)* -> Add(shortcut)

The layer is then the last one that can make up for what pruning did to the shortcut: aiming at
yd + (shortcut_d - shortcut_s) / scale, with the scale that BatchNormalization puts on the output, it repairs the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

import numpy as np

from relrep_onnx.graph.index import Graph, number
from relrep_onnx.types import FloatArray, Layer, Window

DEAD: Final = 1e-3
"""An output channel whose scale is below this share of the largest cannot make up for anything."""


def with_shortcut(graph: Graph, layer: Layer, level: Mapping[str, int]) -> Layer:
    """The layer with its shortcut, where the branch has one that is ready when the layer's own input is."""
    plain = isinstance(layer.view, Window) or (layer.view.axis == -1 and not layer.view.batch)
    end = _branch_end(graph, layer) if plain and len(layer.uses) == 1 else None
    if end is None or level.get(end[0], 0) > level.get(layer.uses[0].activation, 0):
        return layer
    return dataclasses.replace(layer, shortcut=end[0])


def branch_scale(graph: Graph, layer: Layer) -> FloatArray:
    """What one unit of each output channel adds to the sum, float64[rows]; infinite for channels that cannot reach it."""
    end = _branch_end(graph, layer)
    if end is None:
        raise KeyError(layer.name)
    scale = np.broadcast_to(end[1], layer.rows)
    return np.where(np.abs(scale) > DEAD * np.abs(scale).max(), scale, np.inf)


def _branch_end(graph: Graph, layer: Layer) -> tuple[str, FloatArray] | None:
    """The other operand of the sum that the layer's output goes into, and the scale on the way."""
    name, scale = layer.uses[0].output, np.ones(1)
    while True:
        reader = graph.only_reader(name)
        if reader is None:
            return None
        node, slot = reader
        if node.op_type == "BatchNormalization" and slot == 0:
            gamma, variance = (graph.value(node.input[i]) for i in (1, 4))
            if gamma is None or variance is None or not gamma.shape == variance.shape == (layer.rows,):
                return None
            spread = variance.astype(np.float64) + number(node, "epsilon", 1e-5)
            if not (spread > 0).all():
                return None
            scale = scale * gamma.astype(np.float64) / np.sqrt(spread)
        elif node.op_type == "Add":
            if (other := node.input[1 - slot]) not in graph.constant_names:
                return other, scale
        else:
            return None
        name = node.output[0]
