"""Allocators against their definitions, and what holds for every one of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relrep_onnx.allocate import ALLOCATORS, DEAD, Candidate, _thinned, allocate, whole_layers
from relrep_onnx.masks import pattern_named, unit_row_magnitude
from relrep_onnx.types import Budget, BudgetError, ConfigError, Contraction, FloatArray, Layer, ScoreCurve, Unit, Window

NAMES = ["uniform", "global", "erk", "lamp", "rr", "rr-curve"]
GRID = np.array([0.25, 0.5, 0.75, 0.9, 1.0])
SIGNAL = 4.0


def layer_of(name: str, rows: int, cols: int, kernel: tuple[int, ...] = ()) -> Layer:
    view = Window(kernel, (1,), (1,), (0, 0)) if kernel else Contraction(-1)
    return Layer(name, "Conv" if kernel else "Gemm", name, (rows, cols), rows, cols, 1, view, ())


def candidate(
    name: str,
    rows: int = 4,
    cols: int = 6,
    *,
    seed: int = 0,
    cost: float = 1.0,
    zeros: int = 0,
    limit: int | None = None,
    step: int = 1,
    kernel: tuple[int, ...] = (),
    residual: Sequence[float] = (0.1, 0.3, 0.8, 1.5, 4.0),
    damage: float = math.nan,
) -> Candidate:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=rows * cols)
    weight[rng.permutation(weight.size)[:zeros]] = 0.0
    weight = weight.reshape(rows, cols)
    curve = ScoreCurve(name, weight.size, SIGNAL, GRID, 2 * np.array(residual), np.array(residual), 0.5, damage)
    return Candidate(
        layer=layer_of(name, rows, cols, kernel),
        weight=lambda: np.abs(weight),
        saliency=lambda: unit_row_magnitude(weight),
        curve=curve,
        cost=cost,
        zeros=weight.size - int(np.count_nonzero(weight)),
        limit=weight.size if limit is None else limit,
        step=step,
    )


def cost_of(zeros: Mapping[str, int], candidates: Sequence[Candidate]) -> float:
    return sum(zeros[c.layer.name] * c.cost for c in candidates)


def total(candidates: Sequence[Candidate]) -> float:
    return sum(c.layer.size * c.cost for c in candidates)


@st.composite
def networks(draw: Any, *, macs: bool = False, present: bool = True) -> list[Candidate]:
    made = []
    for number in range(draw(st.integers(1, 5))):
        rows, cols = draw(st.integers(1, 9)), 4 * draw(st.integers(1, 6))
        steps = draw(st.lists(st.floats(0, 10), min_size=5, max_size=5))
        made.append(
            candidate(
                f"layer{number}",
                rows,
                cols,
                seed=draw(st.integers(0, 99)),
                cost=draw(st.sampled_from([1.0, 2.5, 9.0, 16.0, 196.0])) if macs else 1.0,
                zeros=draw(st.sampled_from([0, 0, 1, rows * cols // 3, rows * cols])) if present else 0,
                kernel=draw(st.sampled_from([(), (2, 2)])),
                residual=np.cumsum(steps).tolist(),
                damage=draw(st.sampled_from([math.nan, math.inf, 0.0, 0.01, 3.0])),
            )
        )
    return made


@st.composite
def budgets(draw: Any, candidates: Sequence[Candidate], unit: Unit = "weights") -> Budget:
    ends = sorted([draw(st.floats(0, 1)), draw(st.floats(0, 1))])
    floor, ceiling = draw(st.sampled_from([(0.0, 1.0), (0.0, ends[1]), (ends[0], 1.0), tuple(ends), (ends[0], ends[0])]))
    fixed = {c.layer.name: draw(st.floats(0, 1)) for c in candidates if draw(st.integers(0, 3)) == 0}
    sparsity = draw(st.floats(0, 1) | st.sampled_from([0.0, 1.0, floor, ceiling]))
    return Budget(sparsity, unit, floor, ceiling, fixed)


def bounds(c: Candidate, budget: Budget) -> tuple[float, float]:
    """The layer's bounds in weights; zeros that are there already stay."""
    low = budget.layers.get(c.layer.name, budget.floor) * c.layer.size
    high = min(budget.layers.get(c.layer.name, budget.ceiling) * c.layer.size, c.limit)
    return max(low, c.zeros), max(high, c.zeros)


def check_bounds(zeros: Mapping[str, int], candidates: Sequence[Candidate], budget: Budget) -> None:
    assert zeros.keys() == {c.layer.name for c in candidates}
    for c in candidates:
        low, high = bounds(c, budget)
        assert math.floor(low) <= zeros[c.layer.name] <= math.ceil(high)  # less than a weight beyond
        assert c.zeros <= zeros[c.layer.name] <= max(c.limit, c.zeros)


def possible(candidates: Sequence[Candidate], budget: Budget) -> tuple[float, float]:
    """The least and the most that may be asked for; too many zeros that are there already do no harm."""
    low = sum(budget.layers.get(c.layer.name, budget.floor) * c.layer.size * c.cost for c in candidates)
    high = sum(bounds(c, budget)[1] * c.cost for c in candidates)
    return low / total(candidates), high / total(candidates)


def test_the_table_holds_all_allocators() -> None:
    assert list(ALLOCATORS) == NAMES


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_weights_are_met_exactly(name: str, data: st.DataObject) -> None:
    candidates = data.draw(networks())
    budget = data.draw(budgets(candidates))
    low, high = possible(candidates, budget)
    if not low - 1e-9 <= budget.sparsity <= high + 1e-9:
        with pytest.raises(BudgetError):
            allocate(ALLOCATORS[name], candidates, budget)
        return
    zeros = allocate(ALLOCATORS[name], candidates, budget)
    check_bounds(zeros, candidates, budget)
    goal = round(budget.sparsity * total(candidates))
    least = sum(bounds(c, budget)[0] for c in candidates)
    if least <= goal:
        # Where zeros that are there already lift a bound, rounding that layer's own bound may cost a weight each.
        slack = sum(c.zeros > 0 for c in candidates) if least > goal - len(candidates) else 0
        assert goal <= sum(zeros.values()) <= goal + slack
    else:
        assert sum(zeros.values()) <= least + len(candidates)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_macs_are_met_within_a_weight(name: str, data: st.DataObject) -> None:
    candidates = data.draw(networks(macs=True, present=False))
    budget = data.draw(budgets(candidates, "macs"))
    low, high = possible(candidates, budget)
    if not low - 1e-9 <= budget.sparsity <= high + 1e-9:
        with pytest.raises(BudgetError):
            allocate(ALLOCATORS[name], candidates, budget)
        return
    zeros = allocate(ALLOCATORS[name], candidates, budget)
    check_bounds(zeros, candidates, budget)
    gap = abs(cost_of(zeros, candidates) - budget.sparsity * total(candidates))
    assert gap <= sum(c.cost for c in candidates)  # rounded bounds can shut the goal out in every layer
    if not budget.layers and (budget.floor, budget.ceiling) == (0.0, 1.0):
        assert gap <= max(c.cost for c in candidates)
        cheapest = min(candidates, key=lambda c: c.cost)
        if 0 < zeros[cheapest.layer.name] < cheapest.layer.size:
            assert gap <= cheapest.cost


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(sparsity=st.floats(0, 1), costs=st.lists(st.sampled_from([1.0, 3.0, 49.0, 196.0]), min_size=3, max_size=3))
def test_macs_of_layers_of_some_size(name: str, sparsity: float, costs: list[float]) -> None:
    candidates = [candidate(f"l{i}", 16, 40 + 8 * i, seed=i, cost=cost) for i, cost in enumerate(costs)]
    zeros = allocate(ALLOCATORS[name], candidates, Budget(sparsity, "macs"))
    assert abs(cost_of(zeros, candidates) - sparsity * total(candidates)) <= min(costs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit", ["weights", "macs"])
def test_nothing_and_everything(name: str, unit: Unit) -> None:
    candidates = [candidate("a", cost=1.0), candidate("b", 7, 8, seed=1, cost=1.0 if unit == "weights" else 9.0)]
    assert allocate(ALLOCATORS[name], candidates, Budget(0.0, unit)) == {"a": 0, "b": 0}
    assert allocate(ALLOCATORS[name], candidates, Budget(1.0, unit)) == {"a": 24, "b": 56}


@pytest.mark.parametrize("name", NAMES)
def test_zeros_that_are_there_count(name: str) -> None:
    candidates = [candidate("a", zeros=20), candidate("b", seed=1)]
    half = allocate(ALLOCATORS[name], candidates, Budget(0.5))
    assert half["a"] >= 20
    assert sum(half.values()) == 24
    assert allocate(ALLOCATORS[name], candidates, Budget(0.25)) == {"a": 20, "b": 0}


def test_zeros_beyond_a_ceiling_widen_what_is_possible() -> None:
    candidates = [candidate("a", zeros=24), candidate("b", seed=1)]
    assert allocate(ALLOCATORS["uniform"], candidates, Budget(0.7, ceiling=0.5)) == {"a": 24, "b": 10}
    with pytest.raises(BudgetError, match=r"they allow 0 to 0\.75; give"):
        allocate(ALLOCATORS["uniform"], candidates, Budget(0.8, ceiling=0.5))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_an_impossible_budget_says_what_is_possible(data: st.DataObject) -> None:
    candidates = data.draw(networks())
    budget = data.draw(budgets(candidates))
    low, high = possible(candidates, budget)
    if low - 1e-8 <= budget.sparsity <= high + 1e-8:
        return
    with pytest.raises(BudgetError) as caught:
        allocate(ALLOCATORS["uniform"], candidates, budget)
    found = re.search(r"they allow ([\d.e-]+) to ([\d.e-]+); give", str(caught.value))
    assert found is not None
    stated = [float(end) for end in found.groups()]
    assert stated == pytest.approx([low, high], abs=1e-9)
    for end in stated:
        check_bounds(allocate(ALLOCATORS["uniform"], candidates, dataclasses.replace(budget, sparsity=end)), candidates, budget)


@pytest.mark.parametrize("sparsity", [0.35, 0.5, 0.8, 0.29])
def test_bounds_that_leave_no_room_but_rounding(sparsity: float) -> None:
    """Every layer fixed to the sparsity asked for, in layers that it does not divide."""
    candidates = [candidate(f"l{i}", 3, 1, seed=i) for i in range(20)]
    for budget in (
        Budget(sparsity, floor=sparsity),
        Budget(sparsity, ceiling=sparsity),
        Budget(sparsity, layers={f"l{i}": sparsity for i in range(20)}),
    ):
        zeros = allocate(ALLOCATORS["uniform"], candidates, budget)
        assert sum(zeros.values()) == round(sparsity * 60)
        check_bounds(zeros, candidates, budget)


def test_a_fixed_layer_gets_its_sparsity() -> None:
    candidates = [candidate("a", 10, 10), candidate("b", 10, 10, seed=1), candidate("c", 10, 10, seed=2)]
    for name in NAMES:
        zeros = allocate(ALLOCATORS[name], candidates, Budget(0.6, ceiling=0.8, layers={"b": 0.95}))
        assert zeros["b"] == 95
        assert sum(zeros.values()) == 180
        assert max(zeros["a"], zeros["c"]) <= 80


def test_an_unknown_layer() -> None:
    with pytest.raises(ConfigError, match=r"no prunable layer is called 'z'; there are: a, b"):
        allocate(ALLOCATORS["uniform"], [candidate("a"), candidate("b")], Budget(0.5, layers={"z": 0.5, "a": 0.1}))


@pytest.mark.parametrize("name", ["uniform", "erk", "global", "lamp"])
@settings(deadline=None, max_examples=12)
@given(candidates=networks())
def test_more_sparsity_never_takes_a_zero_away(name: str, candidates: list[Candidate]) -> None:
    steps = [allocate(ALLOCATORS[name], candidates, Budget(s)) for s in np.linspace(0, 1, 25).tolist()]
    for fewer, more in itertools.pairwise(steps):
        assert all(fewer[layer] <= more[layer] for layer in fewer)


@settings(deadline=None, max_examples=40)
@given(candidates=networks(present=False), sparsity=st.floats(0, 1))
def test_uniform_is_the_same_everywhere(candidates: list[Candidate], sparsity: float) -> None:
    zeros = allocate(ALLOCATORS["uniform"], candidates, Budget(sparsity))
    for c in candidates:
        assert abs(zeros[c.layer.name] - sparsity * c.layer.size) <= len(candidates) / 2 + 1


def lowest(scores: Mapping[str, FloatArray], count: int) -> dict[str, int]:
    """How many of the `count` lowest of all scores each layer holds."""
    everything = sorted((value, name) for name, layer in scores.items() for value in layer.reshape(-1).tolist())
    chosen = [name for _, name in everything[:count]]
    return {name: chosen.count(name) for name in scores}


@settings(deadline=None, max_examples=40)
@given(candidates=networks(), sparsity=st.floats(0, 1))
def test_global_drops_the_lowest_saliencies(candidates: list[Candidate], sparsity: float) -> None:
    present, goal = sum(c.zeros for c in candidates), round(sparsity * total(candidates))
    zeros = allocate(ALLOCATORS["global"], candidates, Budget(sparsity))
    assert zeros == lowest({c.layer.name: c.saliency() for c in candidates}, max(goal, present))


def test_global_weighs_the_saliency_by_cost() -> None:
    candidates = [candidate("a", cost=1.0), candidate("b", cost=3.0)]  # the same weights
    zeros = allocate(ALLOCATORS["global"], candidates, Budget(0.5, "macs"))
    scores = {c.layer.name: c.saliency() ** 2 / c.cost for c in candidates}
    assert zeros == lowest(scores, sum(zeros.values()))
    assert cost_of(zeros, candidates) == 48


def lamp_scores(weight: FloatArray) -> FloatArray:
    """Lee et al. 2021, as it is written: w_u^2 over the sum of w_v^2 for all v from u on in ascending order."""
    squares = sorted((weight.reshape(-1) ** 2).tolist())
    return np.array([w / math.fsum(squares[u:]) if w > 0 else 0.0 for u, w in enumerate(squares)])


@settings(deadline=None, max_examples=40)
@given(candidates=networks(), sparsity=st.floats(0, 1))
def test_lamp_is_the_papers(candidates: list[Candidate], sparsity: float) -> None:
    present, goal = sum(c.zeros for c in candidates), round(sparsity * total(candidates))
    zeros = allocate(ALLOCATORS["lamp"], candidates, Budget(sparsity))
    last = sum(1 for c in candidates if c.zeros < c.layer.size)  # the largest weight of each layer scores 1: ties
    if max(goal, present) <= total(candidates) - last:
        assert zeros == lowest({c.layer.name: lamp_scores(c.weight()) for c in candidates}, max(goal, present))
    assert sum(zeros.values()) == max(goal, present)


def erk_zeros(factors: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """The usual solver: scale all factors to the budget, make those above 1 dense, and start again with the others."""
    dense: set[int] = set()
    while True:
        left = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        others = [i for i in range(len(sizes)) if i not in dense]
        scale = left / sum(factors[i] * sizes[i] for i in others) if others else 0.0
        above = {i for i in others if factors[i] * scale > 1}
        if not above:
            return [0.0 if i in dense else sizes[i] * (1 - scale * factors[i]) for i in range(len(sizes))]
        dense |= above


@settings(deadline=None, max_examples=40)
@given(candidates=networks(present=False), sparsity=st.floats(0.01, 0.99))
def test_erk_is_the_usual_solver(candidates: list[Candidate], sparsity: float) -> None:
    factors = []
    for c in candidates:
        kernel = (2, 2) if c.layer.op == "Conv" else ()
        dims = (c.layer.rows, c.layer.cols // (4 if kernel else 1), *kernel)
        factors.append(sum(dims) / math.prod(dims))
    zeros = allocate(ALLOCATORS["erk"], candidates, Budget(sparsity))
    expected = erk_zeros(factors, [c.layer.size for c in candidates], sparsity)
    for c, count in zip(candidates, expected, strict=True):
        assert abs(zeros[c.layer.name] - count) <= len(candidates) / 2 + 0.51


def scored(name: str, raw: float, residual: float) -> Candidate:
    c = candidate(name, 10, 10)
    curve = ScoreCurve(name, 100, 1.0, np.array([0.5, 1.0]), np.array([raw, raw]), np.array([residual, residual]))
    return dataclasses.replace(c, curve=curve)


def test_rr_weighs_erk_by_repairability() -> None:
    zeros = allocate(ALLOCATORS["rr"], [scored("a", 1.0, 0.2), scored("b", 1.0, 0.6)], Budget(0.6))
    assert zeros == {"a": 80, "b": 40}  # densities 0.2 and 0.6
    undefined = allocate(ALLOCATORS["rr"], [scored("a", 0.0, 0.0), scored("b", 1.0, 0.5)], Budget(0.7))
    assert undefined == {"a": 60, "b": 80}  # counts as 1


def test_rr_of_layers_that_repair_mends_fully() -> None:
    """RR = 0 leaves the others dense while there is anything to take, and then they share by their own factors."""
    layers = [scored("a", 1.0, 0.0), scored("b", 1.0, 0.5), scored("c", 1.0, 0.5)]
    assert allocate(ALLOCATORS["rr"], layers, Budget(0.3)) == {"a": 90, "b": 0, "c": 0}
    assert allocate(ALLOCATORS["rr"], layers, Budget(0.8)) == {"a": 100, "b": 70, "c": 70}
    assert allocate(ALLOCATORS["rr"], [scored(n, 1.0, 0.0) for n in "ab"], Budget(0.6)) == {"a": 60, "b": 60}


def losses(c: Candidate) -> FloatArray:
    """What a layer loses at the points of its curve, in rr-curve's own terms before it weighs the layers."""
    return np.array([-math.log(1 - min(r / SIGNAL, DEAD)) for r in c.curve.residual.tolist()])


def weighted(c: Candidate, zeros: int) -> float:
    """What pruning a layer costs in rr-curve's own terms, straight between the points of its curve."""
    loss = float(np.interp(zeros / c.layer.size, [0.0, *GRID], [0.0, *losses(c)]))
    at_probe = float(losses(c)[GRID.tolist().index(c.curve.probe)])
    return loss if math.isnan(c.curve.damage) else c.curve.damage / at_probe * loss


def convex(name: str, seed: int, cost: float, *, rows: int = 4, measured: bool = True) -> Candidate:
    """The loss is convex, so that the allocation by steepness is the optimum."""
    rng = np.random.default_rng(seed)
    slopes = np.sort(rng.uniform(0.1, 4, size=4))
    surviving = np.exp(-np.cumsum(slopes * np.diff(GRID[:4], prepend=0.0)))
    residual = np.append(SIGNAL * (1 - surviving), 1e6)  # nobody prunes a layer away
    damage = float(rng.uniform(0.1, 3)) if measured else math.nan
    return candidate(name, rows, 5, seed=seed, cost=cost, residual=residual.tolist(), damage=damage)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 9999), sparsity=st.floats(0.05, 0.88), bounded=st.booleans(), measured=st.booleans())
def test_rr_curve_is_the_optimum_in_weights(seed: int, sparsity: float, bounded: bool, measured: bool) -> None:
    candidates = [convex(name, seed + i, 1.0, measured=measured) for i, name in enumerate("abc")]
    low, high = (1, 18) if not bounded or sparsity > 0.7 else (2, 15)
    goal = round(sparsity * 60)
    if not 3 * low <= 60 * sparsity <= 3 * high:
        return
    zeros = allocate(ALLOCATORS["rr-curve"], candidates, Budget(sparsity, floor=low / 20, ceiling=high / 20))
    choices = itertools.product(range(low, high + 1), repeat=3)
    best = min(sum(weighted(c, n) for c, n in zip(candidates, ns, strict=True)) for ns in choices if sum(ns) == goal)
    reached = sum(weighted(c, zeros[c.layer.name]) for c in candidates)
    assert sum(zeros.values()) == goal
    # A corner of a curve need not fall on a whole weight: the optimum over whole weights is met up to one weight's rise.
    assert reached <= 1.01 * best + 1e-12


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 9999), sparsity=st.floats(0.1, 0.85))
def test_rr_curve_is_the_optimum_in_macs(seed: int, sparsity: float) -> None:
    costs = {"a": 1.0, "b": 3.0, "c": 7.0}
    candidates = [convex(name, seed + i, cost, rows=40) for i, (name, cost) in enumerate(costs.items())]
    zeros = allocate(ALLOCATORS["rr-curve"], candidates, Budget(sparsity, "macs", ceiling=0.9))
    spent = cost_of(zeros, candidates)
    reached = sum(weighted(c, zeros[c.layer.name]) for c in candidates)
    # The convex relaxation at the same cost is a lower bound of every allocation: the best mix of single segments.
    rises = []
    for c in candidates:
        values = [weighted(c, n) for n in range(181)]
        rises += [((after - before) / c.cost, c.cost) for before, after in itertools.pairwise(values)]
    bound, left = 0.0, spent
    for rise, cost in sorted(rises):
        taken = min(cost, left)
        bound, left = bound + rise * taken, left - taken
    # What a whole weight of the dearest layer leaves is met with weights of the cheaper ones, however steep they are.
    assert reached <= bound + max(costs.values()) * max(rise for rise, _ in rises) + 1e-12


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 9999), cuts=st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_without_measured_damage_rr_curve_keeps_the_largest_product_of_surviving_shares(seed: int, cuts: list[int]) -> None:
    """Whole quarters, so that every choice is a point of the curves."""
    candidates = [convex(name, seed + i, 1.0, measured=False) for i, name in enumerate("abc")]
    surviving = [[1.0, *(1 - c.curve.residual / SIGNAL).tolist()] for c in candidates]
    choices = [ns for ns in itertools.product(range(4), repeat=3) if sum(ns) == sum(cuts)]
    best = max(math.prod(shares[n] for shares, n in zip(surviving, ns, strict=True)) for ns in choices)
    zeros = allocate(ALLOCATORS["rr-curve"], candidates, Budget(sum(cuts) / 12, ceiling=0.75))
    reached = [zeros[c.layer.name] // 5 for c in candidates]
    assert {n % 5 for n in zeros.values()} == {0}
    assert math.prod(shares[n] for shares, n in zip(surviving, reached, strict=True)) == pytest.approx(best, rel=1e-9)


def test_rr_curve_counts_no_layer_as_worse_than_dead() -> None:
    """Past a share of noise of 98 % it does not matter by how much."""
    few, many = [candidate("a", residual=(1.0, 2.0, 3.0, over, over)) for over in (3.92, 4e6)]
    other = candidate("b", seed=1, residual=(0.5, 1.5, 3.5, 3.8, 3.9))
    for sparsity in np.linspace(0, 1, 15).tolist():
        zeros = [allocate(ALLOCATORS["rr-curve"], [first, other], Budget(sparsity)) for first in (few, many)]
        assert zeros[0] == zeros[1]


def test_rr_curve_prunes_no_layer_away_while_others_have_weights() -> None:
    free = candidate("free", 10, 10, residual=(0.0, 0.0, 0.0, 0.0, 0.0), damage=0.0)
    dear = candidate("dear", 10, 10, residual=(1.0, 2.0, 3.0, 4.0, 5.0), damage=1.0)
    assert allocate(ALLOCATORS["rr-curve"], [free, dear], Budget(0.5)) == {"free": 90, "dear": 10}
    assert allocate(ALLOCATORS["rr-curve"], [free, dear], Budget(0.9)) == {"free": 90, "dear": 90}
    assert allocate(ALLOCATORS["rr-curve"], [free, dear], Budget(0.95)) == {"free": 100, "dear": 90}


def test_rr_curve_weighs_layers_by_their_measured_damage() -> None:
    harmless, harmful = candidate("harmless", damage=0.01), candidate("harmful", damage=1.0)
    zeros = allocate(ALLOCATORS["rr-curve"], [harmful, harmless], Budget(0.4))
    assert zeros["harmless"] > zeros["harmful"]


def test_rr_curve_takes_the_hull_of_a_curve_that_falls() -> None:
    bumpy = candidate("bumpy", 10, 10, residual=(3.0, 1.0, 2.0, 1.5, 9.0), damage=1.0)
    zeros = allocate(ALLOCATORS["rr-curve"], [bumpy, candidate("b", 10, 10, seed=1, damage=1.0)], Budget(0.5))
    assert sum(zeros.values()) == 100


@st.composite
def stepped(draw: Any, *, present: bool = False) -> list[Candidate]:
    """Networks whose layers take zeros some at a time, up to a limit that need not be a multiple."""
    made = []
    for c in draw(networks(present=present)):
        limit = draw(st.sampled_from([c.layer.size, c.layer.size, c.layer.size // 2, 3 * c.layer.size // 4 + 1, 1]))
        made.append(dataclasses.replace(c, limit=min(limit, c.layer.size), step=draw(st.sampled_from([1, 2, 3, 4, 4, 8]))))
    return made


def check_steps(zeros: Mapping[str, int], candidates: Sequence[Candidate], budget: Budget) -> None:
    for c in candidates:
        rounded = [side(bound) for side in (math.floor, math.ceil) for bound in bounds(c, budget)]
        assert zeros[c.layer.name] % c.step == 0 or zeros[c.layer.name] in rounded


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_weights_are_met_within_a_step(name: str, data: st.DataObject) -> None:
    candidates = data.draw(stepped())
    budget = data.draw(budgets(candidates))
    low, high = possible(candidates, budget)
    contradictory = any(least > most for least, most in (bounds(c, budget) for c in candidates))
    if contradictory or not low - 1e-9 <= budget.sparsity <= high + 1e-9:
        with pytest.raises(BudgetError):
            allocate(ALLOCATORS[name], candidates, budget)
        return
    zeros = allocate(ALLOCATORS[name], candidates, budget)
    check_bounds(zeros, candidates, budget)
    check_steps(zeros, candidates, budget)
    assert abs(sum(zeros.values()) - round(budget.sparsity * total(candidates))) < max(c.step for c in candidates)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(candidates=stepped(present=True), share=st.floats(0, 1))
def test_steps_go_on_from_zeros_that_are_there(name: str, candidates: list[Candidate], share: float) -> None:
    least, most = sum(c.zeros for c in candidates), sum(max(c.limit, c.zeros) for c in candidates)
    goal = least + round(share * (most - least))
    budget = Budget(goal / total(candidates))
    zeros = allocate(ALLOCATORS[name], candidates, budget)
    check_bounds(zeros, candidates, budget)
    check_steps(zeros, candidates, budget)
    assert abs(sum(zeros.values()) - goal) < max(c.step for c in candidates)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=20)
@given(sparsity=st.floats(0, 1), costs=st.lists(st.sampled_from([1.0, 3.0, 49.0, 196.0]), min_size=3, max_size=3))
def test_macs_are_met_within_a_step(name: str, sparsity: float, costs: list[float]) -> None:
    candidates = [candidate(f"l{i}", 32, 40 + 8 * i, seed=i, cost=cost, step=4) for i, cost in enumerate(costs)]
    zeros = allocate(ALLOCATORS[name], candidates, Budget(sparsity, "macs"))
    assert {count % 4 for count in zeros.values()} == {0}
    assert abs(cost_of(zeros, candidates) - sparsity * total(candidates)) <= 4 * min(costs)


def test_full_layers_are_full_though_no_multiple_of_the_step() -> None:
    candidates = [candidate("a", 3, 7, step=4), candidate("b", 5, 9, seed=1, step=4, limit=42)]
    for name in NAMES:
        assert allocate(ALLOCATORS[name], candidates, Budget(63 / 66)) == {"a": 21, "b": 42}


def test_the_pattern_limits_what_is_possible() -> None:
    candidates = [candidate("a", limit=12), candidate("b", seed=1, limit=6)]
    for name in NAMES:
        assert allocate(ALLOCATORS[name], candidates, Budget(18 / 48)) == {"a": 12, "b": 6}
        with pytest.raises(BudgetError, match=r"these layer bounds and this pattern: they allow 0 to 0\.375; give"):
            allocate(ALLOCATORS[name], candidates, Budget(19 / 48))
    with pytest.raises(BudgetError, match=r"they allow 0\.25 to 0\.375; give"):
        allocate(ALLOCATORS["uniform"], candidates, Budget(0.4, floor=0.25))
    assert allocate(ALLOCATORS["uniform"], candidates, Budget(0.25, ceiling=0.25)) == {"a": 6, "b": 6}


def test_no_layer_can_be_asked_for_more_than_the_pattern_allows() -> None:
    candidates = [candidate("a", limit=12), candidate("b", seed=1, limit=6)]
    assert allocate(ALLOCATORS["uniform"], candidates, Budget(0.25, layers={"a": 0.5})) == {"a": 12, "b": 0}
    for sparsity in (0.25, 0.3):
        with pytest.raises(BudgetError, match=r"^layer 'a' cannot have a sparsity of 0\.75: the pattern allows 0\.5$"):
            allocate(ALLOCATORS["uniform"], candidates, Budget(sparsity, layers={"a": 0.75}))
        with pytest.raises(BudgetError, match=r"^layer 'b' cannot have a sparsity of 0\.3: the pattern allows 0\.25$"):
            allocate(ALLOCATORS["uniform"], candidates, Budget(sparsity, floor=0.3))
    # Unless its zeros are there already.
    full = candidate("a", limit=12, zeros=20)
    assert allocate(ALLOCATORS["uniform"], [full, candidates[1]], Budget(0.5, floor=0.25, layers={"a": 0.75})) == {
        "a": 20,
        "b": 6,
    }


def test_zeros_beyond_the_limit_stay() -> None:
    candidates = [candidate("a", zeros=20, limit=12), candidate("b", seed=1, limit=12)]
    for name in NAMES:
        assert allocate(ALLOCATORS[name], candidates, Budget(0.5)) == {"a": 20, "b": 4}


def selective(pattern: str, name: str, rows: int, channels: int, *, kernel: tuple[int, ...] = (), **more: Any) -> Candidate:
    """A layer as N:M allows it: channels left over may make the limit no multiple of the step."""
    c = candidate(name, rows, channels * math.prod(kernel), kernel=kernel, **more)
    return dataclasses.replace(c, limit=pattern_named(pattern).limit(c.layer), step=pattern_named(pattern).step)


@st.composite
def selective_networks(draw: Any) -> list[Candidate]:
    pattern = draw(st.sampled_from(["2:4", "1:4", "1:8", "3:7", "4:5"]))
    width = int(pattern.split(":")[1])
    return [
        selective(
            pattern,
            f"layer{number}",
            draw(st.integers(1, 6)),
            draw(st.integers(width, 3 * width)),
            kernel=draw(st.sampled_from([(), (2, 2)])),
            seed=draw(st.integers(0, 99)),
            residual=np.cumsum(draw(st.lists(st.floats(0, 2), min_size=5, max_size=5))).tolist(),
            damage=draw(st.sampled_from([math.nan, 0.01, 3.0])),
        )
        for number in range(draw(st.integers(1, 5)))
    ]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=20)
@given(candidates=selective_networks(), share=st.floats(0, 1))
def test_layers_are_pruned_whole_one_after_the_other(name: str, candidates: list[Candidate], share: float) -> None:
    budget = Budget(share * sum(c.limit for c in candidates) / total(candidates))
    zeros = allocate(whole_layers(ALLOCATORS[name]), candidates, budget)
    check_bounds(zeros, candidates, budget)
    check_steps(zeros, candidates, budget)
    assert abs(sum(zeros.values()) - round(budget.sparsity * total(candidates))) < candidates[0].step
    assert sum(0 < zeros[c.layer.name] < c.limit for c in candidates) <= 1
    # Those go first that the allocator itself prunes most, measured by what the pattern lets them give.
    free = [dataclasses.replace(c, limit=c.layer.size, step=1) for c in candidates]
    inner = allocate(ALLOCATORS[name], free, budget)
    for first, then in itertools.permutations(candidates, 2):
        doubt = (len(candidates) + 1) * (1 / first.limit + 1 / then.limit)  # the allocation is rounded to weights
        if inner[first.layer.name] / first.limit > inner[then.layer.name] / then.limit + doubt and zeros[then.layer.name]:
            assert zeros[first.layer.name] == first.limit


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=10)
@given(candidates=selective_networks())
def test_whole_layers_take_all_that_the_pattern_allows_or_nothing(name: str, candidates: list[Candidate]) -> None:
    most = sum(c.limit for c in candidates) / total(candidates)
    rule = whole_layers(ALLOCATORS[name])
    assert allocate(rule, candidates, Budget(most)) == {c.layer.name: c.limit for c in candidates}
    assert allocate(rule, candidates, Budget(0.0)) == {c.layer.name: 0 for c in candidates}
    if most < 0.99:
        with pytest.raises(BudgetError, match="this pattern"):
            allocate(rule, candidates, Budget(most + 0.01))


def test_whole_layers_follow_the_allocator() -> None:
    spared = (1.0, 2.0, 3.0, 3.5, 4.0)
    candidates = [
        selective("2:4", "dear", 4, 8, residual=spared, damage=2.0),
        selective("2:4", "cheap", 4, 8, residual=spared, damage=0.02),
        selective("2:4", "middling", 4, 8, residual=spared, damage=0.2),
    ]
    rule = whole_layers(ALLOCATORS["rr-curve"])
    assert allocate(rule, candidates, Budget(16 / 96)) == {"dear": 0, "cheap": 16, "middling": 0}
    assert allocate(rule, candidates, Budget(30 / 96)) == {"dear": 0, "cheap": 16, "middling": 14}
    assert allocate(rule, candidates, Budget(40 / 96)) == {"dear": 8, "cheap": 16, "middling": 16}
    # Alike, they go in their own order; and a layer that must stay dense does.
    alike = whole_layers(ALLOCATORS["uniform"])
    assert allocate(alike, candidates, Budget(20 / 96)) == {"dear": 16, "cheap": 4, "middling": 0}
    assert allocate(alike, candidates, Budget(20 / 96, layers={"dear": 0.0})) == {"dear": 0, "cheap": 16, "middling": 4}


def test_whole_layers_leave_no_second_layer_in_between() -> None:
    # 1:4 takes three at a time: a budget of two more than the first layer has goes to the second, not to the third.
    candidates = [selective("1:4", name, 1, 8, damage=damage) for name, damage in (("c", 3.0), ("a", 0.01), ("b", 0.1))]
    rule = whole_layers(ALLOCATORS["rr-curve"])
    assert allocate(rule, candidates, Budget(8 / 24)) == {"c": 0, "a": 6, "b": 3}
    assert allocate(rule, candidates, Budget(11 / 24)) == {"c": 0, "a": 6, "b": 6}
    # Two channels left over give one more each: 7 is no multiple of three.
    candidates = [selective("1:4", name, 1, 10, damage=damage) for name, damage in (("c", 3.0), ("a", 0.01), ("b", 0.1))]
    assert allocate(rule, candidates, Budget(7 / 30)) == {"c": 0, "a": 7, "b": 0}
    assert allocate(rule, candidates, Budget(10 / 30)) == {"c": 0, "a": 7, "b": 3}
    assert allocate(rule, candidates, Budget(17 / 30)) == {"c": 3, "a": 7, "b": 7}


@settings(deadline=None, max_examples=15)
@given(candidates=selective_networks(), share=st.floats(0, 1), cost=st.sampled_from([3.0, 49.0]))
def test_whole_layers_in_macs(candidates: list[Candidate], share: float, cost: float) -> None:
    candidates = [dataclasses.replace(c, cost=cost if i % 2 else 1.0) for i, c in enumerate(candidates)]
    budget = Budget(share * sum(c.limit * c.cost for c in candidates) / total(candidates), "macs")
    zeros = allocate(whole_layers(ALLOCATORS["global"]), candidates, budget)
    check_bounds(zeros, candidates, budget)
    gap = abs(cost_of(zeros, candidates) - budget.sparsity * total(candidates))
    assert gap <= max(c.cost * c.step for c in candidates)


def test_lamp_does_not_see_the_scale_of_a_layer() -> None:
    candidates = [candidate("a"), candidate("b", seed=1), candidate("c", 2, 5, seed=2)]
    scaled = [
        dataclasses.replace(c, weight=partial(lambda weight, scale: scale * weight(), c.weight, scale))
        for c, scale in zip(candidates, (1e-3, 1.0, 1e3), strict=True)
    ]
    for sparsity in (0.2, 0.5, 0.8):
        budget = Budget(sparsity)
        assert allocate(ALLOCATORS["lamp"], scaled, budget) == allocate(ALLOCATORS["lamp"], candidates, budget)


@pytest.mark.parametrize("name", ["global", "lamp"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_large_layers_are_ranked_by_neighbours_together(name: str, sparsity: float) -> None:
    candidates = [candidate("small", 3, 5), candidate("large", 30, 40, seed=1), candidate("other", 20, 20, seed=2)]
    exact = allocate(ALLOCATORS[name], candidates, Budget(sparsity))
    with mock.patch("relrep_onnx.allocate.THIN", 100):
        found = allocate(ALLOCATORS[name], candidates, Budget(sparsity))
    assert sum(found.values()) == round(sparsity * 1615)
    for c in candidates:
        # What moves is less than a run of each layer that was thinned: 12 and 4 neighbours.
        assert abs(found[c.layer.name] - exact[c.layer.name]) <= 16


def test_a_run_of_neighbours_stands_for_all_its_weights() -> None:
    scores = np.random.default_rng(0).random((30, 41))
    with mock.patch("relrep_onnx.allocate.THIN", 100):
        values, counts = _thinned(scores)
    assert (len(values), counts.sum()) == (100, 1230)
    assert set(counts.tolist()) == {12, 13}
    for value, run in zip(values, np.split(np.sort(scores, axis=None), np.cumsum(counts)[:-1]), strict=True):
        assert value == run[len(run) // 2]


@pytest.mark.parametrize(("share", "expected"), [(1.2, {"a": 12, "b": 6}), (0.8, {"a": 6, "b": 12})])
def test_an_unmeasured_layer_counts_by_its_own_loss(share: float, expected: dict[str, int]) -> None:
    loss = -math.log(1 - 0.3 / SIGNAL)  # at the probe, of both
    candidates = [candidate("a"), candidate("b", damage=share * loss)]
    assert allocate(ALLOCATORS["rr-curve"], candidates, Budget(0.375)) == expected


def test_a_curve_that_ends_before_all_weights_goes_on_flat() -> None:
    short = dataclasses.replace(candidate("short"), curve=ScoreCurve("short", 24, SIGNAL, GRID[:3], GRID[:3], GRID[:3] / 2))
    candidates = [short, candidate("whole")]
    assert allocate(ALLOCATORS["rr-curve"], candidates, Budget(1.0)) == {"short": 24, "whole": 24}
    # Free weights go before all that cost something, but a layer's last segment comes after every other.
    assert allocate(ALLOCATORS["rr-curve"], candidates, Budget(0.75)) == {"short": 18, "whole": 18}
