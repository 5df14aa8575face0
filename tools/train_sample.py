"""Train and export the shipped sample: a small residual network on Fashion-MNIST.

This is the only file in the project that needs torch.  The data is Debian's package `dataset-fashion-mnist` (MIT licence).

    pip install torch onnx numpy
    apt-get install dataset-fashion-mnist
    python tools/train_sample.py --data /usr/share/datasets/fashion-mnist --out samples

It writes `fashion.onnx` (BatchNorm unfolded, 1x1 projections, one depthwise layer), `fashion_calib.npz` (512 training images, no
labels) and `fashion_test.npz` (the first 2,000 test images with labels), images as uint8[n, 28, 28, 1].
"""

from __future__ import annotations

import argparse
import gzip
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

MEAN, STD = 0.286, 0.353


def read_images(path: Path) -> np.ndarray:
    """Reads an IDX image file: uint8[n, 28, 28]."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)


def read_labels(path: Path) -> np.ndarray:
    """Reads an IDX label file: int64[n]."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=8).astype(np.int64)


def to_input(images: np.ndarray) -> Tensor:
    """uint8[n, 28, 28] -> float32[n, 1, 28, 28], normalised as the sample's documented preprocessing says."""
    return torch.from_numpy((images.astype(np.float32) / 255 - MEAN) / STD).unsqueeze(1)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class FashionNet(nn.Module):
    """Stem, three residual stages, one depthwise-separable layer, global pooling and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stage1 = Block(16, 24, 2)
        self.stage2 = nn.Sequential(Block(24, 48, 2), Block(48, 48, 1))
        self.stage3 = Block(48, 96, 2)
        self.depthwise = nn.Sequential(nn.Conv2d(96, 96, 3, 1, 1, groups=96, bias=False), nn.BatchNorm2d(96), nn.ReLU())
        self.pointwise = nn.Sequential(nn.Conv2d(96, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        x = self.pointwise(self.depthwise(x))
        return self.classifier(x.mean((2, 3)))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random horizontal flips and 2-pixel shifts, per image."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = functional.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
    dy, dx = torch.randint(0, 5, (2, len(images)), generator=generator)
    rows = dy[:, None] + torch.arange(28)
    columns = dx[:, None] + torch.arange(28)
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 as a fraction."""
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return hits / len(y)


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, seed: int) -> None:
    """SGD with a one-cycle schedule and label smoothing."""
    generator = torch.Generator().manual_seed(seed)
    batch = 128
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps, pct_start=0.25)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(x), generator=generator)
        for chunk in order[: len(x) // batch * batch].split(batch):
            loss = functional.cross_entropy(model(augment(x[chunk], generator)), y[chunk], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}", flush=True)


def export(model: nn.Module, path: Path) -> None:
    """Exports with BatchNorm kept as nodes, batch dimension symbolic, opset 17."""
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(1, 1, 28, 28),),
            str(path),
            opset_version=17,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            dynamo=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path("samples"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train_x = read_images(options.data / "train-images-idx3-ubyte.gz")
    train_y = read_labels(options.data / "train-labels-idx1-ubyte.gz")
    test_x = read_images(options.data / "t10k-images-idx3-ubyte.gz")
    test_y = read_labels(options.data / "t10k-labels-idx1-ubyte.gz")
    model = FashionNet()
    train(model, to_input(train_x), torch.from_numpy(train_y), epochs=options.epochs, seed=options.seed)
    top1 = accuracy(model, to_input(test_x), torch.from_numpy(test_y))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, top-1 on all 10,000 test images: {top1:.4f}")
    options.out.mkdir(parents=True, exist_ok=True)
    export(model, options.out / "fashion.onnx")
    np.savez_compressed(options.out / "fashion_calib.npz", image=train_x[:512, :, :, None])
    np.savez_compressed(options.out / "fashion_test.npz", image=test_x[:2000, :, :, None], label=test_y[:2000])


if __name__ == "__main__":
    main()
