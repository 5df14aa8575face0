"""Samples that a model cannot take: found by running it, named, and left out where that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from relrep_onnx.config import Config
from relrep_onnx.data import Entry, Samples, load_samples, runs
from relrep_onnx.runtime import Session
from relrep_onnx.types import CalibrationError


def samples_for(session: Session, source: Any, config: Config) -> Samples:
    """The samples of a source; with `skip_bad_samples` without those that cannot be read or that the model cannot take.

    Raises:
        CalibrationError: the data cannot be read, do not fit, or nothing is left of them.
    """
    samples = load_samples(source, session.inputs, config.as_data())
    return screened(session, samples, config.batch_size) if config.skip_bad_samples else samples


def screened(session: Session, samples: Samples, batch_size: int) -> Samples:
    """The samples on which the model runs and gives finite outputs.

    Raises:
        CalibrationError: there are none.
    """
    good, bad = [], []
    for run in runs(samples.entries, batch_size):
        whole = _problem(session, samples, run)
        for entry in run:
            problem = whole if whole is None or len(run) == 1 else _problem(session, samples, [entry])
            if problem is None:
                good.append(entry)
            else:
                bad.append(f"{entry.place}: {problem}")
    if not good:
        raise CalibrationError(f"no sample is left; the first that was left out: {bad[0]}")
    return replace(samples, entries=good, left_out=(*samples.left_out, *bad))


@contextmanager
def naming_samples(session: Session, samples: Sequence[Samples], batch_size: int) -> Iterator[None]:
    """Adds to an error on the way the first of the samples that the model cannot take, if there is one."""
    try:
        yield
    except CalibrationError as error:
        for part in samples:
            bad = screened(session, part, batch_size).left_out[len(part.left_out) :]
            if bad:
                raise CalibrationError(f"{error}; {bad[0]}; leave it out, or give --skip-bad-samples") from error
        raise


def _problem(session: Session, samples: Samples, run: Sequence[Entry]) -> str | None:
    try:
        values = session.run(samples.feeds(run))
    except CalibrationError as error:
        return str(error)
    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
            return f"the model's output {name!r} holds NaN or infinity"
    return None
