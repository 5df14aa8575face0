"""Loss and gradients of whole networks against torch's autograd, where torch is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

from relrep_onnx.distill import plan, step, traced
from relrep_onnx.graph import Graph, find_layers
from relrep_onnx.runtime import RuntimeOptions, Session
from relrep_onnx.types import Array, Feeds, Selection
from tests.models import build, feeds_of, linear, random
from tests.test_distill import pruned

torch = pytest.importorskip("torch", reason="torch is not installed")

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
RUNTIME = RuntimeOptions(1)


def transformer(width: int = 16, heads: int = 2, length: int = 5) -> ModelProto:
    """One encoder block: attention, residual sums, layer norms, a GELU network, a classifier on the first position."""
    tensors: dict[str, Array] = {f"{n}.{k}": random(i, width) for i, n in enumerate(("ln1", "ln2")) for k in ("s", "b")}
    nodes = []
    split = np.array([0, length, heads, width // heads], np.int64)
    tensors |= {"split": split, "join": np.array([0, length, width], np.int64), "first": np.array(0, np.int64)}
    tensors["scale"] = np.array((width / heads) ** 0.5, np.float32)
    for i, name in enumerate(("q", "k", "v")):
        tensors[f"{name}.w"] = random(20 + i, width, width) / np.float32(width**0.5)
        tensors[f"{name}.b"] = random(30 + i, width)
        nodes += [
            helper.make_node("MatMul", ["x", f"{name}.w"], [f"{name}m"], name=name),
            helper.make_node("Add", [f"{name}m", f"{name}.b"], [f"{name}a"]),
            helper.make_node("Reshape", [f"{name}a", "split"], [f"{name}r"]),
            helper.make_node("Transpose", [f"{name}r"], [f"{name}h"], perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]),
        ]
    tensors["o.w"] = random(40, width, width) / np.float32(width**0.5)
    tensors["up.w"] = random(41, width, 4 * width) / np.float32(width**0.5)
    tensors["down.w"] = random(42, 4 * width, width) / np.float32(2 * width**0.5)
    nodes += [
        helper.make_node("MatMul", ["qh", "kh"], ["scores"]),
        helper.make_node("Div", ["scores", "scale"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "vh"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "join"], ["joined"]),
        helper.make_node("MatMul", ["joined", "o.w"], ["attended"]),
        helper.make_node("Add", ["x", "attended"], ["sum1"]),
        helper.make_node("LayerNormalization", ["sum1", "ln1.s", "ln1.b"], ["norm1"]),
        helper.make_node("MatMul", ["norm1", "up.w"], ["up"]),
        helper.make_node("Gelu", ["up"], ["bent"]),
        helper.make_node("MatMul", ["bent", "down.w"], ["down"]),
        helper.make_node("Add", ["norm1", "down"], ["sum2"]),
        helper.make_node("LayerNormalization", ["sum2", "ln2.s", "ln2.b"], ["norm2"]),
        helper.make_node("Gather", ["norm2", "first"], ["cls"], axis=1),
        linear("head", "cls", "out", tensors, width, 4, 50),
    ]
    return build(nodes, {"x": ("n", length, width)}, ["out"], tensors, opset=20, ir_version=9)


def gaps(dense: ModelProto, sparse: ModelProto, feeds: Feeds, selection: Selection) -> dict[str, float]:
    """How far the loss and each gradient are from torch's, relative to the norm."""
    from tools.bench import torch_graph

    layers = find_layers(Graph(sparse), selection)[0]
    d = plan(dense, sparse, layers, {name: array[:1] for name, array in feeds.items()}, RUNTIME)
    values = {name: Graph(sparse).stored(name) for name in d.names}
    built = step(d, traced(d.sparse, {**feeds, **values}, RUNTIME))
    ours = Session(built.model.SerializeToString(), RUNTIME).run({**feeds, **values})

    inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
    with torch.no_grad():
        teacher = torch_graph.run(dense, {**torch_graph.values_of(dense), **inputs})
    stored = torch_graph.values_of(sparse)
    for name in d.names:
        stored[name].requires_grad_()
    student = torch_graph.run(sparse, {**stored, **inputs})
    parts = [
        sum(((student[n] - teacher[n]) ** 2).sum() / (teacher[n] ** 2).sum() for n in names) / len(names)
        for names in (d.ends, d.outputs)
        if names
    ]
    loss = torch.stack(parts).sum()
    loss.backward()
    found = {"loss": abs(float(ours[built.loss]) / loss.item() - 1)}
    for name, gradient in zip(d.names, built.gradients, strict=True):
        expected = stored[name].grad.numpy()
        gap = float(np.linalg.norm(ours[gradient] - expected))
        found[name] = gap / max(float(np.linalg.norm(expected)), 1e-12)
    return found


def within(found: dict[str, float], tolerance: float) -> bool:
    """The loss to 1e-4, every gradient to the tolerance."""
    return found.pop("loss") <= 1e-4 and max(found.values()) < tolerance


def test_transformer_block() -> None:
    dense = transformer()
    assert within(gaps(dense, pruned(dense), feeds_of(dense, 6), Selection(min_size=1)), 1e-4)


def test_the_sample() -> None:
    dense = onnx.load(ROOT / "samples" / "fashion.onnx")
    with np.load(ROOT / "samples" / "fashion_calib.npz") as archive:
        x = archive["image"][:16].astype(np.float32).transpose(0, 3, 1, 2) / 255
    assert within(gaps(dense, pruned(dense), {"image": x}, Selection(min_size=1)), 1e-3)


@pytest.mark.parametrize("name", ["resnet20_bn", "resnet20_dynamo18", "mlperf_tiny_resnet8"])
def test_residual_networks(name: str) -> None:
    path = DATA / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    dense = onnx.load(path)
    assert within(gaps(dense, pruned(dense, 0.4), feeds_of(dense, 8), Selection()), 1e-3)
