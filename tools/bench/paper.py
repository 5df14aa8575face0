"""The two findings of the Relative Repairability paper (arXiv 2605.25508) on one ResNet-18: `python -m tools.bench.paper`.

Sweep: the paper finds its repairability-guided allocation no better in general, but better than ERK, and in part than LAMP, near
the recoverability transition, a band of sparsities in which the usual rules begin to fail while repair still recovers something.
Here: top-1 of each allocator by sparsity, for the paper's repair (channelwise variance matching) and for Adaptive Signal
Resuscitation (arXiv 2605.21426).  Our band runs from where the best allocator's top-1 falls below 90 % of the dense one to where
it falls below 50 %.  `rr` is our reading of the paper's rule, whose details are not public.

Projections: the paper finds that ERK, capped at density 1, protects the 1x1 projections of the shortcuts too much, at the cost of
the regular convolutions.  Here they are forced to the global sparsity instead.

The network (docs/data.md) and its JPEG images are ours, not the paper's.  One network cannot confirm that a finding is general;
it can only agree or disagree.  2,000 test images: a lead under about one point is noise.

    python -m tools.bench.paper --json paper.json --plot paper.png                    # well over an hour on two idle cores
    python -m tools.bench.paper --repair asr --json asr.json                          # or in parts,
    python -m tools.bench.paper --repair variance --merge asr.json --plot paper.png   # put together
    python -m tools.bench.paper --images 64 --sparsity 0.9,0.95 --repair asr --allocate erk,global --parts sweep
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from relrep_onnx import Config, Result, optimize
from relrep_onnx.allocate import ALLOCATORS
from relrep_onnx.repair import REPAIRS
from tools.bench.data import DATA, TASKS, Array, Task, environment, infer, markdown_table, open_session, write_json
from tools.bench.options import fractions, names

MODEL: Final = "resnet18_bn"
SPARSITIES: Final = (0.80, 0.85, 0.90, 0.93, 0.95, 0.96, 0.97, 0.98)
RULES: Final = ("erk", "lamp", "global", "rr", "rr-curve")
FOLDS: Final = ("variance", "asr")
FORCED: Final = (0.90, 0.95, 0.97)
"""Sparsities of the projections' table, with ERK and variance matching."""
NOISE: Final = 0.01
"""A smaller lead says nothing."""
BAND: Final = (0.9, 0.5)
"""The transition begins and ends at these shares of the dense top-1."""
PARTS: Final = ("sweep", "projections")


@dataclass(frozen=True)
class Point:
    """One run; fractions, not percent."""

    repair: str
    allocator: str
    sparsity: float
    top1: float
    error: float


@dataclass(frozen=True)
class Forcing:
    """ERK as it is, and with the projections at the global sparsity: their share of all survivors, and top-1."""

    sparsity: float
    projections: int
    own_sparsity: float
    share: float
    share_forced: float
    top1: float
    top1_forced: float


class Bench:
    """The network with its samples; statistics of the dense model are gathered once."""

    def __init__(self, task: Task, images: int, config: Config, cache: str) -> None:
        self._task, self._config, self._cache = task, config, cache
        self._samples = task.calibration[0][:images]
        # Unseen samples; the error takes as many as calibration does.
        self._held_out = task.held_out[:images]
        dense = open_session(task.model, config.threads)
        self._dense = infer(dense, self._held_out).astype(np.float64)
        self.top1 = self._score(infer(dense, task.test_x))
        self._started = time.perf_counter()
        self._known: dict[tuple[str, str, float], Point] = {}

    def point(self, repair: str, allocator: str, sparsity: float) -> Point:
        """A run whose model nobody needs, unless it is known already."""
        key = repair, allocator, sparsity
        return self._known[key] if key in self._known else self.run(*key)[0]

    def run(
        self, repair: str, allocator: str, sparsity: float, forced: Mapping[str, float] | None = None
    ) -> tuple[Point, Result]:
        """Prunes once and scores the result."""
        config = dataclasses.replace(
            self._config, repair=repair, allocate=allocator, sparsity=sparsity, layer_sparsity=dict(forced or {})
        )
        result = optimize(self._task.model, None, self._samples, config, cache_dir=self._cache)
        session = open_session(result.model, config.threads)
        error = float(np.linalg.norm(infer(session, self._held_out) - self._dense) / np.linalg.norm(self._dense))
        point = Point(repair, allocator, sparsity, self._score(infer(session, self._task.test_x)), error)
        if not forced:
            self._known[repair, allocator, sparsity] = point
        line = f"{repair} {allocator} {sparsity:g}{' forced' * bool(forced)}: {100 * point.top1:.1f} %, {point.error:.3f}"
        print(f"{time.perf_counter() - self._started:5.0f} s  {line}", file=sys.stderr, flush=True)
        return point, result

    def _score(self, outputs: Array) -> float:
        return float(np.mean(outputs.argmax(axis=1) == self._task.test_y))


def projections(result: Result) -> list[str]:
    """The 1x1 convolutions; in a network with 3x3 kernels these are its shortcuts'."""
    return [r.layer.name for r in result.layers if r.layer.op == "Conv" and r.layer.kernel == 1]


def survivors_in(result: Result, chosen: Sequence[str]) -> float:
    """The share of all survivors that sits in some layers."""
    kept = {r.layer.name: r.layer.size - r.zeros for r in result.layers}
    return sum(kept[name] for name in chosen) / max(1, sum(kept.values()))


def force(bench: Bench, sparsity: float) -> Forcing:
    """ERK with and without protected projections."""
    before, plain = bench.run("variance", "erk", sparsity)
    chosen = projections(plain)
    after, forced = bench.run("variance", "erk", sparsity, dict.fromkeys(chosen, sparsity))
    size = sum(r.layer.size for r in plain.layers if r.layer.name in chosen)
    zeros = sum(r.zeros for r in plain.layers if r.layer.name in chosen)
    shares = survivors_in(plain, chosen), survivors_in(forced, chosen)
    return Forcing(sparsity, len(chosen), zeros / max(1, size), *shares, before.top1, after.top1)


def ranked(points: Sequence[Point], sparsity: float) -> list[Point]:
    """The points at a sparsity, the best top-1 first."""
    return sorted((p for p in points if p.sparsity == sparsity), key=lambda p: -p.top1)


def crossing(sparsities: Sequence[float], scores: Sequence[float], level: float) -> float | None:
    """Where scores first fall below a level, linear in between; the first sparsity if there already, None if nowhere.

    Args:
        sparsities: ascending.
        scores: one for each.
        level: what they fall below.
    """
    for i, score in enumerate(scores):
        if score < level:
            if i == 0:
                return sparsities[0]
            share = (scores[i - 1] - level) / (scores[i - 1] - score)
            return sparsities[i - 1] + share * (sparsities[i] - sparsities[i - 1])
    return None


def transition(points: Sequence[Point], dense: float) -> str:
    """The band of the recoverability transition, in words."""
    sparsities = sorted({p.sparsity for p in points})
    best = [ranked(points, s)[0].top1 for s in sparsities]
    first, last = (crossing(sparsities, best, share * dense) for share in BAND)
    if first is None:
        return f"begins above {sparsities[-1]:g}"
    begin = f"at or below {first:g}" if first == sparsities[0] else f"{first:.3f}"
    if last is None:
        return f"{begin} to above {sparsities[-1]:g}"
    return f"{begin} to {last:.3f}"


def sweep_table(points: Sequence[Point]) -> str:
    """Top-1 and error of each allocator by sparsity, the best in bold, and by how much it leads."""
    rules = list(dict.fromkeys(p.allocator for p in points))
    rows = []
    for sparsity in sorted({p.sparsity for p in points}):
        order = ranked(points, sparsity)
        row = [f"{sparsity:.2f}"]
        for rule in rules:
            point = next(p for p in order if p.allocator == rule)
            text = f"{100 * point.top1:.1f}"
            row.append(f"{f'**{text}**' if point is order[0] else text} / {point.error:.2f}")
        rows.append([*row, *_lead(order)])
    return markdown_table(["sparsity", *rules, "best", "lead, points", "beyond noise"], rows)


def _lead(order: Sequence[Point]) -> list[str]:
    """The winner, and its lead over the next."""
    if len(order) < 2:
        return [order[0].allocator, "", ""]
    lead = order[0].top1 - order[1].top1
    return [order[0].allocator, f"{100 * lead:.1f}", "yes" if lead > NOISE else "no"]


def forcing_table(rows: Sequence[Forcing]) -> str:
    """The projections' share of the survivors and top-1, before and after."""
    header = ["sparsity", "projections pruned", "their share %", "forced: share %", "top-1 %", "forced: top-1 %", "gain, points"]
    cells = []
    for row in rows:
        percent = (row.share, row.share_forced, row.top1, row.top1_forced, row.top1_forced - row.top1)
        cells.append([f"{row.sparsity:.2f}", f"{100 * row.own_sparsity:.1f} %", *(f"{100 * value:.1f}" for value in percent)])
    return markdown_table(header, cells)


def plot(points: Sequence[Point], dense: float, path: Path) -> None:
    """One panel per repair, one line per allocator, the dense model dashed."""
    import matplotlib  # not on top: only --plot needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    repairs = list(dict.fromkeys(p.repair for p in points))
    figure, panels = pyplot.subplots(
        1, len(repairs), figsize=(5.2 * len(repairs), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, repair in zip(panels[0], repairs, strict=True):
        mine = [p for p in points if p.repair == repair]
        axis.axhline(100 * dense, linestyle="--", color="0.4", label="dense")
        for marker, rule in zip("osD^vPX", dict.fromkeys(p.allocator for p in mine), strict=False):
            line = sorted((p.sparsity, 100 * p.top1) for p in mine if p.allocator == rule)
            axis.plot([s for s, _ in line], [t for _, t in line], marker=marker, markersize=5, linewidth=1.6, label=rule)
        axis.set(title=f"repair: {repair}", xlabel="sparsity (share of zero weights)", ylim=(0, 100))
        axis.grid(alpha=0.3)
    panels[0][0].set_ylabel("top-1 %")
    panels[0][0].legend(loc="lower left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def describe(options: argparse.Namespace, dense: float) -> str:
    """The line above the tables."""
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    return (
        f"{MODEL}, dense top-1 {100 * dense:.1f} % on the test images, first {options.images} calibration images, held-out error "
        f"on {options.images} others, seed {options.seed}, {options.threads} threads; {versions}"
    )


def report(options: argparse.Namespace, dense: float, points: Sequence[Point], forced: Sequence[Forcing]) -> str:
    """Everything as Markdown."""
    parts = [describe(options, dense)]
    for repair in dict.fromkeys(p.repair for p in points):
        mine = [p for p in points if p.repair == repair]
        parts.append(
            f"Repair {repair}: top-1 % / relative L2 of the outputs, held out. A lead counts beyond {100 * NOISE:g} point."
        )
        parts.append(sweep_table(mine))
        shares = " to ".join(f"{100 * share:g} %" for share in BAND)
        parts.append(f"Recoverability transition (best allocator, {shares} of dense): {transition(mine, dense)}")
    if forced:
        parts.append(f"ERK, repair variance, {forced[0].projections} projections forced to the global sparsity:")
        parts.append(forcing_table(forced))
    return "\n\n".join(parts)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, choices=(64, 128), help="calibration images")
    parser.add_argument("--sparsity", type=fractions, default=list(SPARSITIES), metavar="S,S", help="of the sweep")
    parser.add_argument("--forced", type=fractions, default=list(FORCED), metavar="S,S", help="of the projections' table")
    parser.add_argument("--allocate", action=names(list(ALLOCATORS)), default=list(RULES), metavar="A,B", help="of the sweep")
    parser.add_argument("--repair", action=names(list(REPAIRS)), default=list(FOLDS), metavar="A,B", help="of the sweep")
    parser.add_argument("--parts", action=names(PARTS), default=list(PARTS), metavar="A,B", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime; 0: its own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 files and models (docs/data.md)")
    parser.add_argument("--merge", type=Path, action="append", default=[], metavar="FILE", help="take in the runs of a JSON file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the sweep (needs matplotlib)")
    return parser.parse_args(arguments)


def figures(options: argparse.Namespace, dense: float, points: Sequence[Point], forced: Sequence[Forcing]) -> dict[str, Any]:
    """What goes into the JSON file."""
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "json", "plot", "merge")}
    rows = {"sweep": [dataclasses.asdict(p) for p in points], "projections": [dataclasses.asdict(f) for f in forced]}
    return {"settings": settings, "environment": environment(), "dense": dense, **rows}


def merged(files: Sequence[Path]) -> tuple[list[Point], list[Forcing]]:
    """The runs of earlier parts."""
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    points = [Point(**row) for part in parts for row in part["sweep"]]
    return points, [Forcing(**row) for part in parts for row in part["projections"]]


def main() -> None:
    options = parse()
    config = Config(threads=options.threads, seed=options.seed)
    points, forced = merged(options.merge)
    with tempfile.TemporaryDirectory(prefix="relrep-bench-") as cache:
        bench = Bench(TASKS[MODEL](options.data, 1), options.images, config, cache)
        if "projections" in options.parts:
            forced += [force(bench, sparsity) for sparsity in options.forced]
        if "sweep" in options.parts:
            for repair in options.repair:
                points += [bench.point(repair, rule, s) for s in options.sparsity for rule in options.allocate]
    print(report(options, bench.top1, points, forced))
    if options.json:
        write_json(options.json, figures(options, bench.top1, points, forced))
    if options.plot and points:
        plot(points, bench.top1, options.plot)


if __name__ == "__main__":
    main()
