"""`sparse-initializer`: ONNX's own sparse tensors, as values and int64 indices.

An element that is not zero takes 8 bytes more than in a dense tensor, so float32 gets smaller beyond a sparsity of 2/3 only.
ONNX Runtime makes them dense while loading, and few other tools read them at all.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Final

import numpy as np
from onnx import ModelProto, SparseTensorProto, numpy_helper

from relrep_onnx.export.forms import EXACT, Order, Product
from relrep_onnx.graph import Graph, detach

LEAST_IR: Final = 6
WARNING: Final = (
    "sparse initializers break other tools: onnxruntime.quantization, quant_pre_process, onnx.version_converter, onnxoptimizer, "
    "onnx-ir and the checker's full check fail on them or drop them; make this file last"
)


def sparse_initializer(model: ModelProto, _: Order) -> Product:
    """Stores every tensor that gets smaller by it as a sparse one."""
    copy = deepcopy(model)
    graph = Graph(copy)
    sparse: dict[str, SparseTensorProto] = {}
    for name, tensor in graph.tensors.items():
        array = graph.stored(name)
        if not array.ndim or array.dtype.kind not in "fiu" or name in graph.outputs:
            continue
        flat = np.ascontiguousarray(array).reshape(-1)
        places = np.flatnonzero(flat.view(f"u{flat.dtype.itemsize}")).astype(np.int64)
        values, indices = numpy_helper.from_array(flat[places], name), numpy_helper.from_array(places)
        one = SparseTensorProto(values=values, indices=indices, dims=array.shape)
        if len(places) and one.ByteSize() < tensor.ByteSize():
            sparse[name] = one
    if not sparse:
        return Product(model, EXACT, ("nothing is sparse enough to get smaller; the file is the dense one",))
    detach(copy, sparse)
    copy.graph.sparse_initializer.extend(sparse.values())
    copy.ir_version = max(copy.ir_version, LEAST_IR)
    return Product(copy, EXACT, (WARNING,))
