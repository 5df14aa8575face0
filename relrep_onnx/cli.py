"""The command line: options become a `Config`, results become text, errors become one sentence and an exit code."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import RenderableType

import relrep_onnx
from relrep_onnx import graph as graphs
from relrep_onnx import report
from relrep_onnx.allocate import ALLOCATORS, AUTO
from relrep_onnx.benchmark import BenchmarkResult, Plan
from relrep_onnx.benchmark import benchmark as run_benchmark
from relrep_onnx.benchmark import require_same as check_same
from relrep_onnx.config import DEFAULT_EPOCHS, EFFORTS, Config
from relrep_onnx.distill import outlook
from relrep_onnx.estimate import estimate
from relrep_onnx.inspection import inspect as inspect_model
from relrep_onnx.options import (
    CALIBRATE_OPTIONS,
    CONFIG_OPTION,
    DATA_OPTIONS,
    EXPORT_OPTIONS,
    FOR_OPTION,
    GATE_OPTIONS,
    INPUT_SHAPE,
    JSON_OPTION,
    METHOD_OPTIONS,
    MODEL,
    OUTPUT_OPTIONS,
    QUIET_OPTION,
    RANDOM_OPTIONS,
    REFINE_OPTIONS,
    RUN_OPTIONS,
    SELECT_OPTIONS,
    NamedValue,
    Numbers,
    OutputFile,
    setting,
)
from relrep_onnx.pipeline import analyze as run_analyze
from relrep_onnx.pipeline import compare as run_compare
from relrep_onnx.pipeline import export_model
from relrep_onnx.pipeline import optimize as run_optimize
from relrep_onnx.pipeline import refine as run_refine
from relrep_onnx.progress import shown_progress
from relrep_onnx.results import Analysis, Refined, exports_to_json, to_json
from relrep_onnx.runtime import RuntimeOptions, mobile_usability
from relrep_onnx.types import ConfigError, RelRepError, Selection, VerificationError
from relrep_onnx.verify import Fidelity, check_gates


class UsageFailure(click.ClickException):
    """A setting is wrong or cannot apply."""

    exit_code = 2


class GateFailure(click.ClickException):
    """A gate was not met."""

    exit_code = 3


FAILURES: dict[type[RelRepError], type[click.ClickException]] = {ConfigError: UsageFailure, VerificationError: GateFailure}


class Commands(click.Group):
    """Turns the package's errors into one sentence and an exit code; all but the above are 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except RelRepError as error:
            kind = FAILURES.get(type(error), click.ClickException)
            raise kind(report.clean(str(error))) from error
        except MemoryError as error:
            raise click.ClickException(
                "out of memory; give --max-memory, fewer --num-samples or a smaller --batch-size"
            ) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(relrep_onnx.__version__, prog_name="relrep-onnx")
def main() -> None:
    """Prune an exported ONNX model with a few hundred unlabelled samples, and repair what pruning breaks.

    Exit codes: 0 ok, 1 error, 2 usage, 3 a gate was not met (nothing is written then).
    """


@main.command()
@click.argument("model", type=MODEL)
@SELECT_OPTIONS
@INPUT_SHAPE
@click.option("--gradients", is_flag=True, help="Also list which layers can be refined, and what stops the gradients of others.")
@click.option("--mobile", is_flag=True, help="Also ask ONNX Runtime's mobile usability checker (NNAPI, CoreML).")
def inspect(model: Path, gradients: bool, mobile: bool, **_: Any) -> None:
    """Show what can be pruned, what stays and why, and the MACs per layer."""
    config = _config(None)
    inspection = inspect_model(model, Selection(config.min_size, config.nodes_to_exclude, config.op_types), config.input_shape)
    console = report.console_for()
    console.print(report.render_inspection(inspection))
    if gradients:
        console.print(report.render_outlook(outlook(graphs.load(model).model, [facts.layer for facts in inspection.layers])))
    if mobile:
        usable, lines = mobile_usability(model)
        console.print("\nONNX Runtime Mobile: NNAPI or CoreML " + ("may help" if usable else "will not help"), style="bold")
        console.print("\n".join(map(report.clean, lines)), markup=False)


@main.command()
@click.argument("model", type=MODEL)
@CALIBRATE_OPTIONS
@SELECT_OPTIONS
@METHOD_OPTIONS
@JSON_OPTION
@click.option("--plot", type=OutputFile(), help="RR curves as a picture (.png, .svg, .pdf).")
@CONFIG_OPTION
@QUIET_OPTION
def analyze(
    model: Path,
    calib: str,
    holdout: str | None,
    cache_dir: Path | None,
    json_path: Path | None,
    plot: Path | None,
    config_path: Path | None,
    quiet: bool,
    **_: Any,
) -> None:
    """Measure Relative Repairability of every layer: how much pruning damage repair cannot undo."""
    with shown_progress(quiet) as progress:
        analysis = run_analyze(model, calib, _config(config_path), holdout=holdout, cache_dir=cache_dir, progress=progress)
    _write_json(analysis, json_path)
    if plot is not None:
        report.plot_curves(analysis, plot)
    if not quiet:
        report.console_for().print(report.render_analysis(analysis))


@main.command()
@click.argument("model", type=MODEL)
@OUTPUT_OPTIONS
@click.option("--in-place", is_flag=True, help="Replace the input file.")
@CALIBRATE_OPTIONS
@SELECT_OPTIONS
@METHOD_OPTIONS
@setting("--budget", type=click.Choice(["weights", "macs"]), help="What --sparsity counts.")
@setting(
    "--pattern",
    metavar="PATTERN",
    help="unstructured, N:M along input channels (2:4), or blocks RxC of output by input channels.",
)
@setting(
    "--max-drop",
    metavar="DROP",
    help="Find the largest sparsity that drops less: 0.1 (relative L2 of the outputs), top1:5%, or eval:0.01 with --eval.",
)
@setting(
    "--allocate", type=click.Choice([AUTO, *ALLOCATORS]), help="How the budget is spread over the layers; auto tries several."
)
@setting("--min-layer-sparsity", type=click.FloatRange(0, 1), help="Every layer gets at least this.")
@setting("--max-layer-sparsity", type=click.FloatRange(0, 1), help="No layer gets more than this.")
@setting(
    "--layer-sparsity",
    multiple=True,
    type=NamedValue("=", click.FloatRange(0, 1), "NAME=0.3"),
    help="Fixes the sparsity of one layer; repeatable.",
)
@setting("--refine", type=click.IntRange(0), metavar="EPOCHS", help="Then move all survivors together for so many epochs.")
@REFINE_OPTIONS
@click.option(
    "--effort",
    type=click.Choice(list(EFFORTS)),
    help="Sets samples, repair and epochs together (docs/refinement.md); other options win.",
)
@GATE_OPTIONS
@EXPORT_OPTIONS
@FOR_OPTION
@click.option("--dry-run", is_flag=True, help="Estimate time and memory, write nothing.")
@JSON_OPTION
@CONFIG_OPTION
@click.option("--save-config", type=OutputFile(), help="Write the settings of this run as JSON.")
@QUIET_OPTION
def optimize(
    model: Path,
    output: Path | None,
    output_option: Path | None,
    in_place: bool,
    calib: str,
    holdout: str | None,
    cache_dir: Path | None,
    dry_run: bool,
    json_path: Path | None,
    config_path: Path | None,
    save_config: Path | None,
    checkpoint: Path | None,
    effort: str | None,
    quiet: bool,
    **_: Any,
) -> None:
    """Prune MODEL, repair it, verify it on held-out samples, and write it to OUTPUT (a folder with several --to forms)."""
    config = _config(config_path, EFFORTS[effort] if effort else {})
    if checkpoint is not None and not config.refine:
        raise ConfigError("--resume is about refinement; give --refine EPOCHS too")
    target = _target(model, output, output_option, in_place, dry_run)
    if dry_run and json_path is not None:
        raise ConfigError("--json cannot apply to --dry-run: there is no result to write")
    if save_config is not None:
        _write_text(save_config, config.to_json() + "\n")
    if dry_run:
        plan = estimate(model, calib, config, holdout=holdout)
        spill = ", waiting activations partly on disk" if plan.spilled else ""
        click.echo(
            f"{plan.layers} layers, {plan.samples} calibration samples: about {plan.seconds:.0f} s and "
            f"{plan.memory_bytes / 1e6:.0f} MB of memory{spill}; nothing was written"
        )
        return
    with shown_progress(quiet) as progress:
        result = run_optimize(
            model,
            target,
            calib,
            config,
            holdout=holdout,
            cache_dir=cache_dir,
            in_place=in_place,
            checkpoint=checkpoint,
            progress=progress,
        )
    _write_json(result, json_path)
    if not quiet:
        _show(report.render_result(result), ", ".join(e.output for e in result.exports) or str(target), result.seconds)


@main.command()
@click.argument("model", type=MODEL)
@OUTPUT_OPTIONS
@EXPORT_OPTIONS
@click.option(
    "--calib",
    metavar="DATA",
    help="Samples in every form optimize takes: int8 is calibrated on most of them, every export compared on the rest.  "
    "[default: compared on random inputs]",
)
@click.option("--holdout", metavar="DATA", help="Samples to compare on.  [default: from the end of --calib]")
@DATA_OPTIONS
@RANDOM_OPTIONS
@setting("--seed", type=click.IntRange(0), help="Seed of random data.")
@RUN_OPTIONS
@setting("--max-error", type=click.FloatRange(0), help="Largest relative L2 an export may move an output.  [default: by form]")
@setting("--min-agreement", type=click.FloatRange(0, 1), help="Gate: least top-1 agreement with MODEL.")
@JSON_OPTION
@CONFIG_OPTION
@QUIET_OPTION
def export(
    model: Path,
    output: Path | None,
    output_option: Path | None,
    calib: str | None,
    holdout: str | None,
    json_path: Path | None,
    config_path: Path | None,
    quiet: bool,
    **_: Any,
) -> None:
    """Write MODEL to OUTPUT in a form for deployment, load it again, and compare the two before the file counts."""
    config = _config(config_path)
    target = output or output_option
    if target is None or (output is not None and output_option is not None):
        raise ConfigError("give one OUTPUT")
    with shown_progress(quiet) as progress:
        exports = export_model(model, target, calib, config, holdout=holdout, progress=progress)
    if json_path is not None:
        _write_text(json_path, exports_to_json(exports) + "\n")
    if not quiet:
        report.console_for().print(report.render_exports(exports, model.stat().st_size))


@main.command()
@click.argument("dense", type=MODEL)
@click.argument("sparse", type=MODEL)
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option("--in-place", is_flag=True, help="Replace SPARSE.")
@click.option("--epochs", "refine", type=click.IntRange(1), help=f"Passes over the samples.  [default: {DEFAULT_EPOCHS}]")
@REFINE_OPTIONS
@CALIBRATE_OPTIONS
@SELECT_OPTIONS
@GATE_OPTIONS
@JSON_OPTION
@CONFIG_OPTION
@QUIET_OPTION
def refine(
    dense: Path,
    sparse: Path,
    output: Path | None,
    in_place: bool,
    calib: str,
    holdout: str | None,
    checkpoint: Path | None,
    json_path: Path | None,
    config_path: Path | None,
    quiet: bool,
    **_: Any,
) -> None:
    """Move all survivors of SPARSE together until it behaves like DENSE.

    Zeros stay zeros.  Held-out samples decide which state goes to OUTPUT; where none is better, that is SPARSE itself.
    """
    target = _target(sparse, output, None, in_place, False)
    with shown_progress(quiet) as progress:
        result = run_refine(
            dense,
            sparse,
            target,
            calib,
            _config(config_path),
            holdout=holdout,
            in_place=in_place,
            checkpoint=checkpoint,
            progress=progress,
        )
    _write_json(result, json_path)
    if not quiet:
        _show(report.render_refined(result), str(target), result.seconds)


@main.command()
@click.argument("dense", type=MODEL)
@click.argument("sparse", type=MODEL)
@click.option("--data", required=True, metavar="DATA", help="Samples, in every form --calib takes.")
@DATA_OPTIONS
@RANDOM_OPTIONS
@setting("--seed", type=click.IntRange(0), help="Seed of random data.")
@RUN_OPTIONS
@setting("--max-error", type=click.FloatRange(0), help="Gate: largest relative L2 error of an output.")
@setting("--min-agreement", type=click.FloatRange(0, 1), help="Gate: least top-1 agreement.")
@JSON_OPTION
@QUIET_OPTION
def compare(dense: Path, sparse: Path, data: str, json_path: Path | None, quiet: bool, **_: Any) -> None:
    """Compare the outputs of SPARSE with those of DENSE on the same samples."""
    config = _config(None)
    fidelity = run_compare(dense, sparse, data, config)
    _write_json(fidelity, json_path)
    if not quiet:
        report.console_for().print(report.render_fidelity(fidelity))
    gates = config.as_gates()
    gates.check_resolution(fidelity.samples)
    check_gates(fidelity, None, gates)


@main.command()
@click.argument("models", type=MODEL, nargs=-1, required=True, metavar="DENSE SPARSE...")
@click.option("--batch", type=Numbers(int), default="1", show_default=True, help="Batch sizes, where the model leaves it open.")
@click.option(
    "--threads", type=Numbers(int), default="1", show_default=True, help="Numbers of threads; 0 leaves it to ONNX Runtime."
)
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True, help="Each round runs every model once.")
@click.option("--profile", is_flag=True, help="Also show the time of every node.")
@click.option(
    "--require-same", type=click.FloatRange(0), metavar="ERR", help="Gate: largest relative L2 difference of the outputs."
)
@INPUT_SHAPE
@setting("--seed", type=click.IntRange(0), help="Seed of the random inputs.")
@JSON_OPTION
@QUIET_OPTION
def benchmark(
    models: tuple[Path, ...],
    batch: tuple[int, ...],
    threads: tuple[int, ...],
    rounds: int,
    profile: bool,
    require_same: float | None,
    seed: int,
    json_path: Path | None,
    quiet: bool,
    **_: Any,
) -> None:
    """Time models side by side, the first as reference, with the sparse kernels loaded: interleaved runs on random inputs."""
    plan = Plan(threads, batch, rounds, profile, _config(None).input_shape, seed)
    with shown_progress(quiet) as progress:
        settings = run_benchmark(models, plan, RuntimeOptions(), progress)
    _write_json(BenchmarkResult(settings), json_path)
    if not quiet:
        report.console_for().print(report.render_benchmark(settings))
    if require_same is not None:
        check_same(settings, require_same)


def _config(path: Path | None, preset: Mapping[str, Any] | None = None) -> Config:
    """The configuration file, a preset on top, and what was said on the command line on top of both."""
    context = click.get_current_context()
    fields = {f.name for f in dataclasses.fields(Config)}
    said: dict[str, Any] = {
        name: dict(value) if name in ("input_shape", "layer_sparsity") else value
        for name, value in context.params.items()
        if name in fields and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    runtime = said.pop("runtime", None)
    forms = {"forms": said["forms"]} if "forms" in said else {}
    beneath = Config() if runtime is None else Config.for_runtime(runtime, **forms)
    beneath = Config.load(path, beneath) if path is not None else beneath
    return dataclasses.replace(beneath, **{**(preset or {}), **said})


def _target(model: Path, output: Path | None, option: Path | None, in_place: bool, dry_run: bool) -> Path | None:
    if output is not None and option is not None:
        raise ConfigError(f"two outputs: {str(output)!r} and -o {str(option)!r}; give one")
    target = output or option
    if in_place and target is not None and target.absolute() != model.absolute():
        raise ConfigError("--in-place replaces the input; it cannot apply together with another output")
    if target is None and not in_place and not dry_run:
        raise ConfigError("give an OUTPUT file, or --in-place to replace the input")
    return model if in_place else target


def _show(summary: RenderableType, written: str, seconds: float) -> None:
    """The report of a run, and what it wrote."""
    console = report.console_for()
    console.print(summary)
    console.print(f"wrote {report.clean(written)} in {seconds:.1f} s", style="bold", markup=False)


def _write_json(result: Analysis | BenchmarkResult | Fidelity | Refined, path: Path | None) -> None:
    if path is not None:
        _write_text(path, to_json(result) + "\n")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.relrep-{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}") from error
