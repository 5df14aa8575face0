"""What a run says to its exports: the order, the places of the files, and the gates that each must meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from onnx import ModelProto

from relrep_onnx import graph as graphs
from relrep_onnx.config import Config
from relrep_onnx.data import files_of
from relrep_onnx.export import Order, check_forms, places_for
from relrep_onnx.export.ort import CONFIG_SUFFIX
from relrep_onnx.files import Named, check_separate, same_file
from relrep_onnx.job import Job
from relrep_onnx.runtime import Session
from relrep_onnx.types import ConfigError, Feeds
from relrep_onnx.verify import Gates, Metric, check_gates, compare_sessions, run_metric


def order_of(config: Config, calibration: Callable[[], Iterable[Feeds]] | None) -> Order:
    """What is asked of the exports besides their forms."""
    return Order(config.values, config.target, calibration, config.as_runtime(), config.tune, config.input_shape)


def places_of(
    model: graphs.ModelSource,
    output: str | os.PathLike[str] | None,
    config: Config,
    data: Mapping[str, object],
    *,
    in_place: bool | None = None,
) -> dict[str, Path]:
    """Where each form goes; refuses what cannot be written, and what `check_places` does.

    Raises:
        ConfigError: with the reason.
    """
    check_forms(config.forms, order_of(config, None))
    if output is None:
        if tuple(config.forms) != ("onnx",):
            raise ConfigError(f"exporting to {', '.join(config.forms)} needs an output to write to")
        return {}
    places = places_for(config.forms, Path(output), "model" if isinstance(model, ModelProto) else Path(model).stem)
    if len(places) > 1 and not Path(output).is_dir():  # a new folder: nothing in it can be harmed
        graphs.check_target(Path(output))
    else:
        check_places(places.values(), {"MODEL": model}, data, in_place=in_place if len(places) == 1 else None)
    return places


def check_places(
    places: Iterable[Path], models: Mapping[str, graphs.ModelSource], data: Mapping[str, object], *, in_place: bool | None = None
) -> None:
    """Refuses outputs that cannot be written, or that would replace what a run reads.

    Args:
        places: the outputs; what comes beside them counts too.
        models, data: what is read, under the names its user knows.
        in_place: whether the last of the models may be replaced; None where nobody can ask for that.

    Raises:
        ConfigError: with the reason.
    """
    kept, (last, model) = dict(models), list(models.items())[-1]
    for place in places:
        graphs.check_target(place)
        if in_place is None or isinstance(model, ModelProto) or not same_file(place, Path(model)):
            continue
        if not in_place:
            raise ConfigError(f"the output {str(place)!r} is the input {last}; give another name, or --in-place to replace it")
        kept.pop(last, None)
    check_separate(written_at(places), inputs_of(kept, data))


def written_at(places: Iterable[Path]) -> Iterator[Named]:
    """Outputs with what goes beside them: data files that go with the old output, the list of operators of an `.ort` file."""
    for place in places:
        yield "OUTPUT", place
        beside = [place.with_name(place.stem + CONFIG_SUFFIX)] if place.suffix == ".ort" else graphs.data_files(place)
        yield from (("the file beside OUTPUT", file) for file in beside)


def inputs_of(models: Mapping[str, graphs.ModelSource], data: Mapping[str, object]) -> Iterator[Named]:
    """The files of models and of data, under the names of both."""
    for name, model in models.items():
        yield from ((name, file) for file in graphs.files_of(model))
    for name, source in data.items():
        yield from ((name, file) for file in files_of(source))


def meet_gates(job: Job, exported: Session, file_bytes: int, gates: Gates, metric: Metric | None) -> None:
    """Holds an export against the gates of the run: what is shipped must meet them, not only what it was made from."""
    if gates != Gates():
        fidelity = compare_sessions(job.session, exported, job.batches(job.verification))
        check_gates(fidelity, run_metric(metric, exported) if metric else None, gates, file_bytes)
