"""What a fresh installation must do, in its own interpreter and outside of the repository: `python -I smoke.py with|without`.

A small model is pruned, and a sparse product gives the dense one's numbers in ONNX Runtime, with the kernels or without them.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

import relrep_onnx
from relrep_onnx import kernels
from relrep_onnx.kernels import functions

OPSET = 17


def dense(weight: np.ndarray) -> bytes:
    """Y = X W^T, float32[out, in]."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight.shape[1]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[0]])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "dense", [x], [y], [numpy_helper.from_array(weight.T.copy(), "w")])
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8).SerializeToString()
    return data


def sparse(weight: np.ndarray) -> bytes:
    """The same by the sparse operator."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight.shape[1]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[0]])
    values, gaps = functions.encode(weight)
    stored = {"values": values, "gaps": gaps, "bias": np.zeros(weight.shape[0], np.float32)}
    body = functions.function("SparseGemm", OPSET, adds=False, activation="")
    node = helper.make_node(body.name, ["x", *stored], ["y"], domain=functions.DOMAIN, weight_shape=list(weight.shape))
    graph = helper.make_graph([node], "sparse", [x], [y], [numpy_helper.from_array(a, n) for n, a in stored.items()])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(functions.DOMAIN, 1)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=8).SerializeToString()
    return data


def main() -> None:
    """Exits with a sentence where something is not as it should be."""
    wanted = sys.argv[1] == "with"
    if kernels.available() != wanted:
        raise SystemExit(f"the sparse kernels are {'not ' if wanted else ''}there: {kernels.LIBRARY}")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    x = rng.standard_normal((256, 48)).astype(np.float32)
    result = relrep_onnx.optimize(ModelProto.FromString(dense(weight)), None, x, relrep_onnx.Config(sparsity=0.8))
    if abs(result.sparsity - 0.8) > 0.01:
        raise SystemExit(f"a model pruned to 80 % is {result.sparsity:.1%} zero")
    weight *= rng.random(weight.shape) < 0.2
    options = onnxruntime.SessionOptions()
    if wanted:
        kernels.register(options)
    got, right = (
        onnxruntime.InferenceSession(m, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for m in (sparse(weight), dense(weight))
    )
    if not np.allclose(got, right, atol=1e-4):
        raise SystemExit(f"the sparse product is off by {np.abs(got - right).max()}")
    print("sparse kernels:", ", ".join(kernels.instruction_sets()) if wanted else "none")


if __name__ == "__main__":
    main()
