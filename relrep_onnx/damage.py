"""What pruning one layer alone does to the model's outputs: the weight `rr-curve` gives that layer's residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from google.protobuf.message import EncodeError
from onnx import ModelProto

from relrep_onnx.graph import is_large, with_layer
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Feeds, Layer, RepairedLayer
from relrep_onnx.verify import compare_outputs, float_outputs


class OutputDamage:
    """Trials of single layers on a few samples; the dense outputs are computed once."""

    def __init__(
        self,
        model: ModelProto,
        dense: Session,
        batches: Iterable[Feeds],
        runtime: RuntimeOptions,
        finish: Callable[[ModelProto], ModelProto] = lambda model: model,
    ) -> None:
        """`finish` makes of the model with a layer rewritten the one that runs."""
        self._model = model
        self._finish = finish
        self._runtime = runtime
        self._names = [] if is_large(model) else float_outputs(dense)
        self._dense = [(feeds, dense.run(feeds, self._names)) for feeds in batches] if self._names else []

    def of(self, layer: Layer, repaired: RepairedLayer) -> float:
        """Squared relative L2 error, summed over the outputs.

        NaN where it cannot be measured: no output is a float tensor, or the model is over 2 GB.
        """
        if not self._names:
            return math.nan
        trial = self._finish(with_layer(self._model, layer, repaired))
        try:
            content = trial.SerializeToString()
        except EncodeError:
            return math.nan
        session = Session(content, self._runtime, what=f"the model with {layer.name!r} pruned")
        return sum(output.relative_l2**2 for output in compare_outputs(self._names, self._dense, session).outputs)
