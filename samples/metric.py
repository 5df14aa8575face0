"""The sample's own metric for `--eval samples.metric:top1`: accuracy on its 2,000 labelled test images."""

from pathlib import Path
from typing import Any

import numpy as np


def top1(session: Any) -> float:
    """Top-1 accuracy, as a fraction, of an onnxruntime.InferenceSession of `fashion.onnx` or a sparse version of it."""
    with np.load(Path(__file__).with_name("fashion_test.npz")) as data:
        images, labels = data["image"], data["label"]
    x = ((images.astype(np.float32) / 255 - 0.286) / 0.353).transpose(0, 3, 1, 2)
    logits = np.concatenate([session.run(None, {"image": batch})[0] for batch in np.split(x, 20)])
    return float(np.mean(logits.argmax(axis=1) == labels))
