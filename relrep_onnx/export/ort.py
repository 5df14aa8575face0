"""`ort`: ONNX Runtime's own format for mobile and web, with the list of operators and types that a reduced build needs.

The converter optimizes the graph for one target and stores weights dense: the file is about as large as the dense model, and what
is saved is the runtime.  `int8+ort` is what makes it small.  Its table of kernels has no fixed order: unlike all other exports it
may differ from run to run in some hundred bytes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import onnx
from onnx import ModelProto
from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

from relrep_onnx.export.forms import Order, Product
from relrep_onnx.runtime import FAILURES, quiet_tools
from relrep_onnx.types import ModelError

_FAILURES: Final[tuple[type[Exception], ...]] = (*FAILURES, OSError)
TOLERANCE: Final = 1e-3
"""Other fusions round differently, and int8 results may be a step apart."""
CONFIG_SUFFIX: Final = ".required_operators_and_types.config"


def ort(model: ModelProto, order: Order) -> Product:
    """Converts a model, with all optimizations of the target.

    Raises:
        ModelError: ONNX Runtime cannot convert it.
    """
    with tempfile.TemporaryDirectory(prefix="relrep-") as folder, quiet_tools():
        source = Path(folder) / "model.onnx"
        onnx.save_model(model, source)
        try:
            convert_onnx_models_to_ort(
                source,
                optimization_styles=[OptimizationStyle.Fixed],
                custom_op_library_path=next(map(Path, order.runtime.custom_op_libraries), None),
                target_platform=order.target,
                enable_type_reduction=True,
            )
        except _FAILURES as error:
            raise ModelError(f"ONNX Runtime cannot convert the model to .ort: {str(error).splitlines()[0]}") from error
        content = source.with_suffix(".ort").read_bytes()
        (config,) = Path(folder).glob("*.config")
        # Its comments name the temporary folder.
        lines = [line for line in config.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    companions = {CONFIG_SUFFIX: "".join(f"{line}\n" for line in lines).encode()}
    share = len(content) / model.ByteSize()
    notes = (f"made for {order.target}; weights are dense in it: {share:.0%} of the bytes of the model it was made from",)
    return Product(content, TOLERANCE, notes, companions)
