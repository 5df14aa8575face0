"""Calibration data: from whatever the user has to batches a session can run.  Imports go one way: sources, samples, images."""

from relrep_onnx.data.images import Preprocessing
from relrep_onnx.data.samples import Samples, split_holdout
from relrep_onnx.data.sources import DataOptions, lasting, load_samples

__all__ = ["DataOptions", "Preprocessing", "Samples", "lasting", "load_samples", "split_holdout"]
