"""Tables and charts of results: the parts that `content.py` puts together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from relrep_onnx.benchmark import NodeTime, Timing
from relrep_onnx.deployment import RUNTIMES, gaining
from relrep_onnx.distill import Outlook
from relrep_onnx.export import Exported
from relrep_onnx.inspection import LayerFacts
from relrep_onnx.report import words
from relrep_onnx.report.document import Cell, Chart, Column, Series, Table, row, table
from relrep_onnx.results import Finding, LayerReport, ModelFile, Refinement, Result
from relrep_onnx.types import Skipped
from relrep_onnx.verify import Fidelity

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Where curves are also given as numbers."""

Row = tuple[Cell, ...]


def texts(*titles: str) -> list[Column]:
    """Columns of text."""
    return [Column(title) for title in titles]


def numbers(*titles: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(title, number=True) for title in titles]


def before_after(result: Result) -> Table:
    """Sizes, work and behaviour of the model before and after, each export among them."""
    before, after = result.before, result.after
    others = [e for e in result.exports if e.form != "onnx"]
    sizes = [
        _shrunk("file", before.file_bytes, after.file_bytes),
        _shrunk("file, gzip", before.gzip_bytes, after.gzip_bytes),
        *export_sizes(others, before.file_bytes, before.gzip_bytes),
    ]
    counts = [
        _change("weights that are not zero", before.nonzeros, after.nonzeros),
        _change("their MACs per sample", before.macs, after.macs),
    ]
    moved = behaviour(None, result.fidelity, result.metric_before, result.metric_after, result.config.eval)
    smallest = min(sizes, key=lambda cells: cells[2].value or 0.0)
    return changes("the model before and after", [*counts, *sizes, *moved], counts[0], smallest, *moved)


def changes(caption: str, rows: Sequence[Row], *highlights: Row) -> Table:
    """A table of what was before and what is after."""
    return table(caption, [*texts(""), *numbers("before", "after", "after / before")], rows, *map(list(rows).index, highlights))


def _change(name: str, before: int, after: int) -> Row:
    return row(name, _count(before), _count(after), _share(after, before))


def _shrunk(name: str, before: int, after: int) -> Row:
    return row(name, _size(before), _size(after), _share(after, before))


def export_sizes(exports: Iterable[Exported], before: int, gzip_before: int | None = None) -> list[Row]:
    """Rows with the bytes of each export."""
    rows = []
    for e in exports:
        rows.append(_shrunk(f"export {e.form}", before, e.file_bytes))
        if gzip_before is not None:
            rows.append(_shrunk(f"export {e.form}, gzip", gzip_before, e.gzip_bytes))
    return rows


def behaviour(
    before: Fidelity | None, after: Fidelity, metric_before: float | None, metric_after: float | None, metric: str | None
) -> list[Row]:
    """Rows with how far the outputs are from the dense model's, before (None: it is the dense model) and after."""
    start = before.relative_l2 if before else None
    rows = [row("outputs, relative L2", _number(start, ".4g"), _number(after.relative_l2, ".4g"), "")]
    if after.top1_agreement is not None:
        agreed = before.top1_agreement if before else None
        rows.append(row("top-1 agreement", _number(agreed, ".2%"), _number(after.top1_agreement, ".2%"), ""))
    if metric_before is not None and metric_after is not None:
        change = Cell(f"{metric_after - metric_before:+.4g}")
        rows.append(row(f"metric {metric}", _number(metric_before, ".4g"), _number(metric_after, ".4g"), change))
    return rows


def fidelity(measured: Fidelity) -> Table:
    """How far each output moved."""
    rows = [
        row(
            o.output,
            _number(o.relative_l2, ".4g"),
            _number(o.cosine, ".5f"),
            Cell(f"{o.worst_relative_l2:.4g} (#{o.worst_sample})", o.worst_relative_l2),
            _number(o.top1_agreement, ".2%"),
        )
        for o in measured.outputs
    ]
    columns = [*texts("output"), *numbers("relative L2", "cosine", "worst sample", "top-1 agreement")]
    return table(f"outputs against the dense model's, {measured.samples} samples", columns, rows)


def exports(written: Iterable[Exported]) -> Table:
    """How far each export is from the model it was made from."""
    rows = [
        row(
            e.form,
            e.output,
            _size(e.file_bytes),
            _number(e.fidelity.relative_l2 if e.fidelity.outputs else None, ".3g"),
            _number(e.fidelity.top1_agreement, ".2%"),
        )
        for e in written
    ]
    columns = [*texts("export", "file"), *numbers("bytes", "relative L2", "top-1 agreement")]
    return table("each export against the model it was made from", columns, rows)


def layers(reports: Sequence[LayerReport]) -> Table:
    """Every layer: its density, and what pruning and repair do to its outputs."""
    columns = [
        Column("layer"),
        Column("op", spare=3),
        Column("weights", number=True, spare=2),
        Column("MACs", number=True, meaning="multiply-accumulates per sample, all weights counted", spare=4),
        Column("density", number=True, meaning="share of the weights that is not zero"),
        Column("raw", number=True, meaning="error of the layer's output after pruning, as a share of its variance", spare=1),
        Column("residual", number=True, meaning="the same after repair"),
        Column("RR", number=True, meaning="Relative Repairability, residual / raw: the part of the damage repair cannot undo"),
        Column("SNR dB", number=True, meaning="signal-to-noise ratio of the repaired output", spare=5),
        Column("damage", number=True, meaning="squared relative error of the model's outputs with this layer alone pruned"),
    ]
    longest = max((raw for r in reports if math.isfinite(raw := _of_signal(r, r.curve.raw_at(r.sparsity)))), default=1.0) or 1.0
    rows = []
    for r in reports:
        curve, s = r.curve, r.sparsity
        raw, residual = (_of_signal(r, value) for value in (curve.raw_at(s), curve.residual_at(s)))
        rows.append(
            row(
                r.layer.name,
                r.layer.op,
                _count(r.layer.size),
                _count(r.macs),
                Cell(f"{1 - s:.1%}", 1 - s, bar=1 - s),
                _number(raw, ".1%"),
                dataclasses.replace(_number(residual, ".1%"), bar=_clipped(residual / longest), ghost=_clipped(raw / longest)),
                _number(r.rr, ".3f"),
                _number(curve.snr_db(s), ".1f"),
                _number(curve.damage, ".2g"),
            )
        )
    return table("pruned layers, in the order of the network; pale bars are raw, dark ones residual", columns, rows)


def _of_signal(report: LayerReport, distortion: float) -> float:
    return distortion / report.curve.signal if report.curve.signal > 0 else math.nan


def _clipped(length: float) -> float | None:
    return min(max(length, 0.0), 1.0) if math.isfinite(length) else None


def curves(reports: Sequence[LayerReport]) -> tuple[Chart, Chart, Table]:
    """RR and signal-to-noise ratio against sparsity, as charts and as numbers; each layer is marked at its own sparsity."""
    rr, noise = [], []
    for r in reports:
        at = [float(s) for s in r.curve.sparsity]
        rr.append(_series(r.layer.name, [(s, r.curve.rr_at(s)) for s in at], (r.sparsity, r.rr)))
        noise.append(_series(r.layer.name, [(s, r.curve.snr_db(s)) for s in at], (r.sparsity, r.curve.snr_db(r.sparsity))))
    rows = [row(r.layer.name, *(_number(r.curve.rr_at(s), ".3f") for s in SPARSITIES)) for r in reports]
    return (
        Chart(
            "Relative Repairability",
            "sparsity",
            "RR = residual / raw",
            "A layer whose line is low can be repaired. The dots are where the layers are now.",
            tuple(rr),
        ),
        Chart(
            "Signal-to-noise ratio after repair",
            "sparsity",
            "dB",
            "A layer whose line is high keeps its output. At 20 dB the error is a tenth of the signal, at 10 dB a third.",
            tuple(noise),
        ),
        table("RR at some sparsities", [*texts("layer"), *numbers(*(f"{s:.0%}" for s in SPARSITIES))], rows),
    )


def history(refinement: Refinement) -> tuple[Chart, Chart, Table]:
    """How refinement went, epoch by epoch."""
    epochs, kept = refinement.history, refinement.best
    errors, losses = ([(float(e.number), value) for e, value in zip(epochs, values, strict=True)]
                      for values in ([e.error for e in epochs], [e.loss for e in epochs]))  # fmt: skip
    rows = [
        row(Cell(str(e.number), e.number), _number(e.loss, ".4g"), _number(e.error, ".4g"), "kept" * (e == kept)) for e in epochs
    ]
    return (
        Chart(
            "Error of the outputs",
            "epoch",
            "relative L2",
            "On the samples that decide; the dot is the state that was kept.",
            (_series("relative L2", errors, (kept.number, kept.error)),),
        ),
        Chart(
            "Loss of the steps",
            "epoch",
            "loss",
            "Of the augmented samples that calibrate, the mean of each epoch.",
            (_series("loss", losses, (kept.number, kept.loss)),),
        ),
        table("epochs", [*numbers("epoch", "mean loss", "relative L2"), Column("")], rows),
    )


def _series(name: str, points: Iterable[tuple[float, float]], marked: tuple[float, float]) -> Series:
    """A line through the points that are numbers."""
    known = tuple((x, y) for x, y in points if math.isfinite(y))
    return Series(name, known, marked if math.isfinite(marked[1]) else None)


def trials(finding: Finding) -> Table:
    """The search for a sparsity, step by step."""
    rows = [
        row(Cell(f"{t.sparsity:.2%}", t.sparsity), _number(t.drop, ".4g"), "yes" if t.drop <= finding.limit else "no")
        for t in finding.trials
    ]
    return table(
        f"trials, against a limit of {finding.limit:g}", [*numbers("sparsity", "drop"), Column("within the limit")], rows
    )


def skipped(left: Iterable[Skipped]) -> Table:
    """Weights that stay as they are, and why."""
    return table(
        "weights that stay as they are", texts("left as it is", "op", "reason"), [row(s.node, s.op, s.reason) for s in left]
    )


def runtimes(reports: Sequence[LayerReport], pattern: str) -> Table:
    """What every runtime of `--for` gains from these zeros."""
    pruned = [(r.layer, r.sparsity) for r in reports]
    rows = []
    for name, runtime in RUNTIMES.items():
        layers = gaining(runtime, pattern, pruned)
        share = Cell(f"{layers} of {len(pruned)}", layers)
        rows.append(row(name, share, words.gain(runtime, pattern, layers), words.flags(runtime)))
    columns = [*texts("runtime"), *numbers("layers that gain"), *texts("what it gains", "export")]
    return table(f"runtimes, and what the pattern {pattern} is worth there", columns, rows)


def outlook(outlooks: Iterable[Outlook]) -> Table:
    """How far gradients come, of `inspect --gradients`."""
    rows = []
    for o in outlooks:
        reach = "outputs" if o.reaches_outputs else "features before a stop" if o.stopped else "nowhere"
        rows.append(row(o.layer, reach, "; ".join(f"{w.node}: {w.reason}" for w in o.stopped) or "-"))
    return table("what refinement can reach", texts("layer", "gradients from", "stopped at"), rows)


def inspected(facts: Iterable[LayerFacts], cure: str) -> Table:
    """Prunable layers of a model that was only looked at; unknown MACs have a `cure`."""
    rows = [
        row(
            f.layer.name,
            f.layer.op,
            _count(f.layer.size),
            _count(f.zeros),
            Cell(cure) if f.macs is None else _count(f.macs),
        )
        for f in facts
    ]
    return table("prunable layers", [*texts("layer", "op"), *numbers("weights", "zeros", "MACs")], rows)


def timings(timed: Sequence[Timing]) -> Table:
    """Models side by side."""
    slowest = max(t.milliseconds for t in timed)
    rows = [
        row(
            t.model,
            Cell(
                f"{t.milliseconds:.3f} ({t.quartiles[0]:.3f}-{t.quartiles[1]:.3f})", t.milliseconds, bar=t.milliseconds / slowest
            ),
            Cell(f"{t.ratio:.2f}x ({t.ratio_quartiles[0]:.2f}-{t.ratio_quartiles[1]:.2f})", t.ratio),
            _number(t.error, ".3g"),
        )
        for t in timed
    ]
    columns = [
        Column("model"),
        Column("ms (quartiles)", number=True, meaning="median over the rounds, and its quartiles"),
        Column("faster (quartiles)", number=True, meaning="how many times as fast as the first model, by the median round"),
        Column("output error", number=True, meaning="relative L2 against the first model's outputs, on random inputs"),
    ]
    return table("models side by side, in interleaved runs", columns, rows)


def profile(caption: str, nodes: Iterable[NodeTime]) -> Table:
    """The time of every node of one model."""
    rows = [row(n.node, n.op, _number(n.microseconds, ".1f")) for n in nodes]
    return table(caption, [*texts("node", "op"), *numbers("microseconds")], rows)


def files(models: Sequence[ModelFile]) -> Table:
    """The files that were timed."""
    first = models[0]
    rows = [
        row(
            m.path,
            _size(m.file_bytes),
            _share(m.file_bytes, first.file_bytes),
            _size(m.gzip_bytes),
            _share(m.gzip_bytes, first.gzip_bytes),
        )
        for m in models
    ]
    return table("the files", [*texts("model"), *numbers("bytes", "of the first", "gzip", "of the first, gzip")], rows)


def facts(known: Mapping[str, str]) -> Table:
    """Names and what they stand for."""
    return table("what this came from", texts("", "value"), [row(name, value) for name, value in known.items()])


def _count(value: int) -> Cell:
    return Cell(words.count(value), value)


def _size(value: int) -> Cell:
    return Cell(words.size(value), value)


def _share(value: float, of: float) -> Cell:
    share = value / of if of else 1.0
    return Cell(f"{share:.1%}", share, bar=_clipped(share))


def _number(value: float | None, form: str) -> Cell:
    known = value is not None and math.isfinite(value)
    return Cell(words.number(value, form), value if known else None)
