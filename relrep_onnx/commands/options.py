"""Options of the command line: their types, and the groups that commands share.

Most options are fields of `Config`; `setting` gives them the field's name and default, so each is said once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from relrep_onnx import graph as graphs
from relrep_onnx.config import RANGES, Config
from relrep_onnx.data import files_of as data_files
from relrep_onnx.deployment import RUNTIMES
from relrep_onnx.export import EXPORTERS
from relrep_onnx.repair import REPAIRS
from relrep_onnx.report import FACES, NO_PICTURES, PICTURES
from relrep_onnx.types import MOST, ConfigError

if TYPE_CHECKING:
    Parameter = click.ParamType[Any]
else:  # generic in newer releases of click only
    Parameter = click.ParamType

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULTS = Config()


class Real(click.FloatRange):
    """A number in a range; NaN is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to a float."""
        if self.max == 1 and 1 < (percent := click.FLOAT.convert(value, param, ctx)) <= 100:
            self.fail(f"{value} is not in the range 0<=x<=1; for {percent:g} % give {percent / 100:g}", param, ctx)
        number = super().convert(value, param, ctx)
        return self.fail(f"{value!r} is not a number", param, ctx) if math.isnan(number) else number


class Numbers(Parameter):
    """Comma-separated numbers; `count` fixes how many, `between` the least and the largest."""

    name = "numbers"

    def __init__(
        self,
        kind: type[int] | type[float],
        count: int | None = None,
        metavar: str = "N,N",
        between: tuple[int, int] | None = None,
    ) -> None:
        self.kind, self.count, self.name, self.between = kind, count, metavar, between

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
        for number in numbers:
            if self.between is not None and not self.between[0] <= number <= self.between[1]:
                self.fail(f"{number} is not between {self.between[0]} and {self.between[1]}", param, ctx)
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


class Forms(Parameter):
    """Comma-separated forms, each one or several joined by +; whether they combine is checked where they are known."""

    name = "FORM[,FORM]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to a tuple."""
        return value if isinstance(value, tuple) else tuple(str(value).split(","))


class InputFile(click.Path):
    """What a command reads; `files` lists those that a value stands for."""

    def __init__(self, files: Callable[[Any], Iterable[Path]] = lambda value: [Path(value)], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.files = files


MODEL: Final = InputFile(graphs.files_of, exists=True, dir_okay=False, path_type=Path)
DATA: Final = InputFile(data_files)


class OutputFile(click.Path):
    """A file to write, refused before the work begins where its folder is missing, or where it has none of the `suffixes`."""

    def __init__(self, suffixes: Collection[str] = ()) -> None:
        super().__init__(dir_okay=False, path_type=Path)
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to a path."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            self.fail(f"cannot write {str(path)!r}: its name must end in {', '.join(self.suffixes)}", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"cannot write {str(path)!r}: its folder does not exist", param, ctx)
        return path


class Picture(OutputFile):
    """A picture to write, refused before the work begins where matplotlib is missing, too."""

    def __init__(self) -> None:
        super().__init__(PICTURES)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to a path."""
        path = super().convert(value, param, ctx)
        if find_spec("matplotlib") is None:
            raise ConfigError(NO_PICTURES)
        return path


UNITS: Final = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class Bytes(Parameter):
    """A size such as 800M or 2G."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to bytes."""
        text = str(value).lower().removesuffix("b")
        unit = UNITS.get(text[-1:], 1)
        try:
            return int(float(text.rstrip("kmg")) * unit)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no size such as 800M or 2G", param, ctx)


def _options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def setting(flag: str, **kwargs: Any) -> Callable[[Command], Command]:
    """An option for one field of `Config`, with the field's default."""
    field = kwargs.pop("field", flag.removeprefix("--").replace("-", "_"))
    default = None if kwargs.get("multiple") else getattr(DEFAULTS, field)
    return click.option(
        flag, field, default=default, show_default=default is not None and not isinstance(default, tuple | bool), **kwargs
    )


def whole(flag: str, **kwargs: Any) -> Callable[[Command], Command]:
    """A `setting` that is a whole number, in the range that `Config` gives it."""
    field = kwargs.get("field", flag.removeprefix("--").replace("-", "_"))
    return setting(flag, type=click.IntRange(*RANGES[field]), **kwargs)


RUN_OPTIONS = _options(
    whole("--threads", help="Threads of ONNX Runtime (and, of a command, of NumPy's products); 0 leaves the choice to them."),
    setting(
        "--providers", multiple=True, metavar="NAME", help="Execution provider, most wanted first; repeatable. Default: CPU."
    ),
    setting(
        "--custom-op-library", type=InputFile(), metavar="FILE", help="Shared library with custom operators the model needs."
    ),
)
DATA_OPTIONS = _options(
    setting("--calib-key", metavar="KEY", help="Array to take from an .npz whose keys are not the input's name."),
    setting("--image-size", type=Numbers(int, 2, "H,W", (1, MOST)), help="Resize uint8 images to this height and width."),
    setting("--mean", type=Numbers(float, metavar="M,M,M"), help="Subtracted from scaled uint8 images, per channel."),
    setting("--std", type=Numbers(float, metavar="S,S,S"), help="Divides after the mean, per channel."),
    setting("--scale", type=float, help="Multiplies uint8 pixels first.  [default: 1/255]"),
    setting("--layout", type=click.Choice(["nchw", "nhwc"]), help="Layout the model wants.  [default: from its input's shape]"),
    setting("--color", type=click.Choice(["rgb", "bgr"]), help="Channel order the model wants."),
    whole("--batch-size", help="Samples per run, where the model leaves it open."),
    whole("--num-samples", help="Use only the first so many samples."),
    setting(
        "--skip-bad-samples",
        is_flag=True,
        help="Leave out, and count, samples that cannot be read, do not fit, or make the model fail or give NaN or infinity.",
    ),
)
INPUT_SHAPE = setting(
    "--input-shape",
    multiple=True,
    type=NamedValue(":", Numbers(int, metavar="1,3,224,224", between=(1, MOST)), "NAME:1,3,224,224"),
    help="Fixes the shape of an input where the model leaves it open (with data: for random only); repeatable.",
)
RANDOM_OPTIONS = _options(
    INPUT_SHAPE,
    setting("--random-range", type=Numbers(float, 2, "LO,HI"), help="Range of random integers, with --calib random."),
)
NODE_OPTIONS = _options(
    setting(
        "--nodes-to-exclude", multiple=True, metavar="NAME", help="Node or weight name, or a regular expression; repeatable."
    ),
    setting("--op-types", multiple=True, metavar="OP", help="Take only these operator types; repeatable.  [default: all]"),
)
SELECT_OPTIONS = _options(
    whole("--min-size", help="Weights with fewer elements stay."),
    NODE_OPTIONS,
)
SAMPLE_OPTIONS = _options(
    click.option(
        "--calib",
        type=DATA,
        required=True,
        metavar="DATA",
        help="Unlabelled samples: .npz, .npy, a folder of these or of images, a folder of test_data_set_*, or the word random.",
    ),
    click.option("--holdout", type=DATA, metavar="DATA", help="Samples for verification.  [default: the last eighth of --calib]"),
    DATA_OPTIONS,
    RANDOM_OPTIONS,
    whole("--seed", help="Seed of all sampling."),
    RUN_OPTIONS,
    setting(
        "--max-memory", type=Bytes(), help="Memory for waiting activations, disk beyond.  [default: a quarter of what is free]"
    ),
)
CALIBRATE_OPTIONS = _options(
    SAMPLE_OPTIONS,
    whole("--positions", help="Output positions sampled per sample and layer."),
    click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), help="Keeps the dense model's statistics."),
)
JSON_OPTION = click.option("--json", "json_path", type=OutputFile(), help="Also write the result here.")
REPORT_OPTION = click.option(
    "--report",
    "report_path",
    type=OutputFile(FACES),
    help=f"Also write a report: {', '.join(FACES)}.  The first is one page with charts that needs no network.",
)
QUIET_OPTION = click.option("--quiet", is_flag=True, help="No progress, no report.")
CONFIG_OPTION = click.option(
    "--config",
    "config_path",
    type=InputFile(exists=True, dir_okay=False, path_type=Path),
    help="Settings from a JSON file; options on the command line win.",
)
METHOD_OPTIONS = _options(
    setting(
        "--sparsity",
        type=Real(0, 1),
        help="Fraction of zeros among the prunable weights (or of their MACs).  [default: 0.8; with N:M all it allows]",
    ),
    setting("--repair", type=click.Choice(list(REPAIRS)), help="How survivors and biases are corrected."),
)
REFINE_OPTIONS = _options(
    setting(
        "--augment",
        metavar="KINDS",
        help="Augmentation of refinement: crop,flip,mixup or some of them, none, or auto (short trials decide).",
    ),
    click.option(
        "--resume",
        type=click.Path(file_okay=False, path_type=Path),
        help="Keep each finished layer and epoch in this folder; the same command goes on from what is there.",
    ),
)
MAX_BYTES = setting("--max-bytes", type=Bytes(), help="Gate: largest size of a written file, its external data included.")
GATE_OPTIONS = _options(
    setting("--max-error", type=Real(0), help="Gate: largest relative L2 error of an output on held-out samples."),
    setting("--min-agreement", type=Real(0, 1), help="Gate: least top-1 agreement with the dense model."),
    setting(
        "--eval",
        metavar="MODULE:FUNCTION",
        help="Your own metric, called with an onnxruntime.InferenceSession; larger is better.",
    ),
    setting("--min-metric", type=float, help="Gate: least value of --eval."),
    MAX_BYTES,
)
OUTPUT_OPTIONS = _options(
    click.argument("output", type=click.Path(path_type=Path), required=False),
    click.option("-o", "--output", "output_option", type=click.Path(path_type=Path), help="The same as OUTPUT."),
)
FORM_OPTIONS = _options(
    setting("--values", type=click.Choice(["float32", "float16", "int8"]), help="How compact and sparse-ort store weights."),
    setting("--target", type=click.Choice(["amd64", "arm"]), help="Processor that int8 and ort are made for."),
    setting("--tune", is_flag=True, help="Times the sparse layers of sparse-ort on this machine, instead of predicting them."),
)
EXPORT_OPTIONS = _options(
    setting(
        "--to",
        field="forms",
        type=Forms(),
        help=f"Forms to write: {', '.join(EXPORTERS)}, or combined as in int8+compact; several go into OUTPUT as a folder.  "
        "[default: onnx]",
    ),
    FORM_OPTIONS,
)
FOR_OPTION = click.option(
    "--for",
    "runtime",
    type=click.Choice(list(RUNTIMES)),
    help="Picks the pattern, the layers and the form that pay on a runtime; other options win.",
)
