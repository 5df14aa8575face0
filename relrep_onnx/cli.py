"""The command line: options become a `Config`, results become text, errors become one sentence and an exit code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import relrep_onnx
from relrep_onnx import report
from relrep_onnx.allocate import ALLOCATORS
from relrep_onnx.config import Config
from relrep_onnx.estimate import estimate
from relrep_onnx.inspection import inspect as inspect_model
from relrep_onnx.pipeline import analyze as run_analyze
from relrep_onnx.pipeline import compare as run_compare
from relrep_onnx.pipeline import optimize as run_optimize
from relrep_onnx.repair import REPAIRS
from relrep_onnx.results import Analysis, to_json
from relrep_onnx.runtime import mobile_usability
from relrep_onnx.types import ConfigError, RelRepError, Selection, VerificationError
from relrep_onnx.types import Progress as ProgressCallback
from relrep_onnx.verify import Fidelity, check_gates

if TYPE_CHECKING:
    Parameter = click.ParamType[Any]
else:  # generic in newer releases of click only
    Parameter = click.ParamType

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULTS = Config()


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


class Numbers(Parameter):
    """Comma-separated numbers; `count` fixes how many."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], count: int | None = None, metavar: str = "N,N") -> None:
        self.kind, self.count, self.name = kind, count, metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to a tuple."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as {self.name}", param, ctx)
        if self.count is not None and len(numbers) != self.count:
            self.fail(f"{value!r} holds {len(numbers)} numbers, not {self.count}", param, ctx)
        return numbers


class NamedValue(Parameter):
    """NAME and a value after the last separator."""

    def __init__(self, separator: str, value: Parameter, metavar: str) -> None:
        self.separator, self.value, self.name = separator, value, metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to a pair."""
        if isinstance(value, tuple):
            return value
        name, found, text = str(value).rpartition(self.separator)
        if not found or not name:
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        return name, self.value.convert(text, param, ctx)


class Bytes(Parameter):
    """A size such as 800M or 2G."""

    name = "SIZE"
    units: dict[str, int] = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}  # noqa: RUF012 - a constant

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to bytes."""
        text = str(value).lower().removesuffix("b")
        unit = self.units.get(text[-1:], 1)
        try:
            return int(float(text.rstrip("kmg")) * unit)
        except ValueError:
            self.fail(f"{value!r} is no size such as 800M or 2G", param, ctx)


def _options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _setting(flag: str, **kwargs: Any) -> Callable[[Command], Command]:
    """An option for one field of `Config`, with the field's default."""
    field = kwargs.pop("field", flag.removeprefix("--").replace("-", "_"))
    default = None if kwargs.get("multiple") else getattr(DEFAULTS, field)
    return click.option(flag, field, default=default, show_default=default is not None, **kwargs)


RUN_OPTIONS = _options(
    _setting("--threads", type=click.IntRange(0), help="Threads of ONNX Runtime; 0 leaves the choice to it."),
    _setting(
        "--providers", multiple=True, metavar="NAME", help="Execution provider, most wanted first; repeatable. Default: CPU."
    ),
    _setting("--custom-op-library", metavar="FILE", help="Shared library with custom operators the model needs."),
)
DATA_OPTIONS = _options(
    _setting("--calib-key", metavar="KEY", help="Array to take from an .npz whose keys are not the input's name."),
    _setting("--image-size", type=Numbers(int, 2, "H,W"), help="Resize uint8 images to this height and width."),
    _setting("--mean", type=Numbers(float, metavar="M,M,M"), help="Subtracted from scaled uint8 images, per channel."),
    _setting("--std", type=Numbers(float, metavar="S,S,S"), help="Divides after the mean, per channel."),
    _setting("--scale", type=float, help="Multiplies uint8 pixels first.  [default: 1/255]"),
    _setting("--layout", type=click.Choice(["nchw", "nhwc"]), help="Layout the model wants.  [default: from its input's shape]"),
    _setting("--color", type=click.Choice(["rgb", "bgr"]), help="Channel order the model wants."),
    _setting("--batch-size", type=click.IntRange(1), help="Samples per run, where the model leaves it open."),
    _setting("--num-samples", type=click.IntRange(1), help="Use only the first so many samples."),
)
RANDOM_OPTIONS = _options(
    _setting(
        "--input-shape",
        multiple=True,
        type=NamedValue(":", Numbers(int, metavar="1,3,224,224"), "NAME:1,3,224,224"),
        help="Fixes open dimensions of an input for random data; repeatable.",
    ),
    _setting("--random-range", type=Numbers(float, 2, "LO,HI"), help="Range of random integers, with --calib random."),
)
SELECT_OPTIONS = _options(
    _setting("--min-size", type=click.IntRange(0), help="Weights with fewer elements stay."),
    _setting(
        "--nodes-to-exclude", multiple=True, metavar="NAME", help="Node or weight name, or a regular expression; repeatable."
    ),
    _setting("--op-types", multiple=True, metavar="OP", help="Prune only these operator types; repeatable.  [default: all]"),
)
CALIBRATE_OPTIONS = _options(
    click.option(
        "--calib",
        required=True,
        metavar="DATA",
        help="Unlabelled samples: .npz, .npy, a folder of these or of images, a folder of test_data_set_*, or the word random.",
    ),
    click.option("--holdout", metavar="DATA", help="Samples for verification.  [default: the last eighth of --calib]"),
    DATA_OPTIONS,
    RANDOM_OPTIONS,
    _setting("--positions", type=click.IntRange(1), help="Output positions sampled per sample and layer."),
    _setting("--seed", type=click.IntRange(0), help="Seed of all sampling."),
    RUN_OPTIONS,
    _setting(
        "--max-memory", type=Bytes(), help="Memory for waiting activations, disk beyond.  [default: a quarter of what is free]"
    ),
    click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), help="Keeps the dense model's statistics."),
)
JSON_OPTION = click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the result here."
)
QUIET_OPTION = click.option("--quiet", is_flag=True, help="No progress, no report.")
CONFIG_OPTION = click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Settings from a JSON file; options on the command line win.",
)
METHOD_OPTIONS = _options(
    _setting("--sparsity", type=click.FloatRange(0, 1), help="Fraction of zeros among the prunable weights (or of their MACs)."),
    _setting("--repair", type=click.Choice(list(REPAIRS)), help="How survivors and biases are corrected."),
)
MODEL = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(relrep_onnx.__version__, prog_name="relrep-onnx")
def main() -> None:
    """Prune an exported ONNX model with a few hundred unlabelled samples, and repair what pruning breaks.

    Exit codes: 0 ok, 1 error, 2 usage, 3 a gate was not met (nothing is written then).
    """


@main.command()
@click.argument("model", type=MODEL)
@SELECT_OPTIONS
@_setting(
    "--input-shape",
    multiple=True,
    type=NamedValue(":", Numbers(int, metavar="1,3,224,224"), "NAME:1,3,224,224"),
    help="Fixes open dimensions of an input; repeatable.",
)
@click.option("--mobile", is_flag=True, help="Also ask ONNX Runtime's mobile usability checker (NNAPI, CoreML).")
def inspect(model: Path, mobile: bool, **_: Any) -> None:
    """Show what can be pruned, what stays and why, and the MACs per layer."""
    config = _config(None)
    inspection = inspect_model(model, Selection(config.min_size, config.nodes_to_exclude, config.op_types), config.input_shape)
    console = report.console_for()
    console.print(report.render_inspection(inspection))
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
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="RR curves as a picture (.png, .svg, .pdf).")
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
    with _progress(quiet) as progress:
        analysis = run_analyze(model, calib, _config(config_path), holdout=holdout, cache_dir=cache_dir, progress=progress)
    _write_json(analysis, json_path)
    if plot is not None:
        report.plot_curves(analysis, plot)
    if not quiet:
        report.console_for().print(report.render_analysis(analysis))


@main.command()
@click.argument("model", type=MODEL)
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option("-o", "--output", "output_option", type=click.Path(dir_okay=False, path_type=Path), help="The same as OUTPUT.")
@click.option("--in-place", is_flag=True, help="Replace the input file.")
@CALIBRATE_OPTIONS
@SELECT_OPTIONS
@METHOD_OPTIONS
@_setting("--budget", type=click.Choice(["weights", "macs"]), help="What --sparsity counts.")
@_setting("--allocate", type=click.Choice(list(ALLOCATORS)), help="How the budget is spread over the layers.")
@_setting("--min-layer-sparsity", type=click.FloatRange(0, 1), help="Every layer gets at least this.")
@_setting("--max-layer-sparsity", type=click.FloatRange(0, 1), help="No layer gets more than this.")
@_setting(
    "--layer-sparsity",
    multiple=True,
    type=NamedValue("=", click.FloatRange(0, 1), "NAME=0.3"),
    help="Fixes the sparsity of one layer; repeatable.",
)
@_setting("--max-error", type=click.FloatRange(0), help="Gate: largest relative L2 error of an output on held-out samples.")
@_setting("--min-agreement", type=click.FloatRange(0, 1), help="Gate: least top-1 agreement with the dense model.")
@_setting(
    "--eval", metavar="MODULE:FUNCTION", help="Your own metric, called with an onnxruntime.InferenceSession; larger is better."
)
@_setting("--min-metric", type=float, help="Gate: least value of --eval.")
@click.option("--dry-run", is_flag=True, help="Estimate time and memory, write nothing.")
@JSON_OPTION
@CONFIG_OPTION
@click.option("--save-config", type=click.Path(dir_okay=False, path_type=Path), help="Write the settings of this run as JSON.")
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
    quiet: bool,
    **_: Any,
) -> None:
    """Prune MODEL, repair it, verify it on held-out samples, and write it to OUTPUT."""
    config = _config(config_path)
    target = _target(model, output, output_option, in_place, dry_run)
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
    with _progress(quiet) as progress:
        result = run_optimize(
            model, target, calib, config, holdout=holdout, cache_dir=cache_dir, in_place=in_place, progress=progress
        )
    _write_json(result, json_path)
    if not quiet:
        console = report.console_for()
        console.print(report.render_result(result))
        console.print(f"wrote {report.clean(str(target))} in {result.seconds:.1f} s", style="bold", markup=False)


@main.command()
@click.argument("dense", type=MODEL)
@click.argument("sparse", type=MODEL)
@click.option("--data", required=True, metavar="DATA", help="Samples, in every form --calib takes.")
@DATA_OPTIONS
@RANDOM_OPTIONS
@_setting("--seed", type=click.IntRange(0), help="Seed of random data.")
@RUN_OPTIONS
@_setting("--max-error", type=click.FloatRange(0), help="Gate: largest relative L2 error of an output.")
@_setting("--min-agreement", type=click.FloatRange(0, 1), help="Gate: least top-1 agreement.")
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


def _config(path: Path | None) -> Config:
    """The configuration file, with what was said on the command line on top."""
    context = click.get_current_context()
    fields = {f.name for f in dataclasses.fields(Config)}
    said: dict[str, Any] = {
        name: dict(value) if name in ("input_shape", "layer_sparsity") else value
        for name, value in context.params.items()
        if name in fields and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    return dataclasses.replace(Config.load(path) if path is not None else Config(), **said)


def _target(model: Path, output: Path | None, option: Path | None, in_place: bool, dry_run: bool) -> Path | None:
    if output is not None and option is not None:
        raise ConfigError(f"two outputs: {str(output)!r} and -o {str(option)!r}; give one")
    target = output or option
    if in_place and target is not None and target.absolute() != model.absolute():
        raise ConfigError("--in-place replaces the input; it cannot apply together with another output")
    if target is None and not in_place and not dry_run:
        raise ConfigError("give an OUTPUT file, or --in-place to replace the input")
    return model if in_place else target


def _write_json(result: Analysis | Fidelity, path: Path | None) -> None:
    if path is not None:
        _write_text(path, to_json(result) + "\n")


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}") from error


@contextmanager
def _progress(quiet: bool) -> Iterator[ProgressCallback]:
    """Bars on a terminal, one line per quarter otherwise, nothing when quiet; all on stderr."""
    console = Console(stderr=True)
    if quiet:
        yield lambda phase, done, total: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            tasks: dict[str, TaskID] = {}

            def show(phase: str, done: int, total: int) -> None:
                task = tasks.get(phase)
                if task is None:
                    task = tasks[phase] = bars.add_task(phase, total=total)
                bars.update(task, completed=done, total=total)

            yield show
    else:
        shown: dict[str, int] = {}

        def say(phase: str, done: int, total: int) -> None:
            quarter = 4 * done // max(1, total)
            if quarter > shown.get(phase, -1):
                shown[phase] = quarter
                click.echo(f"{phase} {done}/{total}", err=True)

        yield say
