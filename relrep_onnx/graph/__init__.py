"""ONNX models and where weights hide in them: load, find, read, cut into stages, write back, save."""

from relrep_onnx.graph.blocks import block_ends
from relrep_onnx.graph.branches import branch_scale
from relrep_onnx.graph.external import check_external
from relrep_onnx.graph.flatten import Flat, flatten
from relrep_onnx.graph.index import STANDARD_DOMAINS, Graph, display_name, reads
from relrep_onnx.graph.layers import count_zeros, find_layers, read_weight
from relrep_onnx.graph.model import (
    LoadedModel,
    ModelSource,
    Staged,
    check_target,
    data_files,
    files_of,
    input_files,
    load,
    model_hash,
    serialized,
    staged,
)
from relrep_onnx.graph.parameters import Parameter, as_inputs, parameters, with_tensors
from relrep_onnx.graph.rewrite import as_stored, set_metadata, with_layer, write_layer
from relrep_onnx.graph.shapes import activation_shapes
from relrep_onnx.graph.stages import BETWEEN, SPLIT, Stage, plan_stages, stage_model
from relrep_onnx.graph.storage import detach, is_large, raise_opset, restore, without_data
from relrep_onnx.graph.unflatten import unflatten

__all__ = [
    "BETWEEN",
    "SPLIT",
    "STANDARD_DOMAINS",
    "Flat",
    "Graph",
    "LoadedModel",
    "ModelSource",
    "Parameter",
    "Stage",
    "Staged",
    "activation_shapes",
    "as_inputs",
    "as_stored",
    "block_ends",
    "branch_scale",
    "check_external",
    "check_target",
    "count_zeros",
    "data_files",
    "detach",
    "display_name",
    "files_of",
    "find_layers",
    "flatten",
    "input_files",
    "is_large",
    "load",
    "model_hash",
    "parameters",
    "plan_stages",
    "raise_opset",
    "read_weight",
    "reads",
    "restore",
    "serialized",
    "set_metadata",
    "stage_model",
    "staged",
    "unflatten",
    "with_layer",
    "with_tensors",
    "without_data",
    "write_layer",
]
