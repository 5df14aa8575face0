"""Results as people read them in a terminal, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from relrep_onnx.benchmark import Setting
from relrep_onnx.distill import Outlook
from relrep_onnx.export import Exported
from relrep_onnx.inspection import Inspection
from relrep_onnx.results import Analysis, LayerReport, Refined, Refinement, Result
from relrep_onnx.types import ConfigError, Skipped
from relrep_onnx.verify import Fidelity


def clean(text: str) -> str:
    """A name from a model or a file without control characters, which could drive the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def render_result(result: Result) -> RenderableType:
    """The summary of `optimize`."""
    return Group(
        Text(verdict(result), style="bold"),
        *(Text(line) for line in decisions(result)),
        "",
        _before_after(result),
        "",
        render_fidelity(result.fidelity),
        "",
        *([render_exports(result.exports, result.before.file_bytes), ""] if result.exports else []),
        _layer_table(result.layers, allocated=True),
        "",
        *_skipped_and_notes(result.skipped, result.notes),
        Text(provenance_line(result)),
    )


def render_analysis(analysis: Analysis) -> RenderableType:
    """The RR table of `analyze`."""
    return Group(
        _layer_table(analysis.layers, allocated=False),
        "",
        *_skipped_and_notes(analysis.skipped, analysis.notes),
        Text(provenance_line(analysis)),
    )


def render_inspection(inspection: Inspection) -> RenderableType:
    """The tables of `inspect`."""
    layers = inspection.layers
    table = _table("layer", "op", "weights", "zeros", "MACs", numbers=3)
    for facts in layers:
        macs = "needs --input-shape" if facts.macs is None else _count(facts.macs)
        table.add_row(_name(facts.layer.name), facts.layer.op, _count(facts.layer.size), _count(facts.zeros), macs)
    total = sum(facts.layer.size for facts in layers)
    unknown = sum(facts.macs is None for facts in layers)
    work = (
        f"MACs of {unknown} layers unknown" if unknown else f"{_count(sum(facts.macs or 0 for facts in layers))} MACs per sample"
    )
    headline = (
        f"{clean(inspection.model)}: opset {inspection.opset}, IR {inspection.ir_version}, {_bytes(inspection.weight_bytes)} of "
        f"tensors; {len(layers)} prunable layers with {_count(total)} weights, {work}"
    )
    return Group(Text(headline, style="bold"), "", table, "", *_skipped_and_notes(inspection.skipped, inspection.notes))


def render_refined(result: Refined) -> RenderableType:
    """The summary of `refine`."""
    metric = []
    if result.metric_before is not None and result.metric_after is not None:
        metric = [Text(f"metric {clean(result.config.eval or '')}: {result.metric_before:.4g} -> {result.metric_after:.4g}")]
    return Group(
        Text(refinement_verdict(result.refinement), style="bold"),
        *(Text(line) for line in refinement_lines(result.refinement)),
        *metric,
        "",
        "before:",
        render_fidelity(result.before),
        "",
        "after:",
        render_fidelity(result.after),
    )


def render_outlook(outlooks: Sequence[Outlook]) -> RenderableType:
    """What refinement could reach, of `inspect --gradients`."""
    table = _table("layer", "gradients from", "stopped at")
    for o in outlooks:
        reach = "outputs" if o.reaches_outputs else "features before a stop" if o.stopped else "nowhere"
        table.add_row(_name(o.layer), reach, escape(clean("; ".join(f"{w.node}: {w.reason}" for w in o.stopped))) or "-")
    whole = sum(o.reaches_outputs for o in outlooks)
    return Group(
        "", Text(f"refinement: gradients of the outputs reach {whole} of {len(outlooks)} layers", style="bold"), "", table
    )


def refinement_verdict(refinement: Refinement) -> str:
    """One sentence: what refinement did to the outputs of the samples that decide."""
    start, best = refinement.start, refinement.best
    done = refinement.history[-1].number
    how = f"{done} of {refinement.epochs} epochs" + " (interrupted)" * refinement.interrupted
    if refinement.kept == 0:
        return f"refinement kept the start: none of {how} was better (relative L2 of the outputs {start.error:.3g})"
    moved = f"from {start.error:.3g} to {best.error:.3g}"
    return f"refinement moved the relative L2 of the outputs {moved} ({how}; epoch {best.number} kept)"


def refinement_lines(refinement: Refinement) -> list[str]:
    """How it went, a sentence each."""
    kinds = ", ".join(refinement.augment) or "none"
    trials = ", ".join(f"{name} {error:.3g}" for name, error in refinement.trials.items())
    lines = [
        f"augmentation: {kinds}" + f"; held-out error of short trials: {trials}" * bool(trials),
        f"aimed at {len(refinement.ends)} block ends and {len(refinement.outputs)} outputs: "
        + clean(", ".join((*refinement.ends, *refinement.outputs))),
    ]
    if refinement.restarts:
        lines.append(f"{refinement.restarts} steps diverged; each went back to the best state at half the rate")
    return lines + [f"gradients stop at {clean(wall)}" for wall in refinement.walls]


def render_exports(exports: Iterable[Exported], before: int) -> RenderableType:
    """The exports with their sizes, and how far each is from the model it was made from; `before` is the input's bytes."""
    table = _table("export", "file", "of the input", "gzip", "relative L2", "top-1 agreement", numbers=5)
    notes = []
    for e in exports:
        agreement = "-" if e.fidelity.top1_agreement is None else f"{e.fidelity.top1_agreement:.2%}"
        moved = f"{e.fidelity.relative_l2:.3g}" if e.fidelity.outputs else "-"
        table.add_row(
            _name(e.output), _bytes(e.file_bytes), f"{e.file_bytes / before:.1%}", _bytes(e.gzip_bytes), moved, agreement
        )
        notes += [Text(f"{e.form}: {clean(note)}") for note in e.notes]
        notes += [Text(f"{e.form}: also wrote {clean(path)}") for path in e.companions]
    return Group(table, *notes)


def verdict(result: Result) -> str:
    """One sentence: what was done, and how far the outputs moved."""
    fidelity = result.fidelity
    moved = f"outputs moved by {fidelity.relative_l2:.3g} (relative L2)"
    if fidelity.top1_agreement is not None:
        moved += f" and agree on {fidelity.top1_agreement:.1%} of top-1 answers"
    made_up = " RANDOM calibration data: the error says little about real inputs." if result.provenance.random_data else ""
    return (
        f"{result.sparsity:.2%} of the prunable weights and {result.macs_sparsity:.1%} of their MACs are zero; on "
        f"{fidelity.samples} held-out samples the {moved}.{made_up}"
    )


def decisions(result: Result) -> list[str]:
    """What the run chose by trial, a sentence each."""
    lines = []
    if result.choice is not None:
        errors = ", ".join(f"{name} {error:.3g}" for name, error in result.choice.errors.items())
        lines.append(f"auto chose {result.allocator}; relative L2 of short trials on held-out samples: {errors}")
    if result.finding is not None:
        found = result.finding
        above = min((t for t in found.trials if t.sparsity > found.sparsity), key=lambda t: t.sparsity, default=None)
        edge = f"; {above.sparsity:.1%} drops by {above.drop:.4g}" if above is not None else "; no larger one was tried"
        lines.append(
            f"--max-drop {result.config.max_drop} found a sparsity of {found.sparsity:.1%}, which drops by {found.drop:.4g} "
            f"on the samples that decide ({found.drop / found.limit:.0%} of the limit){edge}"
        )
    if result.refinement is not None:
        lines += [refinement_verdict(result.refinement), *refinement_lines(result.refinement)]
    return lines


def provenance_line(analysis: Analysis) -> str:
    """What is needed to run it again."""
    p, c = analysis.provenance, analysis.config
    versions = ", ".join(f"{name} {number}" for name, number in p.versions.items())
    data = "random data" if p.random_data else clean(p.data)
    left_out = f" without {len(p.left_out)} bad ones" if p.left_out else ""
    allocator = analysis.allocator if isinstance(analysis, Result) else c.allocate
    return (
        f"{p.calibration_samples} calibration samples from {data}{left_out} ({p.data_sha256[:12]}), model {p.model_sha256[:12]}, "
        f"allocate {allocator}, pattern {c.pattern}, repair {c.repair}, seed {c.seed}, threads {c.threads or 'default'}; "
        f"{versions}"
    )


def plot_curves(analysis: Analysis, path: Path) -> None:
    """RR and repaired signal-to-noise ratio of every layer against sparsity, as a picture (PNG, SVG or PDF by suffix).

    Raises:
        ConfigError: matplotlib is missing, or cannot write this kind of file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'relrep-onnx[plots]'") from error
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = [i / max(1, len(analysis.layers) - 1) for i in range(len(analysis.layers))]
    for shade, report in zip(shades, analysis.layers, strict=True):
        color = (0.1 + 0.8 * shade, 0.25, 0.85 - 0.7 * shade)
        curve = report.curve
        left.plot(curve.sparsity, curve.rr, color=color, linewidth=1.2, label=clean(report.layer.name)[-28:])
        right.plot(curve.sparsity, [curve.snr_db(s) for s in curve.sparsity], color=color, linewidth=1.2)
    left.set(xlabel="sparsity", ylabel="RR = residual / raw", title="Relative Repairability (low: repairable)", ylim=(0, None))
    right.set(xlabel="sparsity", ylabel="signal / residual, dB", title="Signal-to-noise ratio after repair")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if len(analysis.layers) <= 30:
        figure.legend(loc="outside right upper", fontsize=6)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {str(path)!r}: {error}") from error


def _before_after(result: Result) -> Table:
    table = _table("", "before", "after", "after / before", numbers=3)
    before, after = result.before, result.after
    rows = [
        ("file", _bytes(before.file_bytes), _bytes(after.file_bytes), after.file_bytes / before.file_bytes),
        ("file, gzip", _bytes(before.gzip_bytes), _bytes(after.gzip_bytes), after.gzip_bytes / before.gzip_bytes),
        ("prunable weights", _count(before.nonzeros), _count(after.nonzeros), after.nonzeros / max(1, before.nonzeros)),
        ("their MACs per sample", _count(before.macs), _count(after.macs), after.macs / max(1, before.macs)),
    ]
    for name, old, new, ratio in rows:
        table.add_row(name, old, new, f"{ratio:.3f}")
    if result.metric_before is not None and result.metric_after is not None:
        name = f"metric {_name(result.config.eval or '')}"
        change = f"{result.metric_after - result.metric_before:+.4g}"
        table.add_row(name, f"{result.metric_before:.4g}", f"{result.metric_after:.4g}", change)
    return table


def render_fidelity(fidelity: Fidelity) -> Table:
    """How far each output moved: all of `compare`, part of `optimize`."""
    table = _table("output", "relative L2", "cosine", "worst sample", "top-1 agreement", numbers=4)
    for o in fidelity.outputs:
        agreement = "-" if o.top1_agreement is None else f"{o.top1_agreement:.2%}"
        worst = f"{o.worst_relative_l2:.4g} (#{o.worst_sample})"
        table.add_row(_name(o.output), f"{o.relative_l2:.4g}", f"{o.cosine:.5f}", worst, agreement)
    return table


def render_benchmark(settings: Iterable[Setting]) -> RenderableType:
    """The table of `benchmark` for every setting, the profiles where there are some, and a line of verdict each."""
    parts: list[RenderableType] = []
    for setting in settings:
        table = _table("model", "ms (quartiles)", "faster (quartiles)", "output error", numbers=3)
        for t in setting.timings:
            spent = f"{t.milliseconds:.3f} ({t.quartiles[0]:.3f}-{t.quartiles[1]:.3f})"
            faster = f"{t.ratio:.2f}x ({t.ratio_quartiles[0]:.2f}-{t.ratio_quartiles[1]:.2f})"
            table.add_row(_name(t.model), spent, faster, f"{t.error:.3g}")
        threads = f"{setting.threads} thread{'s' if setting.threads != 1 else ''}" if setting.threads else "all threads"
        parts += [Text(f"{threads}, batch {setting.batch}", style="bold"), table]
        for model, nodes in setting.profiles.items():
            inner = _table("node", "op", "microseconds", numbers=1)
            for n in nodes:
                inner.add_row(_name(n.node), _name(n.op), f"{n.microseconds:.1f}")
            parts += ["", Text(clean(model), style="bold"), inner]
        parts += [Text(speed_verdict(setting)), ""]
    return Group(*parts)


def speed_verdict(setting: Setting) -> str:
    """One line: the fastest model, and whether the spread leaves that open."""
    best = max(setting.timings, key=lambda timing: timing.ratio)
    if best is setting.timings[0]:
        return "no model is faster than the first"
    sure = "" if best.ratio_quartiles[0] > 1 else ", but a quarter of the rounds or more say it is not"
    return f"{clean(best.model)} is {best.ratio:.2f}x as fast as the first model{sure}"


def _layer_table(layers: Iterable[LayerReport], *, allocated: bool) -> Table:
    at = "sparsity" if allocated else "at sparsity"
    table = _table("layer", "op", "weights", "MACs", at, "RR", "raw", "residual", "SNR dB", "damage", numbers=8)
    for r in layers:
        curve, s = r.curve, r.sparsity
        table.add_row(
            _name(r.layer.name),
            r.layer.op,
            _count(r.layer.size),
            _count(r.macs),
            f"{s:.3f}",
            _number(r.rr, ".3f"),
            _number(curve.raw_at(s), ".3g"),
            _number(curve.residual_at(s), ".3g"),
            _number(curve.snr_db(s), ".1f"),
            _number(curve.damage, ".2g"),
        )
    return table


def _skipped_and_notes(skipped: Iterable[Skipped], notes: Iterable[str]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    rows = [(_name(s.node), _name(s.op), escape(clean(s.reason))) for s in skipped]
    if rows:
        table = _table("left as it is", "op", "reason")
        for row in rows:
            table.add_row(*row)
        parts.extend([table, ""])
    return parts + [Text(f"note: {clean(note)}") for note in notes]


def _table(*columns: str, numbers: int = 0) -> Table:
    """A plain table whose last `numbers` columns are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        right = i >= len(columns) - numbers
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _name(text: str) -> str:
    text = clean(text)
    return escape(text if len(text) <= 48 else f"...{text[-45:]}")


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _count(value: int) -> str:
    return f"{value:,}"


def _bytes(value: int) -> str:
    return f"{value:,} B" if value < 10_000 else f"{value / 1000:,.1f} kB" if value < 10_000_000 else f"{value / 1e6:,.1f} MB"


def console_for(*, stderr: bool = False) -> Console:
    """A console that does not wrap tables when its output goes to a file."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=180)
