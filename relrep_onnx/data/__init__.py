"""Calibration data: from what users have to batches a session can run.  Imports go one way: sources, samples, images, arrays."""

from relrep_onnx.data.images import Preprocessing
from relrep_onnx.data.samples import Entry, Samples, halves, runs, split_holdout
from relrep_onnx.data.sources import DataOptions, files_of, lasting, load_samples

__all__ = [
    "DataOptions",
    "Entry",
    "Preprocessing",
    "Samples",
    "files_of",
    "halves",
    "lasting",
    "load_samples",
    "runs",
    "split_holdout",
]
