"""The points of a sweep, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """What is known of one point of a sweep; None where it was not measured, or the model's outputs do not allow it.

    `sparsity` and `macs_sparsity` are fractions of the prunable layers, `error` the relative L2 of the worst output, `agreement`
    top-1 with the dense model, `metric` the user's own, `size` and `gzip` bytes of the file in the asked form, `latency`
    milliseconds and `speedup` the dense model's in the same rounds over it.
    """

    sparsity: float
    macs_sparsity: float
    nonzeros: int
    macs: int
    error: float
    agreement: float | None = None
    metric: float | None = None
    size: int | None = None
    gzip: int | None = None
    latency: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Point:
    """One combination of settings, `name` after its folder; `failure` says why it has no figures."""

    name: str
    sparsity: float
    pattern: str
    allocate: str
    repair: str
    figures: Figures | None
    failure: str | None = None
