"""The only room that knows ONNX operators and where weights hide: load, find, read, cut into stages, write back, save."""

from relrep_onnx.graph.branches import branch_scale
from relrep_onnx.graph.index import Graph
from relrep_onnx.graph.layers import count_zeros, find_layers, read_weight
from relrep_onnx.graph.model import LoadedModel, ModelSource, Staged, check_target, input_files, load, model_hash, staged
from relrep_onnx.graph.rewrite import set_metadata, with_layer, write_layer
from relrep_onnx.graph.shapes import activation_shapes
from relrep_onnx.graph.stages import Stage, plan_stages, stage_model
from relrep_onnx.graph.storage import detach, raise_opset

__all__ = [
    "Graph",
    "LoadedModel",
    "ModelSource",
    "Stage",
    "Staged",
    "activation_shapes",
    "branch_scale",
    "check_target",
    "count_zeros",
    "detach",
    "find_layers",
    "input_files",
    "load",
    "model_hash",
    "plan_stages",
    "raise_opset",
    "read_weight",
    "set_metadata",
    "stage_model",
    "staged",
    "with_layer",
    "write_layer",
]
