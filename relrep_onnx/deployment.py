"""Where a model goes, and what pays there: one row per runtime says which pattern, layers and export `--for` picks.

`docs/deploy.md` gives the reasons, the figures and the commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from relrep_onnx.types import ConfigError, Layer


def anything(layer: Layer) -> str | None:
    """Every layer may be pruned."""
    return None


def wide(layer: Layer) -> str | None:
    """2:4 kernels of TensorRT win on wide layers only."""
    channels = min(layer.rows // layer.groups, layer.channels)
    return None if channels >= 256 else f"for tensorrt: 2:4 does not pay at {channels} channels, fewer than 256"


def pointwise(layer: Layer) -> str | None:
    """XNNPACK's sparse kernels are for 1x1 convolutions only."""
    if layer.op == "Conv" and layer.kernel == 1 and layer.groups == 1:
        return None
    return "for xnnpack: only 1x1 convolutions run sparse"


@dataclass(frozen=True)
class Runtime:
    """What `--for` picks: settings, and `misfit` with the reason why a layer stays dense; `pays` is one honest sentence.

    A layer pays there beyond a sparsity of `least`, in the one pattern that runs there (`only`), or in any.
    """

    pays: str
    settings: Mapping[str, Any]
    misfit: Callable[[Layer], str | None] = anything
    least: float = 0.0
    only: str | None = None


RUNTIMES: Final[Mapping[str, Runtime]] = {
    "ort": Runtime("zeros make the file smaller, not faster: ONNX Runtime unpacks them while loading", {"forms": ("compact",)}),
    "ort-kernels": Runtime(
        "layers beyond 60 % zeros may run faster where the session loads the sparse kernels; the export counts those that do",
        {"pattern": "unstructured", "budget": "macs", "forms": ("sparse-ort",)},
        least=0.6,
    ),
    "ort-mobile": Runtime(
        "int8 makes the file smaller and usually faster; zeros only help once the package is compressed",
        {"forms": ("int8+ort",), "target": "arm"},
    ),
    "ort-web": Runtime("zeros make the download smaller, not faster", {"forms": ("compact",), "values": "int8"}),
    "tensorrt": Runtime("2:4 may run faster in the wide layers", {"pattern": "2:4", "forms": ("onnx",)}, wide, only="2:4"),
    "xnnpack": Runtime(
        "1x1 convolutions run faster, above two thirds of zeros each and in one unbroken chain",
        {"forms": ("onnx",)},
        pointwise,
        least=2 / 3,
    ),
    "ethos-u": Runtime("Vela compresses zeros in int8 weights: less flash and less traffic", {"forms": ("onnx",)}),
    "openvino": Runtime("zeros make the file smaller, not faster", {"forms": ("compact",)}),
    "ncnn": Runtime("zeros only help once the package is compressed", {"forms": ("onnx",)}),
}


def runtime_named(name: str) -> Runtime:
    """The row of a runtime.

    Raises:
        ConfigError: there is none.
    """
    if name not in RUNTIMES:
        raise ConfigError(f"no runtime is called {name!r}; choose from {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def gaining(runtime: Runtime, pattern: str, layers: Iterable[tuple[Layer, float]]) -> int:
    """How many layers, each with its sparsity in a pattern, a runtime gains from."""
    if runtime.only not in (None, pattern):
        return 0
    return sum(sparsity > runtime.least and runtime.misfit(layer) is None for layer, sparsity in layers)
