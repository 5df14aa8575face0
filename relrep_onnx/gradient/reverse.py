"""Reverse mode: from a loss back to what it is differentiated with respect to, node by node, as one ONNX model.

    d loss / d a = sum over the nodes y = f(a) of (d y / d a)^T d loss / d y

A node without a rule is a wall: nothing passes it, and the loss must be made of tensors in front of it (`reach.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto

from relrep_onnx.gradient.reach import Reach
from relrep_onnx.gradient.table import RULES
from relrep_onnx.gradient.tape import Tape, Trace
from relrep_onnx.graph.index import Graph, leading_to, reads, refill
from relrep_onnx.types import ModelError


def gradient_model(model: ModelProto, loss: str, wrt: Sequence[str], trace: Trace) -> ModelProto:
    """A model of the loss and its gradients.

    Args:
        model: computes the loss; opset 20 or later.
        loss: a tensor of one element.
        wrt: tensors to differentiate with respect to, inputs of the model or inside it.
        trace: shapes and dtypes of every tensor of the model on the kind of batch that will be fed.

    Returns:
        A model with the same inputs; its outputs are the loss, then the gradients in the order of `wrt`.

    Raises:
        ModelError: the loss depends on one of `wrt` by no way that has rules.
    """
    reach = Reach(Graph(model))
    active = reach.dependents(wrt)
    t = Tape(trace)
    t.receive(loss, t.like(np.ones(t.shape(loss)), loss))
    for node in reversed(model.graph.node):
        touched = not active.isdisjoint(node.input) and any(t.gradient(name) for name in node.output)
        if touched and reach.obstacle(node) is None:
            _pass_back(t, node, active)
    result = deepcopy(model)
    wanted = [loss]
    for name in wrt:
        gradient = t.gradient(name)
        if gradient is None:
            raise ModelError(f"no gradient of the loss reaches {name!r}")
        wanted.append(t.op("Identity", gradient))  # a name of its own, even where one gradient serves two tensors
    result.graph.node.extend(t.nodes)
    result.graph.initializer.extend(t.tensors.values())
    refill(result.graph.output, [ValueInfoProto(name=name) for name in wanted])
    del result.graph.value_info[:]
    return without_unused(result)


def _pass_back(t: Tape, node: NodeProto, active: set[str]) -> None:
    rule = RULES[node.op_type]
    first = t.gradient(node.output[0])
    if first is None and node.op_type != "Split":
        raise ModelError(f"the gradient of {node.op_type}'s output {node.output[1]!r} has no rule")
    for name, gradient in zip(node.input, rule.gradient(t, node, first or ""), strict=False):
        if gradient is not None and name in active:
            t.receive(name, gradient)


def without_unused(model: ModelProto) -> ModelProto:
    """The model without nodes and tensors that no output needs; its inputs stay."""
    outputs = {value.name for value in model.graph.output}
    nodes = leading_to(model.graph.node, outputs)
    needed = outputs.union(*map(reads, nodes))
    refill(model.graph.node, nodes)
    refill(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in needed])
    return model
