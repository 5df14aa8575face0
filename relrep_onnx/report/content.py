"""What a report says: a result in, a document out.  The faces only draw it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from onnx import ModelProto

from relrep_onnx import graph as graphs
from relrep_onnx.config import Config
from relrep_onnx.distill import Outlook
from relrep_onnx.export import Exported
from relrep_onnx.inspection import Inspection
from relrep_onnx.report import parts, swept, words
from relrep_onnx.report.document import Code, Document, Section, Sentences, section
from relrep_onnx.results import Analysis, BenchmarkResult, Exports, Provenance, Refined, Refinement, Result, Sweep
from relrep_onnx.verify import Fidelity


def of_result(result: Result, command: str | None = None) -> Document:
    """The report of `optimize`; `command` is the command line it came from."""
    refinement, finding = result.refinement, result.finding
    speed = "Speed was not measured in this run: relrep-onnx benchmark times the files side by side."
    return Document(
        kind="optimize",
        subject=_short(result.provenance),
        verdict=words.verdict(result),
        sections=(
            *section(
                "Before and after",
                _lines(words.decisions(result)),
                parts.before_after(result),
                _lines([speed]),
                details=[parts.trials(finding)] if finding else [],
            ),
            *section("Outputs on held-out samples", parts.fidelity(result.fidelity)),
            *_exports(result.exports),
            *(_refinement(refinement) if refinement else ()),
            *section("Layers", parts.layers(result.layers)),
            *_curves(result, _lines([words.repairability(result.layers, result.sparsity)])),
            *_left_out(result),
            *section("What runtimes gain from these zeros", parts.runtimes(result.layers, result.config.pattern)),
            *_reproduction(result.provenance, result.config, command, allocate=result.allocator, model=result.model),
        ),
        data=result,
    )


def of_analysis(analysis: Analysis, command: str | None = None) -> Document:
    """The report of `analyze`."""
    goal = analysis.config.goal
    return Document(
        kind="analyze",
        subject=_short(analysis.provenance),
        verdict=words.repairability(analysis.layers, goal),
        sections=(
            *section(f"Layers at {goal:.0%} sparsity", parts.layers(analysis.layers)),
            *_curves(analysis),
            *_left_out(analysis),
            *_reproduction(analysis.provenance, analysis.config, command),
        ),
        data=analysis,
    )


def of_refined(result: Refined, command: str | None = None) -> Document:
    """The report of `refine`."""
    metrics = result.metric_before, result.metric_after, result.config.eval
    rows = parts.behaviour(result.before, result.after, *metrics)
    return Document(
        kind="refine",
        subject=_short(result.provenance),
        verdict=words.refinement_verdict(result.refinement),
        sections=(
            *section("Before and after", parts.changes("the sparse model against the dense one", rows)),
            *section("Outputs before", parts.fidelity(result.before)),
            *section("Outputs after", parts.fidelity(result.after)),
            *_refinement(result.refinement),
            *section("Notes", _notes(result.notes)),
            *_reproduction(result.provenance, result.config, command, model=result.model),
        ),
        data=result,
    )


def of_benchmark(result: BenchmarkResult, command: str | None = None) -> Document:
    """The report of `benchmark`."""
    settings, plan = result.settings, result.plan
    facts = {
        "rounds": f"{plan.rounds}, each runs every model once",
        "inputs": f"random, seed {plan.seed}",
        "processor": result.processor,
        **{f"{Path(model.path).name}, hash": model.sha256 for model in result.models},
        **result.versions,
    }
    profiles = [(f"{Path(model).name}, {words.conditions(s)}", nodes) for s in settings for model, nodes in s.profiles.items()]
    return Document(
        kind="benchmark",
        subject=Path(result.models[0].path).name,
        verdict="; ".join(f"{words.conditions(s)}: {words.speed_verdict(s)}" for s in settings),
        sections=(
            *(part for s in settings for part in section(f"Latency, {words.conditions(s)}", parts.timings(s.timings))),
            *section("Files", parts.files(result.models)),
            *(part for of, nodes in profiles for part in section(f"Time of every node, {of}", parts.profile(of, nodes))),
            *section("How to reproduce", _command(command), parts.facts(facts)),
        ),
        data=result,
    )


def of_sweep(found: Sweep, command: str | None = None) -> Document:
    """The report of `sweep`."""
    return Document(
        kind="sweep",
        subject=_short(found.provenance),
        verdict=words.swept(found),
        sections=(
            *section("Points", swept.points(found), swept.failures(found), details=[swept.error_against_cost(found)]),
            *_reproduction(found.provenance, found.config, command),
        ),
        data=found,
    )


def of_fidelity(fidelity: Fidelity, subject: str) -> Document:
    """The report of `compare`."""
    verdict = f"On {fidelity.samples} samples the {words.moved(fidelity)}."
    return Document("compare", subject, verdict, section("Outputs", parts.fidelity(fidelity)), fidelity)


def of_exports(exports: Sequence[Exported], subject: str, before: int) -> Document:
    """The report of `export`; `before` is the input's bytes."""
    least = min(exports, key=lambda e: e.file_bytes)
    verdict = (
        f"The smallest export, {least.form}, takes {words.size(least.file_bytes)}: {least.file_bytes / before:.1%} of its input."
    )
    sizes = parts.changes("bytes of the exports", parts.export_sizes(exports, before))
    sections = (*section("Before and after", sizes), *_exports(exports))
    return Document("export", subject, verdict, sections, Exports(tuple(exports)))


def of_inspection(inspection: Inspection, outlooks: Sequence[Outlook] | None = None) -> Document:
    """The report of `inspect`, with how far gradients come where that was asked for."""
    layers = inspection.layers
    unknown = sum(facts.macs is None for facts in layers)
    total = words.count(sum(facts.macs or 0 for facts in layers))
    weights = words.count(sum(facts.layer.size for facts in layers))
    tensors = words.size(inspection.weight_bytes)
    work = f"MACs of {unknown} layers unknown ({inspection.cure})" if unknown else f"{total} MACs per sample"
    gradients: tuple[Section, ...] = ()
    if outlooks is not None:
        whole = sum(o.reaches_outputs for o in outlooks)
        says = f"refinement: gradients of the outputs reach {whole} of {len(outlooks)} layers"
        gradients = section("Refinement", _lines([says]), parts.outlook(outlooks))
    return Document(
        kind="inspect",
        subject=Path(inspection.model).name,
        verdict=f"{inspection.model}: opset {inspection.opset}, IR {inspection.ir_version}, {tensors} of tensors; "
        f"{len(layers)} prunable layers with {weights} weights, {work}",
        sections=(*section("Layers", parts.inspected(layers, inspection.cure)), *_left_out(inspection), *gradients),
        data=inspection,
    )


def _short(provenance: Provenance) -> str:
    return Path(provenance.model).name


def _lines(lines: Iterable[str]) -> Sentences:
    return Sentences(tuple(lines))


def _notes(notes: Iterable[str]) -> Sentences:
    return _lines(f"note: {note}" for note in notes)


def _exports(exports: Sequence[Exported]) -> tuple[Section, ...]:
    notes = [f"{e.form}: {note}" for e in exports for note in (*e.notes, *(f"also wrote {path}" for path in e.companions))]
    return section("Exports", parts.exports(exports), _lines(notes))


def _refinement(refinement: Refinement) -> tuple[Section, ...]:
    lines = [words.refinement_verdict(refinement), *words.refinement_lines(refinement)]
    return section("Refinement", _lines(lines), details=parts.history(refinement))


def _curves(analysis: Analysis, says: Sentences | None = None) -> tuple[Section, ...]:
    return section("Repairability against sparsity", details=[says, *parts.curves(analysis.layers)])


def _left_out(looked_at: Analysis | Inspection) -> tuple[Section, ...]:
    return section("What was left as it is", parts.skipped(looked_at.skipped), _notes(looked_at.notes))


def _reproduction(
    provenance: Provenance,
    config: Config,
    command: str | None,
    *,
    allocate: str | None = None,
    model: ModelProto | None = None,
) -> tuple[Section, ...]:
    """The inputs by name and hash, the settings; `model` is what came out."""
    made = {} if model is None else {"sparse model, hash": graphs.model_hash(model)}
    facts = {
        "model": provenance.model,
        "model, hash": provenance.model_sha256,
        "calibration data": "random data" if provenance.random_data else provenance.data,
        "calibration data, hash": provenance.data_sha256,
        "calibration samples": words.count(provenance.calibration_samples),
        **({"bad samples left out": words.count(len(provenance.left_out))} if provenance.left_out else {}),
        **made,
        "allocate": allocate or config.allocate,
        "pattern": config.pattern,
        "repair": config.repair,
        "seed": str(config.seed),
        "threads": str(config.threads or "default"),
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.versions.items()),
    }
    settings = Code("all settings, as --config reads them", config.to_json())
    return section("How to reproduce", _command(command), parts.facts(facts), details=[settings])


def _command(command: str | None) -> Code | None:
    return None if command is None else Code("command line", command)
