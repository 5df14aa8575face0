"""One measurement in a process of its own, for `cost.py`: `python -m tools.bench.worker '{"mode": "plain", ...}'`.

It prints one JSON object.  Peak memory is that of the whole process, libraries and samples included, so a run of plain inference
imports no more than plain inference needs.
"""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from relrep_onnx import Result


@dataclass(frozen=True)
class Order:
    """What to measure: `mode` is `plain`, `optimize` or `peer`; `samples` a .npy file of ready-made inputs."""

    mode: str
    model: str
    samples: str
    threads: int
    batch: int
    sparsity: float = 0.8
    allocate: str = "auto"
    repair: str = "reconstruct"


@dataclass(frozen=True)
class Measurement:
    """Seconds of each plain pass and of the run, peak bytes of the process, bytes of the largest layer's moments, layers.

    The last two are 0 but for `optimize`.
    """

    plain: tuple[float, ...]
    optimize: float
    peak: int
    moments: int
    layers: int


def plain_pass(order: Order, samples: Any) -> float:
    """Seconds of one inference pass over all samples; opening the session and the first batch are not counted."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = order.threads
    session = onnxruntime.InferenceSession(order.model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    session.run(None, {name: samples[: order.batch]})
    started = time.perf_counter()
    for start in range(0, len(samples), order.batch):
        session.run(None, {name: samples[start : start + order.batch]})
    return time.perf_counter() - started


def optimize(order: Order, samples: Any) -> tuple[float, Result]:
    """Seconds of one whole run, loading and verification included, and its result."""
    import relrep_onnx  # not on top: plain inference must not carry it

    config = relrep_onnx.Config(
        sparsity=order.sparsity, allocate=order.allocate, repair=order.repair, threads=order.threads, batch_size=order.batch
    )
    started = time.perf_counter()
    result = relrep_onnx.optimize(order.model, None, samples, config)
    return time.perf_counter() - started, result


def peer_seconds(order: Order, samples: Any) -> float:
    """Seconds of the peer on the same samples."""
    from tools.bench import peer  # not on top either

    return peer.prune(order.model, samples, order.sparsity, order.batch)[1]


def measure(order: Order) -> Measurement:
    """A plain pass; or a run between two plain passes, whose sessions are closed before and opened after it."""
    samples = np.load(order.samples)
    before = plain_pass(order, samples)
    if order.mode == "plain":
        return Measurement((before,), 0.0, peak_memory(), 0, 0)
    if order.mode == "peer":
        seconds = peer_seconds(order, samples)
        peak = peak_memory()
        return Measurement((before, plain_pass(order, samples)), seconds, peak, 0, 0)
    seconds, result = optimize(order, samples)
    peak = peak_memory()
    moments = max(report.layer.groups * report.layer.cols**2 * 8 for report in result.layers)
    return Measurement((before, plain_pass(order, samples)), seconds, peak, moments, len(result.layers))


def peak_memory() -> int:
    """Most bytes this process ever held in memory.

    Linux keeps the parent's peak in `ru_maxrss` of a process it starts, so its own count is asked first.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    print(json.dumps(dataclasses.asdict(measure(Order(**json.loads(sys.argv[1]))))))


if __name__ == "__main__":
    main()
