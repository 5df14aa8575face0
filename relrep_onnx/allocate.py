"""Spreading one global budget over the layers: each allocator turns layers and a budget into zeros per layer.

An allocator proposes a way in which sparsity grows: a function from a level t in [0, 1] to a sparsity per layer, each rising with
t.  `settle` finds the level that meets the budget with every layer inside its bounds, and rounds to whole weights so that the
budget is met exactly.  So an allocator is a few lines, and none of them can miss the budget.

    uniform    s_l = t
    global     one threshold on saliency^2 / cost, over all weights (masks.saliency_for: magnitude that folding does not break)
    erk        density proportional to sum(dims) / prod(dims), capped at 1 (Evci et al. 2020)
    lamp       one threshold on w^2 / sum of the squares of all weights at least as large (Lee et al. 2021)
    rr         ERK density times RR at the asked sparsity: repairable layers give more (our rule; the paper's is not public)
    rr-curve   minimise sum_l c_l loss_l(s_l) under the budget, loss = -log(1 - residual / signal); c_l = damage_l / loss_l at the
               probe, so the sum estimates the error of the model's outputs.  Solved on the curves' convex hulls, cheapest damage
               per unit of budget first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from relrep_onnx.types import Array, Budget, BudgetError, ConfigError, FloatArray, Layer, ScoreCurve, Window

Growth = Callable[[float], FloatArray]
"""Level t in [0, 1] -> sparsity per layer, float64[layers], non-decreasing in t, from all zeros to all ones."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One layer as an allocator sees it.

    `weight` gives magnitudes, and both it and `saliency` what a weight matters as part of its block of the pattern; they are read
    when asked, for those of all layers may not fit in memory.  `cost` is what one weight counts in the budget's unit, `zeros` how
    many are zero already, `limit` the most the pattern allows, and `step` how many zeros come at a time.
    """

    layer: Layer
    weight: Callable[[], FloatArray]
    saliency: Callable[[], FloatArray]
    curve: ScoreCurve
    cost: float
    zeros: int
    limit: int
    step: int


DEAD: Final = 0.98
"""A layer with a larger share of noise counts as if it had this one."""
NOISELESS: Final = 1e-12
"""A loss at the probe below this is rounding, and says nothing about the damage that was measured."""

THIN: Final = 1 << 22
"""Scores of one layer that a threshold over all layers holds at most."""

Allocator = Callable[[Sequence[Candidate], Budget], Growth]


def allocate(allocator: Allocator, candidates: Sequence[Candidate], budget: Budget) -> dict[str, int]:
    """Zeros per layer, by layer name.

    Raises:
        BudgetError: the bounds make the budget impossible.
        ConfigError: a layer of the budget does not exist.
    """
    growth = allocator(candidates, budget)
    return settle(growth, candidates, budget)


def uniform(candidates: Sequence[Candidate], budget: Budget) -> Growth:
    """The same sparsity everywhere."""
    return lambda level: np.full(len(candidates), level)


def global_magnitude(candidates: Sequence[Candidate], budget: Budget) -> Growth:
    """One threshold on the saliency of all weights."""
    return _threshold(c.saliency() ** 2 / c.cost for c in candidates)


def lamp(candidates: Sequence[Candidate], budget: Budget) -> Growth:
    """Layer-adaptive magnitude: one threshold on w^2 over the sum of all squares at least as large."""

    def scores(candidate: Candidate) -> FloatArray:
        ascending = np.sort(candidate.weight() ** 2, axis=None)
        remaining = np.cumsum(ascending[::-1])[::-1]
        np.divide(ascending, remaining, out=ascending, where=remaining > 0)
        return np.asarray(ascending / candidate.cost)

    return _threshold(map(scores, candidates))


def erk(candidates: Sequence[Candidate], budget: Budget) -> Growth:
    """Erdos-Renyi-Kernel densities, capped at 1."""
    return _densities(np.array([_erk_factor(c.layer) for c in candidates]))


def rr(candidates: Sequence[Candidate], budget: Budget) -> Growth:
    """ERK densities times RR at the asked sparsity: a layer whose damage repair undoes keeps less."""
    repairability = np.array([c.curve.rr_at(budget.sparsity) for c in candidates])
    return _densities(np.array([_erk_factor(c.layer) for c in candidates]) * np.nan_to_num(repairability, nan=1.0))


def rr_curve(candidates: Sequence[Candidate], budget: Budget) -> Growth:
    """Least summed damage to the outputs: the cheapest per unit of budget goes first, on each curve's convex hull."""
    hulls = [_convex_hull(c.curve) for c in candidates]
    owner = np.concatenate([np.full(len(s) - 1, i) for i, (s, _) in enumerate(hulls)])
    width = np.concatenate([np.diff(s) for s, _ in hulls])
    damage = np.concatenate([np.diff(y) for _, y in hulls])
    final = np.concatenate([np.arange(1, len(s)) == len(s) - 1 for s, _ in hulls])
    cost = width * np.array([candidates[i].cost * candidates[i].layer.size for i in owner])
    # The last weights of every layer go after all others: no distortion of one layer tells what its death does to the network.
    order = np.lexsort((damage / cost, final))
    return _in_turn(owner[order], width[order], cost[order], len(candidates))


def whole_layers(allocator: Allocator) -> Allocator:
    """Layers one after the other, each to its limit, those first that the allocator prunes most at this budget.

    For patterns that a layer follows whole or not at all; one layer at most is left in between.
    """

    def whole(candidates: Sequence[Candidate], budget: Budget) -> Growth:
        costs = np.array([c.cost * c.layer.size for c in candidates])
        most = np.array([c.limit / c.layer.size for c in candidates])
        inner = allocator(candidates, budget)
        level = _bisect(lambda t: float(costs @ inner(t)), budget.sparsity * float(costs.sum()))[1]
        order = np.argsort(-inner(level) / most, kind="stable")
        return _in_turn(order, most[order], (costs * most)[order], len(candidates))

    return whole


def _in_turn(owner: Array, width: FloatArray, cost: FloatArray, layers: int) -> Growth:
    """Steps one after the other, each to its end: the layer it is of, the sparsity it adds there, what it costs."""
    ends, divisor = np.cumsum(cost), np.where(cost > 0, cost, 1.0)

    def growth(level: float) -> FloatArray:
        share = np.clip((level * ends[-1] - ends) / divisor + 1, 0.0, 1.0)
        return np.bincount(owner, weights=share * width, minlength=layers)

    return growth


def _bisect(rising: Callable[[float], float], goal: float) -> tuple[float, float]:
    """Neighbouring levels in [0, 1], the first below the goal, the second not."""
    below, above = 0.0, 1.0
    for _ in range(60):
        middle = (below + above) / 2
        if rising(middle) < goal:
            below = middle
        else:
            above = middle
    return below, above


def settle(growth: Growth, candidates: Sequence[Candidate], budget: Budget) -> dict[str, int]:
    """The zeros per layer at the level of growth that meets the budget, exactly; see `allocate`."""
    sizes = np.array([c.layer.size for c in candidates])
    costs = np.array([c.cost for c in candidates])
    steps = np.array([c.step for c in candidates])
    low, high, goal = _limits(candidates, budget, sizes, costs)

    def zeros(level: float) -> FloatArray:
        wanted = growth(level) * sizes
        # What is full is full, though the bound is no multiple of the step.
        rounded = np.where(wanted > high - 0.5, high, np.rint(wanted / steps) * steps)
        return np.asarray(np.clip(rounded, low, high), np.int64)

    below, above = _bisect(lambda level: float(costs @ zeros(level)), goal)
    # Several layers may gain a weight at the same level: take as many of them as the goal needs, in an order that never changes,
    # so that a higher goal never takes a zero away.
    least, most = zeros(below), zeros(above)
    counts = _approach(least, least, most, costs, steps, goal, math.floor)
    # Single steps close what is left: from below, from above with a layer that gains at this level, or, where costs differ, from
    # above with any layer.  The first of the closest.
    ways = [
        _approach(counts, low, high, costs, steps, goal, math.floor),
        _approach(counts, least, most, costs, steps, goal, math.ceil),
        _approach(counts, low, high, costs, steps, goal, math.ceil),
    ]
    counts = min(ways, key=lambda way: abs(goal - float(costs @ way)))
    return dict(zip((c.layer.name for c in candidates), counts.tolist(), strict=True))


def _approach(
    counts: FloatArray,
    low: FloatArray,
    high: FloatArray,
    costs: FloatArray,
    steps: FloatArray,
    goal: float,
    whole: Callable[[float], int],
) -> FloatArray:
    """Adds or takes whole steps within bounds, dearest layers first, so that the summed cost comes close to the goal.

    A layer that leaves a bound goes on to a multiple of its step.
    """
    counts = counts.copy()
    for i in np.argsort(-costs, kind="stable"):
        missing = (goal - float(costs @ counts)) / costs[i]
        if counts[i] + missing >= high[i]:
            counts[i] = high[i]
        elif whole(missing / steps[i]):
            beyond = counts[i] % steps[i]
            counts[i] += whole((missing + beyond) / steps[i]) * steps[i] - beyond
            counts[i] = np.clip(counts[i], low[i], high[i])
    return counts


def attainable(candidates: Sequence[Candidate], budget: Budget) -> tuple[float, float]:
    """The least and the most sparsity, in the budget's unit, that its bounds and the pattern allow; raises as `allocate`."""
    costs = np.array([c.cost for c in candidates])
    low, high = _bounds(candidates, budget)
    total = float(costs @ [c.layer.size for c in candidates])
    return float(costs @ low) / total, float(costs @ high) / total


def _bounds(candidates: Sequence[Candidate], budget: Budget) -> tuple[FloatArray, FloatArray]:
    """Fewest and most zeros of each layer, fractions of a weight included."""
    names, sizes = [c.layer.name for c in candidates], np.array([c.layer.size for c in candidates])
    unknown = sorted(set(budget.layers) - set(names))
    if unknown:
        raise ConfigError(f"no prunable layer is called {unknown[0]!r}; there are: {', '.join(sorted(names)[:5])}, ...")
    low = sizes * [budget.layers.get(name, budget.floor) for name in names]
    # Zeros that are there already count; where they exceed the goal there is nothing left to prune.
    limit, present = np.array([c.limit for c in candidates]), np.array([c.zeros for c in candidates])
    high = np.maximum(np.minimum(sizes * [budget.layers.get(name, budget.ceiling) for name in names], limit), present)
    for name, size, lowest, highest in zip(names, sizes, low, high, strict=True):
        if lowest > highest + 1e-9 * size:
            raise BudgetError(
                f"layer {name!r} cannot have a sparsity of {lowest / size:g}: the pattern allows {highest / size:.10g}"
            )
    return np.minimum(low, high), high


def _limits(
    candidates: Sequence[Candidate], budget: Budget, sizes: FloatArray, costs: FloatArray
) -> tuple[FloatArray, FloatArray, float]:
    """Fewest and most zeros of each layer, whole numbers, and what all zeros together should cost."""
    low, high = _bounds(candidates, budget)
    total = float(costs @ sizes)
    goal = budget.sparsity * total
    least, most = float(costs @ low), float(costs @ high)
    slack = 1e-9 * total  # rounding, and the digits the message leaves out
    if not least - slack <= goal <= most + slack:
        raise BudgetError(
            f"a sparsity of {budget.sparsity:g} of the {budget.unit} is not possible with these layer bounds and this pattern: "
            f"they allow {least / total:.10g} to {most / total:.10g}; give a --sparsity in between, or none with N:M"
        )
    goal = float(round(goal)) if budget.unit == "weights" else goal
    # Bounds are rounded to the nearest weight.  Where that shuts the goal out, each gives way by less than one weight.
    if costs @ np.rint(low) <= goal <= costs @ np.rint(high):
        low, high = np.rint(low), np.rint(high)
    else:
        low, high = np.floor(low), np.ceil(high)
    present = np.array([c.zeros for c in candidates])
    return np.maximum(low, present), np.maximum(high, present), goal


def _threshold(scores: Iterable[FloatArray]) -> Growth:
    """Sparsity per layer when the lowest fraction t of all scores goes, ties in layer order."""
    parts = [_thinned(layer) for layer in scores]
    owner = np.concatenate([np.full(len(values), i, np.int32) for i, (values, _) in enumerate(parts)])
    counts = np.concatenate([counts for _, counts in parts])
    order = np.argsort(np.concatenate([values for values, _ in parts]), kind="stable")
    owner, counts = owner[order], counts[order]
    ends = np.cumsum(counts)
    sizes = np.bincount(owner, counts)

    def growth(level: float) -> FloatArray:
        below = np.searchsorted(ends, round(level * ends[-1]), side="right")
        return np.asarray(np.bincount(owner[:below], counts[:below], minlength=len(sizes)) / sizes)

    return growth


def _thinned(scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """A layer's scores and how many weights each stands for: one, but for the largest layers' a run of neighbours in rank."""
    flat = scores.reshape(-1)
    if flat.size <= THIN:
        return flat, np.ones(flat.size, np.int64)
    ends = np.linspace(0, flat.size, THIN + 1).astype(np.int64)
    return np.sort(flat)[(ends[:-1] + ends[1:]) // 2], np.diff(ends)


def _densities(factors: FloatArray) -> Growth:
    """Density proportional to the factors, capped at 1: the scale runs from all layers full to all empty."""
    factors = np.maximum(factors, 1e-12 * factors.max() or 1.0)  # all zero: all alike
    largest = 1.0 / factors.min()
    smallest = 1e-12 / factors.max()

    def growth(level: float) -> FloatArray:
        # Geometric in t, so that the bisection resolves small and large scales alike.
        scale = largest * (smallest / largest) ** level * (level < 1.0)
        return np.asarray(1.0 - np.minimum(factors * scale, 1.0))

    return growth


def _erk_factor(layer: Layer) -> float:
    kernel = layer.view.kernel if isinstance(layer.view, Window) else ()
    dims = (layer.rows, layer.cols // int(np.prod(kernel, dtype=np.int64)), *kernel)
    return sum(dims) / float(np.prod(dims, dtype=np.float64))


def _convex_hull(curve: ScoreCurve) -> tuple[FloatArray, FloatArray]:
    """Lower convex hull of the weighted loss over sparsity, from (0, 0); the step to 1 stays a segment of its own."""
    loss = _loss(curve.residual, curve.signal)
    at_probe = float(_loss(np.array([curve.residual_at(curve.probe)]), curve.signal)[0]) if math.isfinite(curve.damage) else 0.0
    scale = curve.damage / at_probe if at_probe > NOISELESS else 1.0
    rising = np.maximum.accumulate(loss) * scale
    points = [(0.0, 0.0)]
    for s, y in zip(curve.sparsity.tolist(), rising.tolist(), strict=True):
        while s < 1.0 and len(points) > 1:
            (s0, y0), (s1, y1) = points[-2:]
            if (y1 - y0) * (s - s1) < (y - y1) * (s1 - s0):
                break
            points.pop()
        points.append((s, y))
    if points[-1][0] < 1.0:
        points.append((1.0, points[-1][1]))
    s_values, y_values = zip(*points, strict=True)
    return np.array(s_values), np.array(y_values)


def _loss(residual: FloatArray, signal: float) -> FloatArray:
    """-log of the share of a layer's signal that survives: shares multiply along a network, so these add up."""
    return np.asarray(-np.log1p(-np.minimum(residual / (signal or 1.0), DEAD)))


AUTO: Final = "auto"
"""In place of an allocator's name: try all that are worth it (`search.py`)."""

ALLOCATORS: Final[Mapping[str, Allocator]] = {
    "uniform": uniform,
    "global": global_magnitude,
    "erk": erk,
    "lamp": lamp,
    "rr": rr,
    "rr-curve": rr_curve,
}
