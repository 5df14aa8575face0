"""From an activation to the rows a layer's weight multiplies, exactly or at sampled positions.

Conv           out[p] = sum_k pad(x)[s p + d k] w[k]
ConvTranspose  is a plain convolution, stride 1, of the input with s - 1 zeros between its elements, with the flipped kernel
Gemm, MatMul   the contracted axis goes last; everything before it is positions
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from relrep_onnx.types import Array, CalibrationError, Contraction, FloatArray, Layer, Window


def choose_positions(layer: Layer, shape: tuple[int, ...], limit: int | None, rng: np.random.Generator) -> Array | None:
    """Flat output positions to sample, ascending, at most `limit` per sample of the batch; None means all of them."""
    total = position_count(layer, shape)
    keep = total if limit is None else limit * sample_count(layer, shape)
    return None if keep >= total else np.sort(rng.choice(total, keep, replace=False))


def sample_count(layer: Layer, shape: tuple[int, ...]) -> int:
    """Samples in a batch: the length of the activation's first axis, one where that axis is contracted."""
    if isinstance(layer.view, Window):
        return shape[0]
    axis = layer.view.axis % len(shape)
    return shape[0] if axis != 0 and len(shape) > 1 else (shape[1] if len(shape) > 1 else 1)


def position_count(layer: Layer, shape: tuple[int, ...]) -> int:
    """Output positions in a batch: rows of the design matrix.

    Raises:
        CalibrationError: the activation's shape does not fit the layer.
    """
    _check_shape(layer, shape)
    if isinstance(layer.view, Window):
        return shape[0] * math.prod(_output_shape(layer.view, shape[2:]))
    lead = np.broadcast_shapes(shape[:-2], layer.view.batch)
    return math.prod(lead) * math.prod(shape[-2:]) // layer.cols // layer.groups


def macs(layer: Layer, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one batch: how often each weight is used, times the number of weights."""
    if isinstance(layer.view, Window) and layer.view.transposed:
        return shape[0] * math.prod(shape[2:]) * layer.size  # each weight meets each input once
    return position_count(layer, shape) * layer.size


def design_rows(layer: Layer, x: FloatArray, positions: Array | None) -> FloatArray:
    """The inputs of the layer at the given output positions: [positions, groups, cols].

    Raises:
        CalibrationError: the activation's shape does not fit the layer.
    """
    _check_shape(layer, x.shape)
    if isinstance(layer.view, Window):
        return _window_rows(layer, layer.view, x, positions)
    return _contraction_rows(layer, layer.view, x, positions)


def output_rows(layer: Layer, y: FloatArray, shape: tuple[int, ...], positions: Array | None) -> FloatArray | None:
    """A tensor of the layer's output's shape at the given positions: [positions, rows]; None where it has another shape.

    Args:
        layer: one whose weight has no batch dimensions.
        y: the tensor.
        shape: of the layer's input.
        positions: as `choose_positions` gives them.
    """
    y = np.moveaxis(y, 1, -1) if isinstance(layer.view, Window) and y.ndim > 1 else y
    lead = (shape[0], *_output_shape(layer.view, shape[2:])) if isinstance(layer.view, Window) else shape[:-1]
    if y.shape != (*lead, layer.rows):
        return None
    rows = y.reshape(-1, layer.rows)
    return rows if positions is None else rows[positions]


def _check_shape(layer: Layer, shape: tuple[int, ...]) -> None:
    view, rank = layer.view, len(shape)
    if isinstance(view, Window):
        channels = layer.groups * layer.cols // math.prod(view.kernel)
        if rank != len(view.kernel) + 2:
            raise CalibrationError(f"layer {layer.name!r}: its input has rank {rank}, not {len(view.kernel) + 2}")
        if shape[1] != channels:
            raise CalibrationError(f"layer {layer.name!r}: its input has {shape[1]} channels, not {channels}")
        return
    if rank < 2 and (view.axis != -1 or view.batch or not rank):
        # A bias would have to take another shape, and no batch axis is left to tell samples apart.
        raise CalibrationError(f"layer {layer.name!r}: its input has rank {rank}, at least 2 is supported; exclude the layer")
    if shape[view.axis] != layer.cols:
        raise CalibrationError(f"layer {layer.name!r}: its input has {shape[view.axis]} values to contract, not {layer.cols}")
    if not all(a == b or 1 in (a, b) for a, b in zip(shape[-3::-1], view.batch[::-1], strict=False)):
        raise CalibrationError(f"layer {layer.name!r}: its input of shape {shape} does not fit the weight's batch {view.batch}")


def _contraction_rows(layer: Layer, view: Contraction, x: FloatArray, positions: Array | None) -> FloatArray:
    x = np.moveaxis(x, view.axis, -1) if x.ndim > 1 else x[None, :]
    if not view.batch:
        rows = x.reshape(-1, 1, layer.cols)
    else:
        # [..., *batch, n, cols]: batch axes along which the weight varies become groups, one matrix each; along one of
        # length 1 the weight repeats, which makes positions.
        x = np.broadcast_to(x, np.broadcast_shapes(x.shape[:-2], view.batch) + x.shape[-2:])
        first = x.ndim - 2 - len(view.batch)
        axes = [first + i for i, size in enumerate(view.batch) if size > 1]
        rows = np.moveaxis(x, axes, range(-1 - len(axes), -1)).reshape(-1, layer.groups, layer.cols)
    return rows if positions is None else rows[positions]


def _window_rows(layer: Layer, window: Window, x: FloatArray, positions: Array | None) -> FloatArray:
    spatial = x.shape[2:]
    axes = len(spatial)
    begins, ends = _pads(window, spatial)
    strides = window.strides
    if window.transposed:
        stuffed = np.zeros(x.shape[:2] + tuple((n - 1) * s + 1 for n, s in zip(spatial, strides, strict=True)), x.dtype)
        stuffed[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
        reach = [(k - 1) * d for k, d in zip(window.kernel, window.dilations, strict=True)]
        begins = tuple(r - b for r, b in zip(reach, begins, strict=True))
        ends = tuple(r - e + o for r, e, o in zip(reach, ends, window.output_padding, strict=True))
        x, strides = stuffed, (1,) * axes
    crop = tuple(slice(max(-b, 0), n - max(-e, 0)) for b, e, n in zip(begins, ends, x.shape[2:], strict=True))
    padding = [(0, 0), (0, 0), *((max(b, 0), max(e, 0)) for b, e in zip(begins, ends, strict=True))]
    padded = np.pad(x[(slice(None), slice(None), *crop)], padding)
    extent = tuple((k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True))
    windows = sliding_window_view(padded, extent, axis=tuple(range(2, axes + 2)))
    steps = (*(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in window.dilations))
    windows = windows[(slice(None), slice(None), *steps)]
    out_shape = (x.shape[0], *windows.shape[2 : 2 + axes])
    chosen = np.unravel_index(np.arange(math.prod(out_shape)) if positions is None else positions, out_shape)
    index: tuple[Any, ...] = (chosen[0], slice(None), *chosen[1:])
    rows = windows[index]  # [positions, C_in, *kernel]
    return np.ascontiguousarray(rows).reshape(len(rows), layer.groups, layer.cols)


def _pads(window: Window, spatial: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Pads at the begin and the end of each spatial axis for this input size; negative ones cut off."""
    axes = range(len(spatial))
    if not window.output_shape and not window.auto_pad.startswith("SAME"):
        explicit = (0,) * 2 * len(spatial) if window.auto_pad == "VALID" else window.pads
        return explicit[: len(spatial)], explicit[len(spatial) :]
    extent = [(window.kernel[i] - 1) * window.dilations[i] + 1 for i in axes]
    if window.transposed:
        full = [window.strides[i] * (spatial[i] - 1) + window.output_padding[i] + extent[i] for i in axes]
        wanted = window.output_shape or [spatial[i] * window.strides[i] for i in axes]
        total = [full[i] - wanted[i] for i in axes]
    else:
        wanted = [-(-spatial[i] // window.strides[i]) for i in axes]
        total = [(wanted[i] - 1) * window.strides[i] + extent[i] - spatial[i] for i in axes]
    # With a stride above the kernel there is nothing to cut off; ONNX Runtime then gives the full output.
    small = tuple(max(t, 0) // 2 for t in total)
    large = tuple(max(t, 0) - max(t, 0) // 2 for t in total)
    # ONNX: SAME_UPPER puts the odd element of the total at the end, everything else at the begin.
    return (small, large) if window.auto_pad == "SAME_UPPER" else (large, small)


def _output_shape(window: Window, spatial: tuple[int, ...]) -> tuple[int, ...]:
    begins, ends = _pads(window, spatial)
    sizes = []
    for i, size in enumerate(spatial):
        extent = (window.kernel[i] - 1) * window.dilations[i] + 1
        if window.transposed:
            sizes.append(window.strides[i] * (size - 1) + window.output_padding[i] + extent - begins[i] - ends[i])
        else:
            sizes.append((size + begins[i] + ends[i] - extent) // window.strides[i] + 1)
    return tuple(sizes)
