"""Every model that ONNX's own tests are made of, through the package: `python -m tools.bench.operators`.

The cases of `onnx.backend.test`: those that its generators make, and the models that the onnx package carries.  Generated cases
get their weights as inputs, so each is taken twice: as it is, and with every float input but the first stored in the model.  Each
is inspected, optimized at sparsity 0 (its outputs must not change in one bit) and at 0.5 with random samples.
"""

from __future__ import annotations

import argparse
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.backend.test
from onnx import ModelProto, TensorProto, numpy_helper

from relrep_onnx import Config, RelRepError, optimize
from relrep_onnx.inspection import inspect
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Array, ModelError, Selection
from tools.bench.data import environment, markdown_table

SHIPPED: Final = Path(onnx.backend.test.__file__).parent / "data"
VERDICTS: Final = ("pruned", "nothing to prune", "refused", "not opened", "changed", "crashed")
"""`not opened`: by ONNX Runtime itself; `changed`: at sparsity 0; `crashed`: an exception that is no sentence for the user."""
WIDE: Final = 130
"""Characters of a reason that a table shows."""


@dataclass(frozen=True, eq=False)
class Case:
    """A model and one list of values for its inputs."""

    name: str
    form: str
    model: ModelProto
    values: Sequence[Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a case, and the reason where it did not go through."""

    name: str
    form: str
    verdict: str
    reason: str = ""


def generated() -> Iterator[Case]:
    """The generators' cases, node by node and as small models, as they are and with stored weights."""
    # Not on top: importing them runs every generator.
    from onnx.backend.test.case import model, node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their reference implementations overflow on purpose
        cases = [*node.collect_testcases(None), *model.collect_testcases()]
    for case in cases:
        if case.model is None or not case.data_sets:
            continue
        values = case.data_sets[0][0]
        yield Case(case.name, "generated", case.model, values)
        stored = store_inputs(case.model, values)
        if stored is not None:
            yield Case(case.name, "weights stored", *stored)


def shipped(root: Path = SHIPPED) -> Iterator[Case]:
    """The models that lie in the package, by folder; the light ones come without their inputs."""
    for path in sorted(root.rglob("*.onnx")):
        folder = path.parent / "test_data_set_0"
        values = [_read(file, kind) for file, kind in _inputs(path, folder)] if folder.is_dir() else []
        yield Case(f"{path.parent.name}/{path.stem}", path.relative_to(root).parts[0], onnx.load(path), values)


def _inputs(path: Path, folder: Path) -> Iterator[tuple[Path, onnx.TypeProto]]:
    model = onnx.load(path)
    for number, value in enumerate(model.graph.input):
        file = folder / f"input_{number}.pb"
        if file.exists():
            yield file, value.type


def _read(file: Path, kind: onnx.TypeProto) -> Any:
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(file.read_bytes()))
    return numpy_helper.to_array(TensorProto.FromString(file.read_bytes()))


def store_inputs(model: ModelProto, values: Sequence[Any]) -> tuple[ModelProto, list[Any]] | None:
    """The model with every float tensor but the first input's stored in it, or None where there is none."""
    copy = ModelProto()
    copy.CopyFrom(model)
    moved = {
        value.name: array
        for value, array in list(zip(copy.graph.input, values, strict=False))[1:]
        if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.ndim
    }
    if not moved:
        return None
    kept = [(value, array) for value, array in zip(model.graph.input, values, strict=False) if value.name not in moved]
    del copy.graph.input[:]
    copy.graph.input.extend(value for value, _ in kept)
    copy.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in moved.items())
    copy.ir_version = max(4, copy.ir_version)
    return copy, [array for _, array in kept]


def judge(case: Case) -> Outcome:
    """Takes one case through the package."""
    try:
        verdict, reason = _through(case)
    except RelRepError as error:
        verdict, reason = "refused", str(error)
    except Exception as error:  # what this table is there to find
        verdict, reason = "crashed", "".join(traceback.format_exception_only(error)) + traceback.format_exc().splitlines()[-2]
    return Outcome(case.name, case.form, verdict, reason)


def _through(case: Case) -> tuple[str, str]:
    runtime = RuntimeOptions(threads=1)
    found = inspect(case.model, Selection(min_size=1))
    try:
        dense = Session(case.model.SerializeToString(), runtime)
    except ModelError as error:
        return "not opened", str(error)
    if not found.layers:
        return "nothing to prune", "; ".join(sorted({outline(skipped.reason) for skipped in found.skipped}))
    whole = any(i.dtype is not None and i.dtype.kind in "iu" for i in dense.inputs)
    config = Config(sparsity=0.0, allocate="global", min_size=1, threads=1, random_range=(0, 1) if whole else None)
    same = optimize(case.model, None, "random", config).model
    feeds = {i.name: value for i, value in zip(dense.inputs, case.values, strict=False)}
    if len(feeds) == len(dense.inputs):
        given = Session(same.SerializeToString(), runtime).run(feeds)
        if not all(_same(value, given[name]) for name, value in dense.run(feeds).items()):
            return "changed", "other outputs at sparsity 0"
    result = optimize(case.model, None, "random", replace(config, sparsity=0.5))
    if not sum(layer.zeros for layer in result.layers):
        return "changed", "no zeros at sparsity 0.5"
    return "pruned", ""


def _same(left: Array, right: Array) -> bool:
    return np.asarray(left).tobytes() == np.asarray(right).tobytes()


def outline(reason: str) -> str:
    """A reason without the names and numbers in it, so that equal ones can be counted."""
    return re.sub(r"\[[^]]*\]|\d+", "N", re.sub(r"'[^']*'", "'...'", reason))[:WIDE]


def summary(outcomes: Iterable[Outcome]) -> str:
    """Verdicts by form, then the reasons by count."""
    outcomes = list(outcomes)
    forms = sorted({outcome.form for outcome in outcomes})
    counts = Counter((outcome.form, outcome.verdict) for outcome in outcomes)
    rows = [
        [form, str(sum(counts[form, verdict] for verdict in VERDICTS)), *(str(counts[form, verdict]) for verdict in VERDICTS)]
        for form in forms
    ]
    reasons = Counter((outcome.verdict, outline(outcome.reason)) for outcome in outcomes if outcome.reason)
    listed = "\n".join(f"- {count} {verdict}: {reason[:WIDE]}" for (verdict, reason), count in reasons.most_common())
    return f"{markdown_table(('cases', 'in all', *VERDICTS), rows)}\n\n{listed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose names it matches")
    parser.add_argument("--shipped", action="store_true", help="only the models that lie in the package")
    parser.add_argument("--list", action="store_true", help="also every case that did not go through, by name")
    options = parser.parse_args()
    cases = [*shipped(), *([] if options.shipped else generated())]
    outcomes = [judge(case) for case in cases if re.search(options.only, case.name)]
    versions = ", ".join(f"{key} {value}" for key, value in environment().items())
    print(f"{len(outcomes)} cases; {versions}\n\n{summary(outcomes)}")
    for outcome in outcomes if options.list else ():
        if outcome.verdict in ("refused", "changed", "crashed"):
            print(f"\n{outcome.verdict}: {outcome.name} ({outcome.form}): {outcome.reason}")


if __name__ == "__main__":
    main()
