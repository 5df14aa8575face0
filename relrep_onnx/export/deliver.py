"""From a product to a file that counts: written under a temporary name, loaded again, compared with its source, moved into place.

Several exports of one run are all compared before the first is moved: they come together or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from relrep_onnx import kernels
from relrep_onnx.export.forms import Order, Product
from relrep_onnx.export.table import make
from relrep_onnx.graph import LoadedModel, Staged, staged
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import CalibrationError, Feeds, ModelError, Progress, VerificationError
from relrep_onnx.verify import Fidelity, compare_sessions, gzip_size


@dataclass(frozen=True)
class Exported:
    """One written export; `fidelity` compares it with the model it was made from, `companions` are further files beside it."""

    form: str
    output: str
    file_bytes: int
    gzip_bytes: int
    fidelity: Fidelity
    notes: tuple[str, ...]
    companions: tuple[str, ...] = ()


Judge = Callable[[Session, Fidelity, int], None]
"""Raises `VerificationError` where an export must not be: told its session, how it compares with its source, its bytes."""


def deliver(
    source: LoadedModel,
    places: Mapping[str, Path],
    order: Order,
    reference: Session,
    batches: Callable[[], Iterable[Feeds]],
    *,
    limit: float | None = None,
    judge: Judge = lambda session, fidelity, file_bytes: None,
    progress: Progress = lambda phase, done, total, note="": None,
) -> tuple[Exported, ...]:
    """Makes, checks and writes exports of a model.

    Args:
        source: the model.
        places: where each form goes.
        order: what is asked for besides the forms.
        reference: a plain session of the source.
        batches: feeds to compare on.
        limit: the relative L2 that an export may be away from the source, instead of its form's own tolerance.
        judge: may refuse an export for reasons of its own.
        progress: told of the exports done.

    Raises:
        VerificationError: an export does not load, or does not do what its source does; no file is written then.
        RelRepError: what an exporter raises.
    """
    done: list[Exported] = []
    stages: list[Staged] = []
    progress("export", 0, len(places))
    with ExitStack() as stack:
        for folder in {target.parent for target in places.values()}:
            stack.enter_context(_made(folder))
        for form, target in places.items():
            product = make(form, source.model, order)
            stage = stack.enter_context(staged(target))
            _write(stage, product, source)
            fidelity, notes = _check(form, stage, product, order, reference, batches, limit, judge)
            stages.append(stage)
            companions = {target.with_name(target.stem + suffix): content for suffix, content in product.companions.items()}
            for path, content in companions.items():
                beside = stack.enter_context(staged(path))
                beside.write_bytes(content)
                stages.append(beside)
            sizes = stage.size(), sum(gzip_size(f) for f in stage.files())
            done.append(Exported(form, str(target), *sizes, fidelity, notes, tuple(map(str, companions))))
            progress("export", len(done), len(places))
        for stage in stages:
            stage.commit()
    return tuple(done)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder that goes again if nothing was put into it."""
    if folder.exists():
        yield
        return
    try:
        folder.mkdir()
    except OSError as error:
        raise ModelError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # it holds what was written
            folder.rmdir()


def _write(stage: Staged, product: Product, source: LoadedModel) -> None:
    if isinstance(product.content, ModelProto):
        stage.write(product.content, source.external)
    else:
        stage.write_bytes(product.content)


def _check(
    form: str,
    stage: Staged,
    product: Product,
    order: Order,
    reference: Session,
    batches: Callable[[], Iterable[Feeds]],
    limit: float | None,
    judge: Judge,
) -> tuple[Fidelity, tuple[str, ...]]:
    """Loads what was written and compares it; an .ort file goes in as bytes, for its temporary name does not tell."""
    written = stage.path if isinstance(product.content, ModelProto) else stage.path.read_bytes()
    allowed = product.tolerance if limit is None else limit
    found = []
    for what, runtime in _runtimes(form, product, order.runtime):
        try:
            session = Session(written, runtime, what=f"the export {what}")
            fidelity = compare_sessions(reference, session, batches())
        except (ModelError, CalibrationError) as error:
            raise VerificationError(f"{error}; nothing was written. Use another --to form") from error
        if not fidelity.relative_l2 <= allowed:  # NaN too
            raise VerificationError(
                f"the export {what} moves the outputs by {fidelity.relative_l2:.4g} (relative L2, {fidelity.samples} samples), "
                f"more than {allowed:g}; nothing was written. Use another --to form, or allow more with `export --max-error`"
            )
        try:
            judge(session, fidelity, stage.size())
        except VerificationError as error:
            raise VerificationError(f"the export {what}: {error}") from error
        found.append(fidelity)
    worst = max(found, key=lambda fidelity: fidelity.relative_l2)
    blind = () if worst.outputs else ("no output is floating-point: the file was loaded and run, not compared",)
    return worst, (*product.notes, *blind)


def _runtimes(form: str, product: Product, runtime: RuntimeOptions) -> list[tuple[str, RuntimeOptions]]:
    """The sessions that a file must stand in, with their names for messages."""
    plain = (repr(form), runtime)
    if not product.kernels or not kernels.available():
        return [plain]
    return [plain, (f"{form!r}, with the sparse kernels,", runtime.with_library(kernels.library_path()))]
