"""`int8`: quantized weights and activations as QuantizeLinear / DequantizeLinear pairs, by ONNX Runtime's static quantization.

Weights are symmetric per output channel, so a zero weight stays zero: w = scale_c * q, q in [-L, L].  Three things come on top:

- L is 64 for amd64, 127 for arm: without VNNI, x86 adds two products of uint8 and int8 in 16 bits, and 2 * 255 * 127 overflows.
- A channel without any weight left would get the scale 1, and its bias, an int32 of input scale * weight scale, be rounded
  coarsely.  It gets the median scale of the other channels.
- Bias correction (Nagel et al. 2019, arXiv 1906.04721): rounding a weight to w - e shifts the mean output by -E[e x]; the
  shift is measured on the calibration samples, with e in the weight's place, and added to the bias, of convolutions and Gemm.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from relrep_onnx.export.forms import Order, Product, Target
from relrep_onnx.export.int8_nodes import unreached_nodes, wrong_nodes
from relrep_onnx.graph import Graph, find_layers, raise_opset, read_weight, set_metadata, write_layer
from relrep_onnx.graph.index import refill
from relrep_onnx.runtime import FAILURES, RuntimeOptions, Session, quiet_tools
from relrep_onnx.types import (
    Array,
    ConfigError,
    Feeds,
    FloatArray,
    Layer,
    ModelError,
    RepairedLayer,
    Selection,
    VerificationError,
)

LEAST_OPSET: Final = 17
"""At older ones per-channel quantization gives invalid models without a word."""
LEVELS: Final[Mapping[Target, int]] = {"amd64": 64, "arm": 127}
TOLERANCE: Final = 0.3
BIASED: Final = ("Conv", "ConvTranspose", "Gemm")
BIAS_SLOT: Final = 2
PROBE: Final = "relrep_shift_"
_FAILURES: Final[tuple[type[Exception], ...]] = (
    *FAILURES, AssertionError, AttributeError, LookupError, OSError, TypeError, onnx.checker.ValidationError,
)  # fmt: skip
"""What the quantizer raises on models that it was not made for."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """One weight that the quantizer rounds per channel: the layer, its stored array, the axis of its channels, their scales.

    `scale` is float[channels], 0 for a channel without weights.
    """

    layer: Layer
    array: Array
    axis: int
    scale: Array

    @property
    def error(self) -> Array:
        """What rounding takes away, in the stored array's shape and type."""
        shape = [-1 if axis == self.axis else 1 for axis in range(self.array.ndim)]
        scale = np.where(self.scale > 0, self.scale, 1).reshape(shape)
        exact = self.array.astype(np.float64)
        error: Array = (exact - np.rint(exact / scale) * scale).astype(self.array.dtype)
        return error


def int8(model: ModelProto, order: Order) -> Product:
    """Quantizes a model, and counts that no zero was lost.

    Raises:
        ConfigError: the order has no calibration samples.
        ModelError: ONNX Runtime cannot quantize the model.
        VerificationError: a zero weight is not zero any more.
    """
    if order.calibration is None:
        raise ConfigError("--to int8 measures the ranges of activations: give samples with --calib")
    with tempfile.TemporaryDirectory(prefix="relrep-") as name, _naming():
        folder = Path(name)
        prepared = prepare(raise_opset(model, LEAST_OPSET), folder)
        own_biases(prepared)
        graph = Graph(prepared)
        floating = wrong_nodes(graph)
        weights = rounded_weights(graph, LEVELS[order.target], floating)
        shifts = rounding_shifts(prepared, weights, order.calibration(), order.runtime)
        for w in weights:
            weight = read_weight(graph, w.layer)
            write_layer(prepared, w.layer, RepairedLayer(weight, shifts[w.layer.name], np.zeros(w.layer.rows)))
        excluded = unreached_nodes(graph, floating)
        quantized = _quantize(prepared, guards(weights), excluded, order, order.calibration(), folder)
    zeros, kept = kept_zeros(graph, Graph(quantized))
    if kept < zeros:
        raise VerificationError(
            f"{zeros - kept} of {zeros} zero weights are not zero after quantization; nothing was written. Use --to compact "
            "--values int8, which rounds the weights only"
        )
    notes = [f"all {zeros:,} zeros of the quantized weights are kept"]
    if floating:
        notes.append(f"floating-point stays what int8 would spoil: {', '.join(floating)}")
    if len(excluded) == len(prepared.graph.node):
        notes.append("nothing is quantized: no layer with a stored weight that int8 holds lies outside the bodies of If and Loop")
    return Product(_tidied(quantized, model), TOLERANCE, tuple(notes))


def rounded_weights(graph: Graph, levels: int, floating: Collection[str] = ()) -> list[Rounded]:
    """Weights of convolutions, not depthwise, and Gemm, stored as their node reads them; channels as the quantizer's."""
    found = []
    for layer in find_layers(graph, Selection(min_size=1))[0]:
        nodes = [graph.producers[use.output] for use in layer.uses]
        if layer.op == "MatMul" or any(layer.weight not in node.input or node.name in floating for node in nodes):
            continue
        array = graph.stored(layer.weight)
        transposed = any(item.name == "transB" and item.i for item in nodes[0].attribute)
        axis = 0 if layer.op == "Conv" or transposed else 1
        peak = np.abs(array.astype(np.float64)).max(axis=tuple(a for a in range(array.ndim) if a != axis))
        found.append(Rounded(layer, array, axis, peak / levels))
    return found


def rounding_shifts(
    model: ModelProto, weights: Sequence[Rounded], batches: Iterable[Feeds], runtime: RuntimeOptions
) -> dict[str, FloatArray]:
    """E[e x] of each layer's rows, float64[rows], by layer name, on the inputs that the model itself gives the layer.

    Every node gets a twin with e for its weight and no bias; one pass measures all of them, and only means leave the model.
    """
    if not weights:
        return {}
    probed = deepcopy(model)
    graph = Graph(model)
    del probed.graph.output[:]
    for w in weights:
        probed.graph.initializer.append(numpy_helper.from_array(w.error, f"{PROBE}{w.layer.weight}"))
        for number, use in enumerate(w.layer.uses):
            node, mean = graph.producers[use.output], f"{PROBE}{w.layer.name}_{number}"
            probed.graph.node.extend(_twin(node, w, mean, graph.opset))
            probed.graph.output.append(ValueInfoProto(name=mean))
    if graph.opset >= 18:
        axes = [numpy_helper.from_array(np.array(axes), f"{PROBE}{len(axes)}") for axes in ([0], [0, 2], [0, 2, 3], [0, 2, 3, 4])]
        probed.graph.initializer.extend(axes)
    session = Session(probed.SerializeToString(), runtime, what="the model with rounding errors for weights")
    means = [{name: value.astype(np.float64) for name, value in session.run(feeds).items()} for feeds in batches]
    return {
        w.layer.name: np.mean([m[f"{PROBE}{w.layer.name}_{n}"] for m in means for n in range(len(w.layer.uses))], axis=0)
        for w in weights
    }


def _twin(node: NodeProto, weight: Rounded, mean: str, opset: int) -> Iterator[NodeProto]:
    twin = deepcopy(node)
    twin.ClearField("name")
    twin.input[:] = [node.input[0], f"{PROBE}{weight.layer.weight}"]
    twin.output[:] = [f"{mean}_all"]
    yield twin
    axes = [0] if weight.layer.op == "Gemm" else [0, *range(2, weight.array.ndim)]
    if opset >= 18:
        yield helper.make_node("ReduceMean", [f"{mean}_all", f"{PROBE}{len(axes)}"], [mean], keepdims=0)
    else:
        yield helper.make_node("ReduceMean", [f"{mean}_all"], [mean], axes=axes, keepdims=0)


def guards(weights: Iterable[Rounded]) -> dict[str, list[dict[str, Any]]]:
    """Scales to force on the quantizer, for weights with dead channels: those get the median of the living."""
    forced = {}
    for w in weights:
        alive = w.scale[w.scale > 0]
        if len(alive) in (0, len(w.scale)):
            continue
        scales = np.where(w.scale > 0, w.scale, np.median(alive)).astype(w.array.dtype)
        forced[w.layer.weight] = [
            {"axis": w.axis, "quant_type": QuantType.QInt8, "scale": scale, "zero_point": np.int8(0)} for scale in scales
        ]
    return forced


def kept_zeros(source: Graph, quantized: Graph) -> tuple[int, int]:
    """Zeros of all tensors that were quantized to a byte, and how many of them still mean zero."""
    zeros = kept = 0
    for name in source.tensors:
        stored, offset = f"{name}_quantized", f"{name}_zero_point"
        if not {stored, offset} <= quantized.tensors.keys() or quantized.stored(stored).itemsize > 1:
            continue
        zero_point = quantized.stored(offset).reshape(-1)
        same = zero_point.size and (zero_point == zero_point[0]).all()  # one per channel would need the channel's axis
        was_zero = source.stored(name) == 0
        zeros += int(was_zero.sum())
        kept += int((was_zero & (quantized.stored(stored) == zero_point[0])).sum()) if same else 0
    return zeros, kept


def prepare(model: ModelProto, folder: Path) -> ModelProto:
    """BatchNorm folded, constants computed, shapes inferred."""
    source, prepared = folder / "source.onnx", folder / "prepared.onnx"
    onnx.save_model(model, source)
    # Symbolic inference needs sympy, and fails on some models; plain inference is enough.
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    return onnx.load_model(prepared)


def own_biases(model: ModelProto) -> None:
    """Gives each layer a bias of its own, in place: the quantizer copies shared ones, under names that others may have."""
    graph = Graph(model)
    for name, tensor in graph.tensors.items():
        users = [node for node, slot in graph.consumers.get(name, ()) if slot == BIAS_SLOT and node.op_type in BIASED]
        for number, node in enumerate(users[1:], start=1):
            copy = model.graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = node.input[BIAS_SLOT] = graph.fresh(f"{name}_own_{number}")


def _quantize(
    model: ModelProto, forced: Mapping[str, Any], excluded: Sequence[str], order: Order, batches: Iterable[Feeds], folder: Path
) -> ModelProto:
    source, target = folder / "corrected.onnx", folder / "quantized.onnx"
    onnx.save_model(model, source)
    quantize_static(
        str(source),
        str(target),
        FeedsReader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=order.target == "amd64",
        activation_type=QuantType.QUInt8 if order.target == "amd64" else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(excluded),
        extra_options={"TensorQuantOverrides": dict(forced)},
    )
    return onnx.load_model(target)


class FeedsReader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds as the quantizer wants them."""

    def __init__(self, batches: Iterable[Feeds]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        """The next feeds, None at the end."""
        feeds = next(self._batches, None)
        return None if feeds is None else dict(feeds)


def _tidied(quantized: ModelProto, source: ModelProto) -> ModelProto:
    """Without the domains that nothing uses, which the optimizer lists, and with the source's metadata."""
    used = {node.domain for node in quantized.graph.node} | {entry.domain for entry in source.opset_import} | {""}
    refill(quantized.opset_import, [entry for entry in quantized.opset_import if entry.domain in used])
    del quantized.metadata_props[:]
    set_metadata(quantized, {entry.key: entry.value for entry in source.metadata_props})
    return quantized


@contextmanager
def _naming() -> Iterator[None]:
    """The quantizer's failures as ours."""
    try:
        with quiet_tools():
            yield
    except _FAILURES as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"ONNX Runtime cannot quantize the model: {reason}; use --to compact --values int8 instead") from error
