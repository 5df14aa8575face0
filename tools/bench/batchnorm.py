"""BatchNorm recalibration: the classic repair that `accuracy.py` compares with; the package itself does without it.

In training mode a BatchNormalization normalises with the mean and the (population) variance of the batch it is given.  One run
over all samples as a single batch therefore gives each node the statistics of a network whose earlier nodes use theirs already.

    python -m tools.bench.accuracy --models resnet20_bn --allocate global --repair none,batchnorm --sparsity 0.8
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from relrep_onnx.graph import Graph

Array = NDArray[Any]
OLDEST_OPSET: Final = 14
"""Before it, training mode was spelled otherwise."""


def recalibrate(model: ModelProto, feeds: Mapping[str, Array]) -> ModelProto:
    """A copy whose BatchNormalization nodes hold the statistics of their own inputs on `feeds`, in graph order.

    Args:
        model: the model, usually pruned without repair; not changed.
        feeds: every sample at once, by input name.

    Raises:
        ValueError: no BatchNormalization, or an operator set before 14.
    """
    graph = Graph(model)
    if graph.opset < OLDEST_OPSET:
        raise ValueError(f"the model has operator set {graph.opset}; recalibration needs {OLDEST_OPSET} or later")
    if not batchnorms(model):
        raise ValueError("the model has no BatchNormalization; it was probably folded when the model was exported")
    statistics = measure(model, feeds)
    result = copy_of(model)
    for number, node in enumerate(batchnorms(result)):
        for slot, values in zip((3, 4), statistics[2 * number : 2 * number + 2], strict=True):
            old = graph.value(node.input[slot])
            name = Graph(result).fresh(f"{node.input[slot]}.recalibrated")
            result.graph.initializer.append(
                numpy_helper.from_array(values.astype(values.dtype if old is None else old.dtype), name)
            )
            node.input[slot] = name
    _drop_unread(result)
    return result


def measure(model: ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """Mean and variance of each BatchNormalization's input, in graph order: mean, variance, mean, variance, ..."""
    training = copy_of(model)
    del training.graph.output[:]
    graph = Graph(training)
    for node in batchnorms(training):
        kept = [item for item in node.attribute if item.name not in ("training_mode", "momentum")]
        del node.attribute[:]
        # Momentum 0: the running statistics that come out are those of this batch alone.
        node.attribute.extend([*kept, helper.make_attribute("training_mode", 1), helper.make_attribute("momentum", 0.0)])
        names = [graph.fresh(f"{node.output[0]}.{what}") for what in ("batch_mean", "batch_variance")]
        node.output.extend(names)
        training.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(training.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def batchnorms(model: ModelProto) -> list[NodeProto]:
    """The BatchNormalization nodes in graph order."""
    return [node for node in model.graph.node if node.op_type == "BatchNormalization"]


def copy_of(model: ModelProto) -> ModelProto:
    """A copy that may be changed."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _drop_unread(model: ModelProto) -> None:
    """Removes stored tensors that no node reads any more."""
    graph = Graph(model)
    read = graph.consumers.keys() | graph.outputs
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
