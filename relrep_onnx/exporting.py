"""What a run says to its exports: the order, the places of the files, and the gates that each must meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from onnx import ModelProto

from relrep_onnx import graph as graphs
from relrep_onnx.config import Config
from relrep_onnx.export import Order, check_forms, places_for
from relrep_onnx.job import Job
from relrep_onnx.runtime import Session
from relrep_onnx.types import ConfigError, Feeds
from relrep_onnx.verify import Gates, Metric, check_gates, compare_sessions, run_metric


def order_of(config: Config, calibration: Callable[[], Iterable[Feeds]] | None) -> Order:
    """What is asked of the exports besides their forms."""
    return Order(config.values, config.target, calibration, config.as_runtime(), config.tune, config.input_shape)


def places_of(
    model: graphs.ModelSource, output: str | os.PathLike[str] | None, config: Config, *, in_place: bool = False
) -> dict[str, Path]:
    """Where each form goes; refuses what cannot be written.

    Raises:
        ConfigError: with the reason.
    """
    check_forms(config.forms, order_of(config, None))
    if output is None:
        if tuple(config.forms) != ("onnx",):
            raise ConfigError(f"exporting to {', '.join(config.forms)} needs an output to write to")
        return {}
    places = places_for(config.forms, Path(output), "model" if isinstance(model, ModelProto) else Path(model).stem)
    if len(places) > 1:
        graphs.check_target(Path(output) if not Path(output).is_dir() else None, model, in_place=False)
    for target in places.values():
        if target.parent.is_dir() or len(places) == 1:
            graphs.check_target(target, model, in_place=in_place)
    return places


def meet_gates(job: Job, exported: Session, file_bytes: int, gates: Gates, metric: Metric | None) -> None:
    """Holds an export against the gates of the run: what is shipped must meet them, not only what it was made from."""
    if gates != Gates():
        fidelity = compare_sessions(job.session, exported, job.batches(job.verification))
        check_gates(fidelity, run_metric(metric, exported) if metric else None, gates, file_bytes)
