"""Well-known networks with random weights, built node by node: timing needs shapes and masks, not training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from relrep_onnx.types import Array


@dataclass
class Builder:
    """A growing network; `conv` and the like take a tensor's name and give that of their result."""

    seed: int = 0
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: dict[str, Array] = field(default_factory=dict)

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """One node."""
        output = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def store(self, shape: tuple[int, ...], scale: float) -> str:
        """A random tensor."""
        name = f"w{len(self.tensors)}"
        self.tensors[name] = (scale * np.random.default_rng([self.seed, len(self.tensors)]).standard_normal(shape)).astype(
            np.float32
        )
        return name

    def conv(self, x: str, into: int, out: int, kernel: int, stride: int = 1, group: int = 1, act: str = "Relu") -> str:
        """A convolution with bias, BatchNormalization already folded, and an activation."""
        fan = into // group * kernel * kernel
        weight, bias = self.store((out, into // group, kernel, kernel), (2 / fan) ** 0.5), self.store((out,), 0.1)
        window: dict[str, Any] = {"strides": [stride] * 2, "pads": [kernel // 2] * 4, "group": group}
        return self.activate(self.add("Conv", x, weight, bias, **window), act)

    def activate(self, x: str, act: str) -> str:
        """Relu, Clip to [0, 6], or nothing."""
        if act == "Clip":
            self.tensors |= {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
            return self.add("Clip", x, "zero", "six")
        return self.add(act, x) if act else x

    def classify(self, x: str, channels: int, classes: int) -> str:
        """Global average pooling and a fully connected layer."""
        pooled = self.add("Flatten", self.add("GlobalAveragePool", x))
        return self.add("Gemm", pooled, self.store((classes, channels), channels**-0.5), self.store((classes,), 0.1), transB=1)

    def model(self, output: str, size: int) -> ModelProto:
        """The finished network, input float32[N, 3, size, size]."""
        x = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, size, size])
        y = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", None])
        stored = [numpy_helper.from_array(value, name) for name, value in self.tensors.items()]
        graph = helper.make_graph(self.nodes, "network", [x], [y], stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def resnet18() -> ModelProto:
    """ResNet-18 at 224 x 224."""
    b = Builder()
    x = b.add("MaxPool", b.conv("input", 3, 64, 7, 2), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    into = 64
    for out, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        branch = b.conv(b.conv(x, into, out, 3, stride), out, out, 3, act="")
        shortcut = x if into == out else b.conv(x, into, out, 1, stride, act="")
        x, into = b.activate(b.add("Add", branch, shortcut), "Relu"), out
    return b.model(b.classify(x, 512, 1000), 224)


def resnet20() -> ModelProto:
    """ResNet-20 for CIFAR at 32 x 32, 1x1 projections."""
    b = Builder()
    x, into = b.conv("input", 3, 16, 3), 16
    for out in (16, 32, 64):
        for block in range(3):
            stride = 2 if out > 16 and block == 0 else 1
            branch = b.conv(b.conv(x, into, out, 3, stride), out, out, 3, act="")
            shortcut = x if into == out else b.conv(x, into, out, 1, stride, act="")
            x, into = b.activate(b.add("Add", branch, shortcut), "Relu"), out
    return b.model(b.classify(x, 64, 10), 32)


def mobilenet_v2() -> ModelProto:
    """MobileNetV2 at 224 x 224."""
    b = Builder()
    x, into = b.conv("input", 3, 32, 3, 2, act="Clip"), 32
    for expansion, out, blocks, first in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(blocks):
            inner = into * expansion
            y = b.conv(x, into, inner, 1, act="Clip") if expansion > 1 else x
            y = b.conv(y, inner, inner, 3, first if block == 0 else 1, inner, "Clip")
            y = b.conv(y, inner, out, 1, act="")
            x, into = (b.add("Add", x, y) if block > 0 else y), out
    return b.model(b.classify(b.conv(x, into, 1280, 1, act="Clip"), 1280, 1000), 224)


NETWORKS: Final[dict[str, Callable[[], ModelProto]]] = {"resnet18": resnet18, "resnet20": resnet20, "mobilenetv2": mobilenet_v2}


def prune(model: ModelProto, sparsity: float, *, block: int = 1, along: int = 0, seed: int = 0) -> ModelProto:
    """The network with random masks of one sparsity in every layer, depthwise layers left dense.

    `block` neighbouring channels share their positions: output channels, or input channels for `along` 1.
    The activations keep their size: the survivors grow by 1 / sqrt(density).
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    weights = {node.input[1] for node in copy.graph.node if node.op_type in ("Conv", "Gemm")}
    for index, tensor in enumerate(copy.graph.initializer):
        weight = numpy_helper.to_array(tensor)
        if tensor.name not in weights or (weight.ndim == 4 and weight.shape[1] == 1):
            continue
        rng = np.random.default_rng([seed, index])
        share = block if weight.shape[along] % block == 0 else 1
        sizes = [size // share if axis == along else size for axis, size in enumerate(weight.shape)]
        kept = np.ones(int(np.prod(sizes)), np.bool_)
        kept[np.argsort(rng.random(kept.size))[: round(sparsity * kept.size)]] = False
        mask = np.repeat(kept.reshape(sizes), share, along)
        tensor.CopyFrom(numpy_helper.from_array((weight * mask / (1 - sparsity) ** 0.5).astype(np.float32), tensor.name))
    return copy
