"""A sweep as rows of text, and the points that no other one beats.

A point is on the front where no other is at least as good in both error and cost and better in one; the cost is the size, or else
the latency, or else the weights that are left.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from typing import Final

from relrep_onnx.escape import clean, plain
from relrep_onnx.results import Point, Sweep

SETTINGS: Final = ("pattern", "allocate", "repair", "sparsity")
NEEDS: Final[Mapping[str, str]] = {"size": "size", "gzip": "size", "latency": "latency", "speedup": "latency"}
"""The measure that a figure is of; the others are always there."""
FORMS: Final[Mapping[str, str]] = {
    "error": ".4g",
    "agreement": ".4f",
    "metric": ".6g",
    "size": "d",
    "gzip": "d",
    "latency": ".3f",
    "speedup": ".2f",
}
"""How the figures are written."""


def cost_of(found: Sweep) -> str:
    """The figure that stands against the error."""
    return next((name for name in ("size", "latency") if name in found.measures), "nonzeros")


def front(found: Sweep) -> tuple[Point, ...]:
    """The points that no other one beats, cheapest first."""
    done = [(getattr(p.figures, cost_of(found)), p.figures.error, n) for n, p in enumerate(found.points) if p.figures is not None]
    best, least = [], math.inf
    for _, error, number in sorted(done):
        if error < least:
            best.append(found.points[number])
            least = error
    return tuple(best)


def rows(found: Sweep) -> tuple[list[str], list[list[str]]]:
    """Header and cells: settings, zeros, what was measured, a star on the front, and why a point failed."""
    wanted = [name for name in FORMS if NEEDS.get(name, "error") in (*found.measures, "error")]
    names = [name for name in wanted if any(getattr(p.figures, name, None) is not None for p in found.points)]
    best, body = front(found), []
    for p in found.points:
        zeros = "" if p.figures is None else f"{p.figures.sparsity:.4f}"
        values = [_cell(getattr(p.figures, name, None), FORMS[name]) for name in names]
        settings = [p.pattern, p.allocate, p.repair, f"{p.sparsity:.10g}"]
        body.append([*settings, zeros, *values, "*" * (p in best), clean(p.failure or "")])
    return [*SETTINGS, "zeros", *names, "front", "failure"], body


def to_csv(found: Sweep) -> str:
    """The rows as comma-separated values."""
    stream = io.StringIO()
    header, body = rows(found)
    csv.writer(stream, lineterminator="\n").writerows([header, *body])
    return stream.getvalue()


def to_markdown(found: Sweep) -> str:
    """The rows as a Markdown table."""
    header, body = rows(found)
    lines = [header, ["---"] * len(header), *body]
    return "".join("| " + " | ".join(plain(cell) for cell in line) + " |\n" for line in lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
