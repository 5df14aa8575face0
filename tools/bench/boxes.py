"""Boxes out of detectors' outputs, and how many of one model's another finds again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from tools.bench.data import Array

FOUND: Final = 0.3
"""A pixel of a text map above this belongs to a region."""
SURE: Final = 0.6
"""A region whose mean is below this does not count."""
LEAST: Final = 16
"""Nor does one of fewer pixels."""
STRIDES: Final = (8, 16, 32)
SCORE: Final = 0.1
OVERLAP: Final = 0.45
"""A box that overlaps a better one by more is the same thing."""


def regions(probabilities: Array) -> Array:
    """Bounding boxes float64[boxes, 4] of the connected regions of a text map float32[height, width]."""
    todo = {(int(y), int(x)) for y, x in np.argwhere(probabilities > FOUND)}
    boxes = []
    while todo:
        stack = [min(todo)]
        todo.discard(stack[0])
        pixels = []
        while stack:
            y, x = stack.pop()
            pixels.append((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in todo:
                    todo.discard(near)
                    stack.append(near)
        ys, xs = np.array(pixels).T
        if len(pixels) >= LEAST and probabilities[ys, xs].mean() >= SURE:
            boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return np.array(boxes, np.float64).reshape(-1, 4)


def yolox(output: Array, size: int) -> Array:
    """Boxes float64[boxes, 4] of a YOLOX head float32[cells, 5 + classes], those that overlap a better one left out."""
    grids, strides = [], []
    for stride in STRIDES:
        cells = size // stride
        ys, xs = np.mgrid[:cells, :cells]
        grids.append(np.stack([xs, ys], axis=-1).reshape(-1, 2))
        strides.append(np.full((cells * cells, 1), stride))
    grid, stride_of = np.concatenate(grids), np.concatenate(strides)
    centre, extent = (output[:, :2] + grid) * stride_of, np.exp(output[:, 2:4].astype(np.float64)) * stride_of
    score = output[:, 4] * output[:, 5:].max(axis=1)
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], axis=1)
    order = np.argsort(-score, kind="stable")
    kept: list[int] = []
    for i in order[score[order] > SCORE].tolist():
        if not kept or overlaps(boxes[i : i + 1], boxes[kept]).max() <= OVERLAP:
            kept.append(i)
    return boxes[kept]


def overlaps(left: Array, right: Array) -> Array:
    """Intersection over union of every pair: float64[left, right]."""
    near = np.maximum(left[:, None, :2], right[None, :, :2])
    far = np.minimum(left[:, None, 2:], right[None, :, 2:])
    shared = np.clip(far - near, 0, None).prod(axis=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (left, right)]
    return np.asarray(shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-12))


def agreement(pairs: Iterable[tuple[Array, Array]], least: float = 0.9) -> float:
    """The share (F1) of the boxes of two models that match one to one, best overlaps first."""
    matched = total = 0
    for left, right in pairs:
        total += len(left) + len(right)
        shared = overlaps(left, right)
        while shared.size and shared.max() >= least:
            i, j = np.unravel_index(shared.argmax(), shared.shape)
            shared[i, :] = shared[:, j] = 0.0
            matched += 2
    return matched / total if total else 1.0
