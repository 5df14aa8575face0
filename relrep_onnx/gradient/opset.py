"""One operator set for all rules: older graphs are raised to it, newer ones stay (the operators of the rules did not change)."""

from __future__ import annotations

import onnx
from onnx import ModelProto

from relrep_onnx.graph.index import STANDARD_DOMAINS
from relrep_onnx.types import ModelError

OPSET = 20
"""The rules read and write this one."""


def raised(model: ModelProto, what: str) -> ModelProto:
    """The model in opset 20 or later; its tensors keep their names.

    Raises:
        ModelError: onnx cannot convert it.
    """
    version = max((o.version for o in model.opset_import if o.domain in STANDARD_DOMAINS), default=1)
    if version >= OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, OPSET)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ModelError(f"{what} has opset {version}, and onnx cannot raise it to {OPSET} for gradients: {reason}") from error
