"""The sparse kernels under the address and undefined-behaviour sanitizers: `python tools/sanitize.py [--cases N]`.

Builds the library with `-fsanitize=address,undefined` into a folder that goes away, then runs a second interpreter with it:
random layers, a quarter of them whole, the others with mutated positions, lengths, sizes, attributes and input shapes.  Each must
end in a result or in an ONNX Runtime error.  ONNX Runtime's arena is off, so that every tensor is an allocation of its own whose
ends the sanitizer watches.  The exit code is 0 when nothing was found.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from relrep_onnx.kernels import functions, instruction_sets
from relrep_onnx.runtime import FAILURES
from relrep_onnx.types import Array
from tools import compiler

ROOT: Final = Path(__file__).resolve().parents[1]
FLAGS: Final = (
    "-O0",
    "-g",
    "-fno-omit-frame-pointer",
    "-fPIC",
    "-shared",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
CASES: Final = 20_000
ODD: Final = (-1, 0, 1, 2, 3, 5, 7, 64, 255, 4096, 2**20, 2**31 - 1, 2**31, 2**33, 2**62, -(2**63))
FAMILIES: Final = ("SparseConv", "SparseGemm", "SparseQConv", "SparseQGemm")
SHAPES: Final = ((8, 6, 3, 3), (12, 5, 1, 1), (6, 1, 3, 2), (8, 16), (7, 33))


def build(folder: Path) -> Path:
    """The library with sanitizers; unoptimized, which compiles fast and hides nothing."""
    library = folder / "libsanitized.so"
    compiler.build(compiler.host(), compiler.SOURCES, library, *FLAGS)
    return library


def runtime_library(name: str) -> str:
    """Where the compiler keeps a library of its own."""
    return subprocess.run(
        [*compiler.host(), f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def model_of(shape: tuple[int, ...], parts: dict[str, Array], attributes: dict[str, Any], name: str) -> ModelProto:
    """One operator; no function body: the library is there."""
    stored = [n for n in functions.INT8_INPUTS if n in parts] if "Q" in name else list(parts)
    inputs = ["x", *stored, *(["residual"] if "Add" in name else [])]
    kind = TensorProto.UINT8 if "Q" in name else TensorProto.FLOAT
    node = helper.make_node(name, inputs, ["y"], domain=functions.DOMAIN, **attributes)
    rank = len(shape)
    values = [helper.make_tensor_value_info(n, kind, [f"{n}{i}" for i in range(rank)]) for n in inputs if n not in parts]
    y = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph([node], "case", values, [y], [numpy_helper.from_array(a, n) for n, a in parts.items()])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(functions.DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def groups_of(shape: tuple[int, ...]) -> int:
    """Convolutions of one channel per group are depthwise."""
    return shape[0] if shape[1] == 1 else 1


def parts_of(weight: Array) -> tuple[dict[str, Array], dict[str, Any]]:
    """The stored tensors and attributes of a layer, float32 or int8."""
    values, gaps = functions.encode(weight)
    attributes: dict[str, Any] = {"weight_shape": list(weight.shape)}
    if weight.ndim == 4:
        attributes |= {"strides": [1, 1], "pads": [1, 1, 1, 1], "dilations": [1, 1], "group": groups_of(weight.shape)}
    parts = {"values": values, "gaps": gaps, "bias": np.ones(weight.shape[0], np.float32)}
    if weight.dtype == np.int8:
        attributes |= {"low": 10, "high": 200}
        parts["bias"] = np.ones(weight.shape[0], np.int32)
        parts |= {"w_scale": np.ones(weight.shape[0], np.float32)}
        parts |= {name: np.array([0.05], np.float32) for name in ("x_scale", "y_scale")}
        parts |= {name: np.array([128], np.uint8) for name in ("x_zero_point", "y_zero_point")}
    return parts, attributes


def run(model: ModelProto, feeds: dict[str, Array], library: str, threads: int) -> Array | None:
    """The output, or None where ONNX Runtime reports an error."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(library)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        output: Array = session.run(None, feeds)[0]
    except FAILURES:
        return None
    return output


def mutate(rng: np.random.Generator, parts: dict[str, Array], attributes: dict[str, Any]) -> None:
    """Changes one thing, in place."""
    what = str(rng.choice([*parts, *attributes]))
    if what in parts:
        array = parts[what].copy()
        if rng.random() < 0.3:
            parts[what] = np.resize(array, int(rng.integers(0, 2 * array.size + 2))).astype(array.dtype)
        elif array.size:
            place = int(rng.integers(array.size))
            if array.dtype == np.float32:
                array[place] = rng.choice(np.array([0, np.nan, np.inf, -1e38, 1e-45]))
            else:
                limits = np.iinfo(array.dtype)
                array[place] = rng.integers(limits.min, limits.max, endpoint=True)
            parts[what] = array
    elif isinstance(attributes[what], int):
        attributes[what] = int(rng.choice(ODD))
    else:
        changed = [int(v) for v in attributes[what]]
        changed[int(rng.integers(len(changed)))] = int(rng.choice(ODD))
        attributes[what] = changed[: int(rng.integers(1, len(changed) + 1))] if rng.random() < 0.1 else changed


def attack(cases: int, library: str) -> str:
    """Runs the cases; returns how many gave a result and how many an error."""
    rng = np.random.default_rng(0)
    results = 0
    for case in range(cases):
        shape = SHAPES[case % len(SHAPES)]
        family = FAMILIES[2 * (case // len(SHAPES) % 2) + (len(shape) == 2)]
        quantized = "Q" in family
        kept = rng.random(shape) < rng.choice([0.05, 0.3, 1.0])
        weight = (rng.standard_normal(shape) * kept * (40 if quantized else 1)).astype(np.int8 if quantized else np.float32)
        parts, attributes = parts_of(weight)
        for _ in range(int(rng.integers(0, 4))):
            mutate(rng, parts, attributes)
        name = family + str(rng.choice(["", "Clip"] if quantized else ["", "Relu", "Add", "AddRelu"]))
        sizes = [int(rng.integers(0, 4)), shape[1] * groups_of(shape), *(int(rng.integers(0, 24)) for _ in shape[2:])]
        if rng.random() < 0.1:
            sizes[int(rng.integers(len(sizes)))] = int(rng.integers(0, 40))
        feeds = {
            "x": rng.integers(0, 256, sizes).astype(np.uint8) if quantized else rng.standard_normal(sizes).astype(np.float32)
        }
        if "Add" in name:
            feeds["residual"] = rng.standard_normal([sizes[0], shape[0], *sizes[2:]]).astype(np.float32)
        os.environ["RELREP_KERNELS_ISA"] = str(rng.choice(instruction_sets()))
        results += run(model_of(shape, parts, attributes, name), feeds, library, int(rng.integers(1, 3))) is not None
    return f"{cases} files: {results} results, {cases - results} errors, no finding"


def main() -> None:
    """Builds, then runs itself under the sanitizers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.library:
        print(attack(arguments.cases, arguments.library))
        return
    with tempfile.TemporaryDirectory(prefix="relrep-") as folder:
        library = build(Path(folder))
        environment = {
            **os.environ,
            "LD_PRELOAD": f"{runtime_library('libasan.so')} {runtime_library('libubsan.so')}",
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # the interpreter itself never frees all
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, __file__, "--cases", str(arguments.cases), "--library", str(library)]
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
