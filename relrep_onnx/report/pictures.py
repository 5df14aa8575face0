"""Charts and bars as SVG inside a page: colours come from the page's style, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from relrep_onnx.report.document import Cell, Chart, Series
from relrep_onnx.report.markup import Markup, tag

WIDTH, HEIGHT = 520, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 30, 44

SLACK: Final = 0.02
"""Lines may leave the outermost ticks by this share of a step."""

COLOURS: Final = ((28, 124, 213), (139, 99, 214), (208, 72, 130), (201, 92, 20))
"""From the first line to the last, RGB: all stand out from white and from black by 3 to 1 at least."""


def colour(share: float) -> str:
    """The colour a share of the way from the first line to the last."""
    at = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    low = min(int(at), len(COLOURS) - 2)
    mixed = (a + (b - a) * (at - low) for a, b in zip(COLOURS[low], COLOURS[low + 1], strict=True))
    return "#" + "".join(f"{round(c):02x}" for c in mixed)


def bar(cell: Cell) -> Markup | None:
    """The bar of a cell, over its paler one; nothing where there is none."""
    if cell.bar is None:
        return None
    lengths = [("ghost", cell.ghost), ("fill", cell.bar)]
    rects = [tag("rect", class_=name, width=100 * length, height=6) for name, length in lengths if length is not None]
    return tag("svg", *rects, class_="bar", viewBox="0 0 100 6", preserveAspectRatio="none", aria_hidden="true")


def chart(drawn: Chart) -> Markup:
    """Lines with axes, ticks and a legend; each line names itself when it is pointed at."""
    points = [point for series in drawn.series for point in (*series.points, *([series.marked] if series.marked else []))]
    across, up = _ticks(x for x, _ in points), _ticks(y for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - across[0]) / (across[-1] - across[0]),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - up[0]) / (up[-1] - up[0]),
        )

    grid = []
    for y, label in zip(up, _labels(up), strict=True):
        x1, height = place(across[0], y)
        grid.append(tag("line", x1=x1, x2=WIDTH - RIGHT, y1=height, y2=height, class_="base" if y == up[0] else "grid"))
        grid.append(tag("text", label, x=x1 - 8, y=height + 4, text_anchor="end"))
    for x, label in zip(across, _labels(across), strict=True):
        along, bottom = place(x, up[0])
        grid.append(tag("line", x1=along, x2=along, y1=bottom, y2=bottom + 4, class_="base"))
        grid.append(tag("text", label, x=along, y=bottom + 18, text_anchor="middle"))
    last = max(1, len(drawn.series) - 1)
    lines = [_line(series, colour(i / last), [place(*p) for p in series.points], series.marked and place(*series.marked))
             for i, series in enumerate(drawn.series)]  # fmt: skip
    return tag(
        "svg",
        tag("title", drawn.title),
        tag("desc", drawn.says),
        *grid,
        tag("text", drawn.y, x=LEFT - 50, y=16),
        tag("text", drawn.x, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"),
        *(_legend(len(drawn.series)) if len(drawn.series) > 1 else ()),
        *lines,
        class_="chart",
        role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
    )


def _line(series: Series, stroke: str, points: list[tuple[float, float]], marked: tuple[float, float] | None) -> Markup:
    way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dot = tag("circle", cx=round(marked[0], 1), cy=round(marked[1], 1), r=3.5, fill=stroke) if marked else None
    return tag(
        "g",
        tag("title", series.name),
        tag("polyline", points=way, class_="reach"),
        tag("polyline", points=way, class_="line", stroke=stroke),
        dot,
        class_="series",
        data_name=series.name,
    )


def _legend(count: int) -> list[Markup]:
    """The colours in the order of the lines, at the upper right."""
    steps = min(count, 12)
    start = WIDTH - RIGHT - 34 - 8 * steps
    boxes = [tag("rect", x=start + 8 * i, y=7, width=8, height=8, fill=colour(i / max(1, steps - 1))) for i in range(steps)]
    return [
        tag("text", "first layer", x=start - 6, y=16, text_anchor="end"),
        *boxes,
        tag("text", "last", x=WIDTH - RIGHT, y=16, text_anchor="end"),
    ]


def _ticks(values: Iterable[float]) -> list[float]:
    """Round numbers that enclose the values, about five of them; whole ones for whole values."""
    known = list(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(step for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power) if span / step <= 5)
    if all(value == int(value) for value in known):
        step = math.ceil(step)
    first, last = math.floor(low / step + SLACK), math.ceil(high / step - SLACK)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _labels(ticks: list[float]) -> list[str]:
    """With as many digits as the finest of them needs."""
    digits = next((d for d in range(12) if all(abs(round(t, d) - t) <= 1e-9 * abs(ticks[-1]) for t in ticks)), 12)
    return [f"{tick:.{digits}f}" for tick in ticks]
