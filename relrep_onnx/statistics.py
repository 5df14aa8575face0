"""Moments of the dense network's inputs, layer by layer, from a pass over the data or from the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from relrep_onnx.cache import Cache
from relrep_onnx.calibrate import WalkSettings, dense_pass
from relrep_onnx.graph import Graph
from relrep_onnx.moments import Covariance
from relrep_onnx.types import Array, Feeds, Layer


def dense_statistics(
    graph: Graph,
    layers: Sequence[Layer],
    batches: Iterable[Feeds],
    samples: int,
    settings: WalkSettings,
    cache: Cache | None,
    key: str,
) -> Iterator[tuple[Layer, Covariance, int]]:
    """Yields each layer with the moments of its inputs and its MACs per sample.

    Args:
        graph: the dense model.
        layers: what to measure.
        batches: feeds; not touched where the cache has every layer.
        samples: how many samples the batches hold.
        settings: how to walk.
        cache: where entries are kept, if anywhere.
        key: names model, data and settings.
    """
    keys = {layer.name: f"{key} {layer}" for layer in layers}
    if cache is not None:
        entries = {name: cache.get(entry) for name, entry in keys.items()}
        if all(entries.values()):
            for layer in layers:
                yield layer, *_unpack(entries[layer.name] or {})
            return
    for layer, inputs, macs in dense_pass(graph, layers, batches, samples, settings):
        if cache is not None:
            cache.put(keys[layer.name], _pack(inputs, macs))
        yield layer, inputs, macs


def _pack(inputs: Covariance, macs: int) -> dict[str, Array]:
    spread = {"matrix": inputs.matrix, "factor": inputs.factor}
    known = {name: value for name, value in spread.items() if value is not None}
    return {"numbers": np.array([inputs.count, macs]), "mean": inputs.mean, **known}


def _unpack(entry: dict[str, Array]) -> tuple[Covariance, int]:
    count, macs = entry["numbers"].tolist()
    return Covariance(count, entry["mean"], entry.get("matrix"), entry.get("factor")), macs
