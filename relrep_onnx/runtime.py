"""ONNX Runtime, and nothing else: sessions, and running them.  The only room that imports onnxruntime."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import ModelProto
from onnxruntime.capi import onnxruntime_pybind11_state as binding

from relrep_onnx.types import Array, CalibrationError, Feeds, ModelError, TensorInfo

VERSION: str = onnxruntime.__version__

# Every failure ONNX Runtime reports has a class of its own, with no common base below Exception.
_KINDS = "EPFail EngineError Fail InvalidArgument InvalidGraph InvalidProtobuf ModelLoaded NoModel NoSuchFile NotImplemented"
FAILURES: tuple[type[Exception], ...] = (
    ValueError,
    RuntimeError,
    *(getattr(binding, name) for name in (*_KINDS.split(), "RuntimeException") if hasattr(binding, name)),
)


@dataclass(frozen=True)
class RuntimeOptions:
    """How sessions are opened: 0 threads means ONNX Runtime's own choice.

    `prepack` lets it keep a second copy of weights in an order of its own; without, those of files stay mapped, not read.
    """

    threads: int = 0
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    custom_op_libraries: tuple[str, ...] = ()
    prepack: bool = True

    def with_library(self, library: Path) -> RuntimeOptions:
        """The same with one more library of custom operators."""
        return replace(self, custom_op_libraries=tuple(dict.fromkeys([*self.custom_op_libraries, str(library)])))


class Session:
    """One loaded model."""

    def __init__(
        self, model: bytes | Path, options: RuntimeOptions, *, what: str = "the model", profile: Path | None = None
    ) -> None:
        """Loads a model from its bytes or its path; `profile` is what the name of a profile of its runs begins with.

        Raises:
            ModelError: ONNX Runtime refuses it, or a provider or a custom-op library is missing.
        """
        self.what = what
        unknown = set(options.providers) - set(onnxruntime.get_available_providers())
        if unknown:
            available = ", ".join(onnxruntime.get_available_providers())
            raise ModelError(f"this ONNX Runtime has no {', '.join(sorted(unknown))}; available: {available}")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.log_severity_level = 4  # failures reach the caller as exceptions
        # Idle threads that spin would hold the cores that NumPy's matrix products need between runs.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not options.prepack:
            settings.add_session_config_entry("session.disable_prepacking", "1")
        if profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(profile)
        try:
            for library in options.custom_op_libraries:
                settings.register_custom_ops_library(library)
            source = str(model) if isinstance(model, Path) else model
            self.raw = onnxruntime.InferenceSession(source, settings, providers=list(options.providers))
        except FAILURES as error:
            raise ModelError(f"ONNX Runtime cannot load {what}: {_first_line(error)}") from error
        self.inputs = [TensorInfo(i.name, i.type, tuple(i.shape)) for i in self.raw.get_inputs()]
        self.outputs = [TensorInfo(o.name, o.type, tuple(o.shape)) for o in self.raw.get_outputs()]

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Runs once.

        Raises:
            CalibrationError: the feeds do not fit the model, or it fails on them.
        """
        names = [o.name for o in self.outputs] if outputs is None else list(outputs)
        try:
            values = self.raw.run(names, dict(feeds))
        except FAILURES as error:
            shapes = ", ".join(f"{name} {_describe(value)}" for name, value in feeds.items())
            raise CalibrationError(f"ONNX Runtime fails to run {self.what} on {shapes}: {_first_line(error)}") from error
        # ONNX Runtime takes an empty list for all outputs.
        return dict(zip(names, values[: len(names)], strict=True))

    def end_profile(self) -> dict[str, tuple[str, float]]:
        """Ends the profile: operator and median microseconds of a run, by the nodes' names in order of execution."""
        path = Path(self.raw.end_profiling())
        events = json.loads(path.read_text(encoding="utf-8"))
        times: dict[str, tuple[str, list[float]]] = {}
        for event in events:
            name = event.get("name", "")
            if event.get("cat") == "Node" and name.endswith("_kernel_time"):
                kind = event["args"].get("op_name", "")
                times.setdefault(name.removesuffix("_kernel_time"), (kind, []))[1].append(event["dur"])
        return {name: (kind, float(np.median(spent))) for name, (kind, spent) in times.items()}

    def types(self) -> Mapping[str, str]:
        """ONNX Runtime's type of each output."""
        return {o.name: o.type for o in self.outputs}


class Bound:
    """A session that reads and writes arrays where they lie: parameters and gradients are never copied from run to run."""

    def __init__(self, session: Session, inputs: Feeds, outputs: Feeds) -> None:
        """Binds contiguous arrays of the right shapes; they must live as long as this does."""
        self._session = session
        self._binding = session.raw.io_binding()
        for name, array in inputs.items():
            self._bind_input(name, array)
        for name, array in outputs.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_input(self, name: str, array: Array) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self, feeds: Feeds) -> None:
        """Runs once on these other inputs and fills the bound outputs.

        Raises:
            CalibrationError: the model fails on them.
        """
        held = {name: np.ascontiguousarray(array) for name, array in feeds.items()}  # alive until the run is over
        try:
            for name, array in held.items():
                self._bind_input(name, array)
            self._session.raw.run_with_iobinding(self._binding)
        except FAILURES as error:
            raise CalibrationError(f"ONNX Runtime fails to run {self._session.what}: {_first_line(error)}") from error


def _describe(value: object) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _first_line(error: Exception) -> str:
    """The message without ONNX Runtime's prefix and stack."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line.split(" : ", 3)[-1] if line.startswith("[ONNXRuntimeError]") else line


@contextlib.contextmanager
def quiet_tools() -> Iterator[None]:
    """ONNX Runtime's own converters print and log as programs do; what matters of it reaches the caller as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    onnxruntime.set_default_logger_severity(4)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # its own default; there is no way to ask what it was
        logging.disable(before)


def symbolic_shapes(model: ModelProto) -> ModelProto | None:
    """The model with inferred shapes where plain ONNX inference gives up, or None without the `ort-tools` extra.

    ONNX Runtime's own symbolic shape inference needs sympy; `onnxruntime-tools`, its ancestor on PyPI, serves where an old
    ONNX Runtime has none.
    """
    for package in ("onnxruntime.tools", "onnxruntime_tools"):
        try:
            module = importlib.import_module(f"{package}.symbolic_shape_infer")
        except ImportError:
            continue
        try:
            inferred = module.SymbolicShapeInference.infer_shapes(model, auto_merge=True)
        except Exception:  # what the tool itself raises; only an estimate is lost
            return None
        return inferred if isinstance(inferred, ModelProto) else None
    return None


def mobile_usability(path: Path) -> tuple[bool, list[str]]:
    """What ONNX Runtime's own checker says about NNAPI and CoreML: whether one may help, and its lines.

    Raises:
        ModelError: the checker cannot read the model.
    """
    from onnxruntime.tools.mobile_helpers import usability_checker

    lines: list[str] = []
    logger = logging.Logger("usability", logging.INFO)
    logger.addHandler(_Lines(lines))
    try:
        usable = usability_checker.analyze_model(path, logger=logger)
    except FAILURES as error:
        raise ModelError(f"the mobile usability checker cannot read {str(path)!r}: {_first_line(error)}") from error
    return bool(usable), lines


class _Lines(logging.Handler):
    """Collects messages."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())
