"""The rules by operator.  A new one is a function in its family's file, a row here, and a row in tests/test_gradient.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from onnx import NodeProto, TensorProto

from relrep_onnx.gradient import activations, convolution, elementwise, linear, movement, normalization, reduction
from relrep_onnx.gradient.elementwise import Gradients
from relrep_onnx.gradient.tape import Tape
from relrep_onnx.graph.index import attribute, integer, number


def _no_reason(node: NodeProto) -> str | None:
    return None


@dataclass(frozen=True)
class Rule:
    """One operator's gradient.

    `gradient(tape, node, g)` writes the gradient of each input, from that of the first output; None, or a shorter list, for
    inputs that have none.  `shaping` are the input slots that must depend on shapes only, such as axes.  `refuses` gives the
    reason why a node is beyond the rule.
    """

    gradient: Callable[[Tape, NodeProto, str], Gradients]
    shaping: tuple[int, ...] = ()
    refuses: Callable[[NodeProto], str | None] = _no_reason


def _training(node: NodeProto) -> str | None:
    return "in training mode" if number(node, "training_mode", 0) else None


def _not_constant(node: NodeProto) -> str | None:
    mode = attribute(node, "mode", b"constant")
    return None if mode == b"constant" else f"its mode is {mode.decode(errors='replace') if isinstance(mode, bytes) else mode}"


def _no_float(node: NodeProto) -> str | None:
    return (
        None
        if integer(node, "to", 1) in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
        else "it makes numbers that are no floats"
    )


RULES: Final[Mapping[str, Rule]] = {
    "Add": Rule(elementwise.add),
    "Sub": Rule(elementwise.sub),
    "Mul": Rule(elementwise.mul),
    "Div": Rule(elementwise.div),
    "Pow": Rule(elementwise.power),
    "Sum": Rule(elementwise.total),
    "Max": Rule(elementwise.extreme),
    "Min": Rule(elementwise.extreme),
    "Where": Rule(elementwise.where),
    "Neg": Rule(elementwise.negative),
    "Abs": Rule(elementwise.absolute),
    "Reciprocal": Rule(elementwise.reciprocal),
    "Sqrt": Rule(elementwise.sqrt),
    "Exp": Rule(elementwise.exp),
    "Log": Rule(elementwise.log),
    "Sin": Rule(elementwise.sin),
    "Cos": Rule(elementwise.cos),
    "Erf": Rule(elementwise.erf),
    "Relu": Rule(activations.relu),
    "LeakyRelu": Rule(activations.leaky_relu),
    "Clip": Rule(activations.clip),
    "Sigmoid": Rule(activations.sigmoid),
    "HardSigmoid": Rule(activations.hard_sigmoid),
    "HardSwish": Rule(activations.hard_swish),
    "Tanh": Rule(activations.tanh),
    "Gelu": Rule(activations.gelu),
    "Softmax": Rule(activations.softmax),
    "LogSoftmax": Rule(activations.log_softmax),
    "Conv": Rule(convolution.conv),
    "ConvTranspose": Rule(convolution.conv_transpose),
    "Gemm": Rule(linear.gemm),
    "MatMul": Rule(linear.matmul),
    "BatchNormalization": Rule(normalization.batch_normalization, refuses=_training),
    "LayerNormalization": Rule(normalization.layer_normalization),
    "AveragePool": Rule(reduction.average_pool),
    "MaxPool": Rule(reduction.max_pool),
    "GlobalAveragePool": Rule(reduction.global_average),
    "GlobalMaxPool": Rule(reduction.global_max),
    "ReduceMean": Rule(reduction.reduce_mean, shaping=(1,)),
    "ReduceSum": Rule(reduction.reduce_sum, shaping=(1,)),
    "ReduceMax": Rule(reduction.reduce_extreme, shaping=(1,)),
    "ReduceMin": Rule(reduction.reduce_extreme, shaping=(1,)),
    "Reshape": Rule(movement.relabel),
    "Flatten": Rule(movement.relabel),
    "Squeeze": Rule(movement.relabel),
    "Unsqueeze": Rule(movement.relabel),
    "Transpose": Rule(movement.transpose),
    "Concat": Rule(movement.concat),
    "Split": Rule(movement.split),
    "Slice": Rule(movement.cut, shaping=(1, 2, 3, 4)),
    "Pad": Rule(movement.pad, shaping=(1, 3), refuses=_not_constant),
    "Gather": Rule(movement.gather),
    "Expand": Rule(movement.expand),
    "Identity": Rule(movement.same),
    "Dropout": Rule(movement.same),
    "Cast": Rule(movement.cast, refuses=_no_float),
    "CastLike": Rule(movement.cast),
}
