"""Numbers and results as words: the formats and the sentences that every face shares."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from relrep_onnx.benchmark import Setting
from relrep_onnx.deployment import Runtime
from relrep_onnx.results import RANDOM, LayerReport, Refinement, Result, Sweep
from relrep_onnx.search import MARGIN
from relrep_onnx.verify import Fidelity


def number(value: float | None, form: str) -> str:
    """A number in a format; a dash where there is none."""
    return format(value, form) if value is not None and math.isfinite(value) else "-"


def count(value: int) -> str:
    """A whole number, its thousands apart."""
    return f"{value:,}"


def size(value: int) -> str:
    """Bytes in the unit that fits."""
    return f"{value:,} B" if value < 10_000 else f"{value / 1000:,.1f} kB" if value < 10_000_000 else f"{value / 1e6:,.1f} MB"


def moved(fidelity: Fidelity) -> str:
    """How far outputs moved, as half a sentence."""
    far = f"outputs moved by {fidelity.relative_l2:.3g} (relative L2)"
    agreement = fidelity.top1_agreement
    return far if agreement is None else f"{far} and agree on {agreement:.1%} of top-1 answers"


def verdict(result: Result) -> str:
    """One sentence: what was done, and how far the outputs moved."""
    made_up = f" {RANDOM}" * result.provenance.random_data
    return (
        f"{result.sparsity:.2%} of the prunable weights and {result.macs_sparsity:.1%} of their MACs are zero; on "
        f"{result.fidelity.samples} held-out samples the {moved(result.fidelity)}.{made_up}"
    )


def decisions(result: Result) -> list[str]:
    """What the run chose by trial, a sentence each."""
    lines = []
    if result.choice is not None:
        errors = ", ".join(f"{name} {error:.3g}" for name, error in result.choice.errors.items())
        stays = f" (the first stays unless another's is {1 - MARGIN:.0%} smaller)"
        best = min(result.choice.errors.values())
        why = stays * (result.choice.errors[result.allocator] > best)
        lines.append(f"auto chose {result.allocator}; relative L2 of short trials on held-out samples: {errors}{why}")
    if result.finding is not None:
        found = result.finding
        above = min((t for t in found.trials if t.sparsity > found.sparsity), key=lambda t: t.sparsity, default=None)
        edge = f"; {above.sparsity:.1%} drops by {above.drop:.4g}" if above is not None else "; no larger one was tried"
        lines.append(
            f"--max-drop {result.config.max_drop} found a sparsity of {found.sparsity:.1%}, which drops by {found.drop:.4g} "
            f"on the samples that decide ({found.drop / found.limit:.0%} of the limit){edge}"
        )
    return lines


def repairability(layers: Iterable[LayerReport], sparsity: float) -> str:
    """One sentence: what repair leaves of the damage, over all layers at one sparsity."""
    known = sorted((rr, r.layer.name) for r in layers if math.isfinite(rr := r.curve.rr_at(sparsity)))
    if not known:
        return f"At {sparsity:.0%} sparsity pruning does no damage that could be measured."
    (least, best), (most, worst) = known[0], known[-1]
    middle = statistics.median(rr for rr, _ in known)
    return (
        f"At {sparsity:.0%} sparsity in every layer, repair leaves {middle:.0%} of the pruning damage in the median layer: "
        f"{least:.0%} in {best}, {most:.0%} in {worst}."
    )


def refinement_verdict(refinement: Refinement) -> str:
    """One sentence: what refinement did to the outputs of the samples that decide."""
    start, best = refinement.start, refinement.best
    done = refinement.history[-1].number
    how = f"{done} of {refinement.epochs} epochs" + " (interrupted)" * refinement.interrupted
    if refinement.kept == 0:
        return f"refinement kept the start: none of {how} was better (relative L2 of block ends and outputs {start.error:.3g})"
    way = f"from {start.error:.3g} to {best.error:.3g}"
    return f"refinement moved the relative L2 of block ends and outputs {way} ({how}; epoch {best.number} kept)"


def refinement_lines(refinement: Refinement) -> list[str]:
    """How it went, a sentence each."""
    kinds = ", ".join(refinement.augment) or "none"
    trials = ", ".join(f"{name} {error:.3g}" for name, error in refinement.trials.items())
    lines = [
        f"augmentation: {kinds}" + f"; held-out error of short trials: {trials}" * bool(trials),
        f"aimed at {len(refinement.ends)} block ends and {len(refinement.outputs)} outputs: "
        + ", ".join((*refinement.ends, *refinement.outputs)),
    ]
    if refinement.restarts:
        lines.append(f"{refinement.restarts} steps diverged; each went back to the best state at half the rate")
    return lines + [f"gradients stop at {wall}" for wall in refinement.walls]


def conditions(setting: Setting) -> str:
    """What a setting of `benchmark` was."""
    threads = f"{setting.threads} thread{'s' if setting.threads != 1 else ''}" if setting.threads else "all threads"
    return f"{threads}, batch {setting.batch}"


def speed_verdict(setting: Setting) -> str:
    """One line: the fastest model, and whether the spread leaves that open."""
    best = max(setting.timings, key=lambda timing: timing.ratio)
    if best is setting.timings[0]:
        return "no model is faster than the first"
    sure = "" if best.ratio_quartiles[0] > 1 else ", but a quarter of the rounds or more say it is not"
    return f"{best.model} is {best.ratio:.2f}x as fast as the first model{sure}"


def gain(runtime: Runtime, pattern: str, layers: int) -> str:
    """What a runtime gains from zeros in a pattern, in so many layers."""
    if runtime.only not in (None, pattern):
        return f"nothing from {pattern}; with --pattern {runtime.only}: {runtime.pays}"
    return runtime.pays if layers else f"nothing from these layers; elsewhere: {runtime.pays}"


def flags(runtime: Runtime) -> str:
    """The options of `export` that make the form which pays on a runtime."""
    form = ",".join(runtime.settings["forms"])
    more = [f"--{name} {runtime.settings[name]}" for name in ("values", "target") if name in runtime.settings]
    return " ".join([f"--to {form}", *more])


def swept(found: Sweep) -> str:
    """One sentence on a sweep: how many points came about, and which was picked."""
    done = sum(point.figures is not None for point in found.points)
    picked = f"; picked {found.picked.name}: {found.output}" if found.picked is not None else ""
    return f"{done} of {len(found.points)} points came about{picked}"
