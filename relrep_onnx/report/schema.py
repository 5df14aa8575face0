"""The JSON Schema of what `to_json` writes, read off the result types: `python -m relrep_onnx.report.schema` prints it.

docs/report.schema.json is its output; a test holds the two together.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
from onnx import ModelProto

from relrep_onnx.inspection import Inspection
from relrep_onnx.results import SCHEMA_VERSION, Analysis, BenchmarkResult, Exports, LayerReport, Refined, Result, Sweep
from relrep_onnx.types import ScoreCurve
from relrep_onnx.verify import Fidelity

Json = dict[str, Any]

NUMBER: Final[Json] = {"type": ["number", "null"]}
"""JSON has no NaN and no infinity: null stands for both."""

DERIVED: Final[Mapping[type, Mapping[str, Json]]] = {
    LayerReport: dict.fromkeys(("sparsity", "rr", "raw", "residual", "snr_db"), NUMBER),
    ScoreCurve: {"rr": {"type": "array", "items": NUMBER}},
    Result: dict.fromkeys(("sparsity", "macs_sparsity"), NUMBER),
}
"""What `to_json` adds to the fields."""

KINDS: Final = (Result, Analysis, Refined, BenchmarkResult, Fidelity, Exports, Sweep, Inspection)
SIMPLE: Final[Mapping[Any, Json]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: NUMBER,
    type(None): {"type": "null"},
}


def schema() -> Json:
    """The schema of every result; which fields there are tells the command that wrote it."""
    known: dict[str, Json] = {}
    kinds = [_reference(kind, known) for kind in KINDS]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What relrep-onnx writes with --json and --report FILE.json",
        "type": "object",
        "required": ["schema_version"],
        "properties": {"schema_version": {"const": SCHEMA_VERSION}},
        "anyOf": kinds,
        "$defs": dict(sorted(known.items())),
    }


def _reference(kind: type, known: dict[str, Json]) -> Json:
    """Where a dataclass is described, after it is."""
    if kind.__name__ not in known:
        known[kind.__name__] = {}
        hints = typing.get_type_hints(kind)
        fields = {f.name: _of(hints[f.name], known) for f in dataclasses.fields(kind) if hints[f.name] is not ModelProto}
        fields.update(DERIVED.get(kind, {}))
        known[kind.__name__] = {"type": "object", "required": sorted(fields), "properties": dict(sorted(fields.items()))}
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _of(hint: Any, known: dict[str, Json]) -> Json:
    """The schema of one type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in SIMPLE:
        return SIMPLE[hint]
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_of(kind, known) for kind in inner]}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _of(inner[1], known)}
    if origin is tuple and inner[-1] is Ellipsis:
        return {"type": "array", "items": _of(inner[0], known)}
    if origin is tuple:
        return {
            "type": "array",
            "prefixItems": [_of(kind, known) for kind in inner],
            "minItems": len(inner),
            "maxItems": len(inner),
        }
    if origin is np.ndarray:
        return {"type": "array", "items": NUMBER}
    return _reference(hint, known)


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))  # noqa: T201
