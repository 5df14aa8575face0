"""Forms of a convolution's gradients in ONNX Runtime, side by side (decision 9): `python -m tools.bench.forms`.

Milliseconds, the least of interleaved runs: forward with a constant weight and with one that is an input; the input's gradient as
ConvTranspose and as Conv with the turned kernel; the weight's gradient in four forms, all checked against each other.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from tools.bench.data import Array, environment, markdown_table

BATCH: Final = 64
KERNEL: Final = 3
SHAPES: Final = ((16, 16, 32), (64, 64, 8), (64, 64, 32), (128, 128, 16), (256, 256, 8), (512, 512, 4))
"""Input channels, output channels, side; stride 1, padded to the same size."""
LARGEST: Final = 4e7
"""Elements of a product per position and sample beyond which that form is left out."""


@dataclass
class Builder:
    """Collects the nodes and constants of one small model."""

    nodes: list[NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)

    def ints(self, *values: int) -> str:
        """A stored tensor of integers."""
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        """A node; its output's name."""
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))  # type: ignore[arg-type]
        return name

    def model(self, inputs: dict[str, Array], output: str, constants: dict[str, Array] | None = None) -> ModelProto:
        """The model of what was collected."""
        stored = [*self.tensors, *(numpy_helper.from_array(a, n) for n, a in (constants or {}).items())]
        given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in inputs.items()]
        graph = helper.make_graph(self.nodes, "form", given, [ValueInfoProto(name=output)], stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def forms(x: Array, w: Array, g: Array) -> dict[str, ModelProto]:
    """The models to compare, by name; the weight's gradients begin with `dw`."""
    models = {}
    pads, same = [KERNEL // 2] * 4, {"pads": [KERNEL // 2] * 4}
    b = Builder()
    models["forward, constant weight"] = b.model({"x": x}, b.op("Conv", "x", "w", **same), {"w": w})
    b = Builder()
    models["forward, weight as an input"] = b.model({"x": x, "w": w}, b.op("Conv", "x", "w", **same))
    b = Builder()
    models["dx: ConvTranspose"] = b.model({"g": g, "w": w}, b.op("ConvTranspose", "g", "w", **same))
    b = Builder()
    lowest = int(np.iinfo(np.int64).min)
    ends = (b.ints(-1, -1), b.ints(lowest, lowest), b.ints(2, 3), b.ints(-1, -1))
    turned = b.op("Slice", b.op("Transpose", "w", perm=[1, 0, 2, 3]), *ends)
    models["dx: Conv, kernel turned"] = b.model({"g": g, "w": w}, b.op("Conv", "g", turned, **same))
    b = Builder()
    swapped = [b.op("Transpose", name, perm=[1, 0, 2, 3]) for name in ("x", "g")]
    models["dw: Conv over swapped axes"] = b.model(
        {"x": x, "g": g}, b.op("Transpose", b.op("Conv", *swapped, pads=pads), perm=[1, 0, 2, 3])
    )
    products = BATCH * w.size
    if products < LARGEST:
        models["dw: a product per position and sample"] = _products(x, w, g, together=False, whole=False)
    models["dw: a product per position"] = _products(x, w, g, together=True, whole=False)
    models["dw: one product over all patches"] = _products(x, w, g, together=True, whole=True)
    return models


def _products(x: Array, w: Array, g: Array, *, together: bool, whole: bool) -> ModelProto:
    """The weight's gradient by matrix products over shifted slices of the input."""
    b = Builder()
    rows, inner, side, places = *w.shape[:2], x.shape[2], x.shape[2] ** 2
    batch, places = (1, BATCH * places) if together else (BATCH, places)
    source, grads = (b.op("Transpose", n, perm=[1, 0, 2, 3]) for n in ("x", "g")) if together else ("x", "g")
    edge = KERNEL // 2
    padded = b.op("Pad", source, b.ints(0, 0, edge, edge, 0, 0, edge, edge))
    axes = b.ints(2, 3)
    taps = [b.op("Slice", padded, b.ints(i, j), b.ints(i + side, j + side), axes) for i in range(KERNEL) for j in range(KERNEL)]
    left = b.op("Reshape", grads, b.ints(batch, rows, places))
    if whole:
        read = b.op("Reshape", b.op("Concat", *taps, axis=0), b.ints(batch, len(taps) * inner, places))
        product = b.op("MatMul", left, b.op("Transpose", read, perm=[0, 2, 1]))
        shaped = b.op("Reshape", product, b.ints(rows, KERNEL, KERNEL, inner))
        return b.model({"x": x, "g": g}, b.op("Transpose", shaped, perm=[0, 3, 1, 2]))
    sums = []
    for tap in taps:
        read = b.op("Transpose", b.op("Reshape", tap, b.ints(batch, inner, places)), perm=[0, 2, 1])
        total = b.op("ReduceSum", b.op("MatMul", left, read), b.ints(0), keepdims=0)
        sums.append(b.op("Reshape", total, b.ints(rows, inner, 1)))
    return b.model({"x": x, "g": g}, b.op("Reshape", b.op("Concat", *sums, axis=2), b.ints(*w.shape)))


def measure(shape: tuple[int, int, int], threads: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each form.

    Raises:
        SystemExit: two forms of the weight's gradient disagree.
    """
    inner, rows, side = shape
    rng = np.random.default_rng(0)
    sizes = {"x": (BATCH, inner, side, side), "w": (rows, inner, KERNEL, KERNEL), "g": (BATCH, rows, side, side)}
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    sessions = {}
    for name, model in forms(arrays["x"], arrays["w"], arrays["g"]).items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        sessions[name] = session, {i.name: arrays[i.name] for i in session.get_inputs()}
    answers = [session.run(None, feeds)[0] for name, (session, feeds) in sessions.items() if name.startswith("dw")]
    for other in answers[1:]:
        if np.abs(other - answers[0]).max() > 1e-3 * np.abs(answers[0]).max():
            raise SystemExit(f"the forms disagree on {shape}")
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, (session, feeds) in sessions.items():
            began = time.perf_counter()
            session.run(None, feeds)
            seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * min(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    found = {shape: measure(shape, options.threads, options.rounds) for shape in SHAPES}
    names = list(dict.fromkeys(name for times in found.values() for name in times))
    rows = [[name, *(f"{found[s][name]:.1f}" if name in found[s] else "-" for s in SHAPES)] for name in names]
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    print(f"batch {BATCH}, kernel {KERNEL}x{KERNEL}, {options.threads} threads, least of {options.rounds}; {versions}\n")
    print(markdown_table(["ms; [in, out, side]", *(str(list(s)) for s in SHAPES)], rows))


if __name__ == "__main__":
    main()
