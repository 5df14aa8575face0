"""What the dense network shows of each layer, from a pass over the data or from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from relrep_onnx.cache import Cache
from relrep_onnx.calibrate import DenseLayer, Feeding, Targets, WalkSettings, dense_pass
from relrep_onnx.graph import Graph
from relrep_onnx.moments import Covariance
from relrep_onnx.types import Array, CalibrationError, Layer

DensePass = Callable[[Graph, Sequence[Layer], Feeding, WalkSettings], Iterator[DenseLayer]]


def dense_statistics(
    graph: Graph,
    layers: Sequence[Layer],
    feeds: Feeding,
    settings: WalkSettings,
    cache: Cache | None,
    key: str,
    walk: DensePass | None = None,
) -> Iterator[DenseLayer]:
    """Yields what the dense pass would, for each layer.

    Args:
        graph: the dense model.
        layers: what to measure.
        feeds: the batches; not touched where the cache has every layer.
        settings: how to walk.
        cache: where entries are kept, if anywhere.
        key: names model, data and settings.
        walk: the dense pass, where it is not this process's own.

    Raises:
        CalibrationError: the data do not fit, or a cache entry disappears while it is used.
    """
    keys = {layer.name: f"{key} {layer}" for layer in layers}
    # Entries are read twice, so that one layer's moments are in memory at a time.
    if cache is not None and all(cache.get(entry) is not None for entry in keys.values()):
        for layer in layers:
            found = cache.get(keys[layer.name])
            if found is None:
                raise CalibrationError(f"the cache entry of layer {layer.name!r} changed while it was read; run again")
            yield _unpack(layer, found)
        return
    for dense in (walk or dense_pass)(graph, layers, feeds, settings):
        if cache is not None:
            cache.put(keys[dense.layer.name], _pack(dense))
        yield dense


def _pack(dense: DenseLayer) -> dict[str, Array]:
    inputs, targets = dense.inputs, dense.targets
    known = {
        "mean": inputs.mean,
        "outputs": targets.outputs,
        "ends": targets.ends,
        "factor" if inputs.factored else "matrix": inputs.values,
    }
    if targets.shortcut is not None:
        known["shortcut"] = targets.shortcut
    return {"numbers": np.array([inputs.count, dense.macs]), **known}


def _unpack(layer: Layer, entry: dict[str, Array]) -> DenseLayer:
    count, macs = entry["numbers"].tolist()
    factored = "factor" in entry
    inputs = Covariance(count, entry["mean"], entry["factor" if factored else "matrix"], factored)
    return DenseLayer(layer, inputs, Targets(entry["outputs"], entry.get("shortcut"), entry["ends"]), macs)
