"""A table and a chart of a sweep."""

from __future__ import annotations

from typing import Final

from relrep_onnx.report.document import Cell, Chart, Column, Sentences, Series, Table, row, table
from relrep_onnx.results import Sweep
from relrep_onnx.sweeps import cost_of, front
from relrep_onnx.sweeps import rows as sweep_rows

FIGURES: Final = frozenset({"sparsity", "zeros", "error", "agreement", "metric", "size", "gzip", "latency", "speedup"})
"""Columns that hold numbers."""
SPARE: Final = {"agreement": 1, "zeros": 2, "speedup": 3, "gzip": 4}
"""What a narrow terminal leaves out, the last one first."""


def points(found: Sweep) -> Table:
    """The points of a sweep; those on the front matter most."""
    (*header, _), body = sweep_rows(found)
    columns = [Column(title, number=title in FIGURES, spare=SPARE.get(title, 0)) for title in header]
    cells = [
        row(*(Cell(text, float(text) if title in FIGURES and text else None) for title, text in zip(header, line, strict=False)))
        for line in body
    ]
    best = front(found)
    return table("every point", columns, cells, *(n for n, point in enumerate(found.points) if point in best))


def failures(found: Sweep) -> Sentences:
    """Why points did not come about."""
    return Sentences(tuple(f"{p.name}: {p.failure}" for p in found.points if p.failure is not None))


def error_by_cost(found: Sweep) -> dict[str, list[tuple[float, float]]]:
    """(cost, error) of each point that came about, by pattern, allocator and repair."""
    cost, lines = cost_of(found), dict[str, list[tuple[float, float]]]()
    for p in found.points:
        if p.figures is not None:
            lines.setdefault(f"{p.pattern}, {p.allocate}, {p.repair}", []).append((getattr(p.figures, cost), p.figures.error))
    return lines


def error_against_cost(found: Sweep) -> Chart | None:
    """A line for each pattern, allocator and repair; none where a sweep has no two points to draw one through."""
    series = tuple(Series(name, tuple(sorted(line))) for name, line in error_by_cost(found).items() if len(line) > 1)
    says = "Further left is cheaper, further down closer to the dense model."
    return Chart("Error against cost", cost_of(found), "relative L2 of the outputs", says, series) if series else None
