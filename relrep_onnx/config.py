"""Every setting of a run in one flat, frozen dataclass that survives a round trip through JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from relrep_onnx.augment import parse as augment_kinds
from relrep_onnx.data import DataOptions, Preprocessing
from relrep_onnx.deployment import runtime_named
from relrep_onnx.masks import pattern_named
from relrep_onnx.runtime import RuntimeOptions
from relrep_onnx.types import MOST, THREADS, Budget, ConfigError, Selection, Unit
from relrep_onnx.verify import Gates, Limit

DEFAULT_SPARSITY: Final = 0.8
DEFAULT_EPOCHS: Final = 40
EFFORTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "low": {"num_samples": 128, "allocate": "rr-curve", "repair": "variance", "refine": 0},
    "medium": {"repair": "reconstruct", "refine": 0},
    "high": {"repair": "reconstruct", "refine": DEFAULT_EPOCHS},
}
"""What each effort sets; what is said beside it wins."""
RANGES: Final[Mapping[str, tuple[int, int | None]]] = {
    "threads": (0, THREADS),
    **dict.fromkeys(("batch_size", "positions", "num_samples"), (1, MOST)),
    "refine": (0, MOST),
    **dict.fromkeys(("max_memory", "max_bytes"), (1, None)),
    **dict.fromkeys(("min_size", "seed"), (0, None)),
}
"""The least and the largest value of whole numbers."""


@dataclass(frozen=True)
class Config:
    """Settings of `analyze` and `optimize`; `relrep-onnx optimize --help` says what each does."""

    sparsity: float | None = None
    max_drop: str | None = None
    runtime: str | None = None
    pattern: str = "unstructured"
    budget: Unit = "weights"
    min_layer_sparsity: float = 0.0
    max_layer_sparsity: float = 1.0
    layer_sparsity: Mapping[str, float] = field(default_factory=dict)
    allocate: str = "auto"
    repair: str = "reconstruct"
    refine: int = 0
    augment: str = "auto"

    min_size: int = 1024
    nodes_to_exclude: tuple[str, ...] = ()
    op_types: tuple[str, ...] = ()

    calib_key: str | None = None
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    color: Literal["rgb", "bgr"] = "rgb"
    input_shape: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    random_range: tuple[float, float] | None = None
    num_samples: int | None = None
    batch_size: int = 32
    positions: int | None = 20
    seed: int = 0
    skip_bad_samples: bool = False

    threads: int = 0
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    custom_op_library: str | None = None
    max_memory: int | None = None

    forms: tuple[str, ...] = ("onnx",)
    values: Literal["float32", "float16", "int8"] = "float32"
    target: Literal["amd64", "arm"] = "amd64"
    tune: bool = False

    eval: str | None = None
    max_error: float | None = None
    min_agreement: float | None = None
    min_metric: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("nodes_to_exclude", "op_types", "providers", "forms"):
            if isinstance(value := getattr(self, name), str):
                raise ConfigError(f"{name} is the text {value!r}; give a tuple of names, such as ({value!r},)")
        if not isinstance(self.eval, str | None):
            raise ConfigError(f"eval is {self.eval!r}; give the name of a function that can be imported, as 'module:function'")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= (value if most is None else most):
                raise ConfigError(f"{name} is {value}; it must be at least {least}" + f" and at most {most}" * (most is not None))
        for name, shape in self.input_shape.items():
            if not all(1 <= size <= MOST for size in shape):
                raise ConfigError(f"input_shape of {name!r} is {shape}; its sizes must be at least 1 and at most {MOST}")
        for name, low, high in (("max_error", 0.0, math.inf), ("min_agreement", 0.0, 1.0), ("min_metric", -math.inf, math.inf)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN too: it would miss every gate
                raise ConfigError(f"{name} is {value}; it must be a number" + f" between {low:g} and {high:g}" * (low == 0))
        if self.min_metric is not None and self.eval is None:
            raise ConfigError("--min-metric needs --eval, the metric it is about")
        if self.max_drop is not None:
            if self.sparsity is not None:
                raise ConfigError("--max-drop looks for the sparsity itself; leave --sparsity out")
            if Limit.parse(self.max_drop).kind == "eval" and self.eval is None:
                raise ConfigError("--max-drop 'eval:...' needs --eval, the metric it is about")
        if self.runtime is not None:
            runtime_named(self.runtime)
        pattern_named(self.pattern)
        augment_kinds(self.augment)
        self.as_budget()
        self.as_data()

    @classmethod
    def for_runtime(cls, name: str, **settings: Any) -> Config:
        """What pays on a runtime, `relrep-onnx optimize --for`; other settings win over its row.

        Raises:
            ConfigError: no runtime has this name.
        """
        return cls.merged({}, {"runtime": name, **settings})

    @classmethod
    def merged(cls, saved: Mapping[str, Any], said: Mapping[str, Any]) -> Config:
        """Settings of a file, and those that were said over them; a runtime's row lies right below what names the runtime.

        Where a row and something else both name forms, the options of the forms that lose go with them.

        Raises:
            ConfigError: no runtime has this name, or a setting cannot apply.
        """
        name = said.get("runtime", saved.get("runtime"))
        row: Mapping[str, Any] = {} if name is None else {"runtime": name, **runtime_named(name).settings}
        if "runtime" in said:
            return cls(**{**_losing_to(row, saved), **_losing_to(said, row), **said})
        return cls(**{**_losing_to({**saved, **said}, row), **saved, **said})

    @property
    def goal(self) -> float:
        """The asked sparsity, or the usual one where none was asked for."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def as_budget(self) -> Budget:
        """The budget with its bounds, at the goal."""
        return Budget(self.goal, self.budget, self.min_layer_sparsity, self.max_layer_sparsity, self.layer_sparsity)

    def as_selection(self) -> Selection:
        """Which weights may be pruned."""
        return Selection(self.min_size, self.nodes_to_exclude, self.op_types)

    def as_runtime(self) -> RuntimeOptions:
        """How sessions are opened."""
        return RuntimeOptions(self.threads, self.providers, (self.custom_op_library,) if self.custom_op_library else ())

    def as_data(self) -> DataOptions:
        """How calibration data is read."""
        images = Preprocessing(self.image_size, self.mean, self.std, self.scale, self.layout, self.color)
        return DataOptions(
            self.calib_key, images, self.input_shape, self.num_samples, self.random_range, self.seed, self.skip_bad_samples
        )

    def as_gates(self) -> Gates:
        """Limits the written model must keep."""
        return Gates(self.max_error, self.min_agreement, self.min_metric, self.max_bytes)

    def to_json(self) -> str:
        """The settings as a JSON object, keys sorted."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, *, source: str = "the configuration") -> Config:
        """Reads what `to_json` wrote; missing keys take their defaults, or those of the runtime that the text names.

        Raises:
            ConfigError: no JSON object, an unknown key, or a value of the wrong type.
        """
        return cls.merged(settings_in(text, source), {})

    @classmethod
    def load(cls, path: Path) -> Config:
        """Reads a configuration file."""
        return cls.merged(saved_settings(path), {})


def saved_settings(path: Path) -> dict[str, Any]:
    """What a configuration file says, by field of `Config`.

    Raises:
        ConfigError: it cannot be read, or as in `Config.from_json`.
    """
    try:
        return settings_in(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error}") from error


def settings_in(text: str, source: str) -> dict[str, Any]:
    """The same for its text; errors name the `source`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold a JSON object")
    kinds = typing.get_type_hints(Config)
    unknown = sorted(values.keys() - kinds.keys())
    if unknown:
        raise ConfigError(f"{source} has an unknown key {unknown[0]!r}; known keys: {', '.join(sorted(kinds))}")
    return {key: _convert(key, value, kinds[key], source) for key, value in values.items()}


def _losing_to(above: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the options of the forms they name, where those above them name forms."""
    loses = "forms" in above and "forms" in settings
    return {key: value for key, value in settings.items() if not (loses and key in ("values", "target"))}


def _convert(key: str, value: Any, kind: Any, source: str) -> Any:
    """A JSON value as the field's type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in inner:
        return None if value is None else _convert(key, value, next(k for k in inner if k is not type(None)), source)
    if origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) == len(value):
            return tuple(_convert(key, item, k, source) for item, k in zip(value, kinds, strict=True))
    elif origin is Mapping:
        if isinstance(value, dict):
            return {name: _convert(key, item, inner[1], source) for name, item in value.items()}
    elif origin is Literal:
        if value in inner:
            return value
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise ConfigError(f"{source}: {key!r} has the wrong type or value: {value!r}")
