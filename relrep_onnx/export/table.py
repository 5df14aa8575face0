"""The forms a model can be exported in, by name, and their combination: `int8+compact` makes the second from the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from onnx import ModelProto

from relrep_onnx.export.compact import compact
from relrep_onnx.export.dense import dense
from relrep_onnx.export.forms import Exporter, Order, Product
from relrep_onnx.export.int8 import int8
from relrep_onnx.export.ort import ort
from relrep_onnx.export.sparse_form import sparse_ort
from relrep_onnx.export.sparse_initializer import sparse_initializer
from relrep_onnx.types import ConfigError

EXPORTERS: Final[Mapping[str, Exporter]] = {
    "onnx": dense,
    "compact": compact,
    "int8": int8,
    "ort": ort,
    "sparse-initializer": sparse_initializer,
    "sparse-ort": sparse_ort,
}
VALUES_APPLY: Final = frozenset({"compact", "sparse-ort"})
"""Forms that `Order.values` means something to."""
TARGET_APPLIES: Final = frozenset({"int8", "ort"})
"""Forms that `Order.target` means something to."""
TUNE_APPLIES: Final = frozenset({"sparse-ort"})
"""Forms that `Order.tune` means something to."""
LAST: Final = "ort"
"""What it writes is no ONNX model any more."""


def check_forms(forms: Sequence[str], order: Order) -> None:
    """Refuses forms that do not exist or do not combine, and options that none of them takes.

    Raises:
        ConfigError: with what would do.
    """
    if not forms or len(set(forms)) < len(forms):
        raise ConfigError(f"--to {','.join(forms)}: give each form once; known: {', '.join(EXPORTERS)}")
    parts = {part for form in forms for part in form.split("+")}
    unknown = sorted(parts - EXPORTERS.keys())
    if unknown:
        raise ConfigError(f"--to: no form is called {unknown[0]!r}; known: {', '.join(EXPORTERS)}, combined such as int8+compact")
    for form in forms:
        if LAST in form.split("+")[:-1] or len(set(form.split("+"))) < form.count("+") + 1:
            raise ConfigError(f"--to {form}: each part once, and {LAST} last, for it is no ONNX model any more")
        if "sparse-initializer" in form.split("+")[:-1]:
            raise ConfigError(f"--to {form}: sparse-initializer comes last, for other tools break on it")
        if "sparse-ort" in form.split("+") and form != "sparse-ort":
            raise ConfigError(f"--to {form}: sparse-ort stands alone, its weights are packed already; for int8 add --values int8")
    for flag, given, takers in (
        (f"--values {order.values}", order.values != Order().values, VALUES_APPLY),
        (f"--target {order.target}", order.target != Order().target, TARGET_APPLIES),
        ("--tune", order.tune, TUNE_APPLIES),
    ):
        if given and not parts & takers:
            raise ConfigError(f"{flag} cannot apply to --to {','.join(forms)}; it is for {', '.join(sorted(takers))}")
    if "sparse-ort" in parts and order.values == "float16":
        raise ConfigError("--values float16: the sparse kernels of --to sparse-ort compute float32 or int8; choose one of these")


def suffix_of(form: str) -> str:
    """What the name of a form's file ends with; ONNX Runtime tells the two formats apart by it."""
    return ".ort" if form.split("+")[-1] == LAST else ".onnx"


def places_for(forms: Sequence[str], output: Path, stem: str) -> dict[str, Path]:
    """Where each form goes: one to the output itself, several into the folder of that name, as `stem.form.onnx` or `.ort`.

    Raises:
        ConfigError: one form's file name has the other format's suffix.
    """
    if len(forms) > 1:
        if output.exists() and not output.is_dir():
            raise ConfigError(f"several forms go into a folder; {str(output)!r} is a file")
        names = {form: "" if form == "onnx" else f".{form}" for form in forms}  # not x.onnx.onnx
        return {form: output / f"{stem}{names[form]}{suffix_of(form)}" for form in forms}
    (form,) = forms
    suffix = suffix_of(form)
    if (output.suffix == ".ort") != (suffix == ".ort"):
        raise ConfigError(f"--to {form} writes a {suffix} file; rename the output {str(output)!r} to end with {suffix}")
    return {form: output}


def make(form: str, model: ModelProto, order: Order) -> Product:
    """The product of a form or a combination.

    Raises:
        RelRepError: what the exporters raise.
    """
    product = Product(model, 0.0)
    for part in form.split("+"):
        if isinstance(product.content, bytes):
            raise ConfigError(f"--to {form}: {LAST} must come last")
        step = EXPORTERS[part](product.content, order)
        product = Product(
            step.content,
            product.tolerance + step.tolerance,
            (*product.notes, *step.notes),
            {**product.companions, **step.companions},
            step.kernels,
        )
    return product
