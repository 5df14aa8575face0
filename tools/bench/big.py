"""A model over 2 GB with external data, in and out: time and peak memory: `python -m tools.bench.big`.

The model is a chain of square products with residual sums, made weight by weight; it never lies in memory here.  The run is a
process of its own whose peak is that of the whole process, libraries included, once with pages that ONNX Runtime maps from the
weights' file (the system takes them back when it needs them) and once without.  `--as-large` takes a smaller chain as one over
2 GB is taken, to see what grows with what.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

import relrep_onnx
from relrep_onnx import Config
from relrep_onnx.graph import external, storage
from tools.bench.data import environment
from tools.bench.worker import peak_memory

SAMPLES = 64


def write_model(path: Path, width: int, layers: int) -> int:
    """Writes `layers` residual layers of `width` inputs and outputs; gives the bytes of their weights."""
    rng = np.random.default_rng(0)
    nodes, tensors, x = [], [], "x"
    size = 4 * width * width
    with path.with_suffix(".data").open("wb") as data:
        for i in range(layers):
            weight = rng.standard_normal((width, width), np.float32) / np.float32(width**0.5)
            data.write(weight.tobytes())
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=(width, width))
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", path.with_suffix(".data").name), ("offset", i * size), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            nodes.append(helper.make_node("Gemm", [x, f"w{i}"], [f"h{i}"], name=f"layer{i}"))
            nodes.append(helper.make_node("Tanh", [f"h{i}"], [f"t{i}"]))
            nodes.append(helper.make_node("Add", [x, f"t{i}"], [f"x{i}"]))
            x = f"x{i}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "big", ends[:1], ends[1:], tensors)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
    return layers * size


class Watch(threading.Thread):
    """Looks at the process's own pages, those of mapped files left out, every 20 ms; `peak` is the most it saw, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            own = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, own)
            time.sleep(0.02)


def measure(path: Path, width: int, repair: str, allocate: str) -> dict[str, float]:
    """One run in this process."""
    watch = Watch()
    watch.start()
    samples = np.random.default_rng(1).standard_normal((SAMPLES, width), np.float32)
    config = Config(sparsity=0.5, repair=repair, allocate=allocate, threads=1)
    result = relrep_onnx.optimize(path, path.with_name("sparse.onnx"), samples, config)
    return {"seconds": result.seconds, "peak": peak_memory(), "own": watch.peak, "sparsity": result.sparsity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=38, help="38 of width 4096 are 2.55 GB")
    parser.add_argument("--repair", default="variance")
    parser.add_argument("--allocate", default="rr-curve")
    parser.add_argument("--as-large", action="store_true", help="as if the model were over 2 GB")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # one run in this process
    options = parser.parse_args()
    if options.here:
        if options.as_large:
            vars(external)["MESSAGE"] = vars(storage)["MESSAGE"] = 0
        print(json.dumps(measure(options.here, options.width, options.repair, options.allocate)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.onnx"
        size = write_model(path, options.width, options.layers)
        command = [sys.executable, "-m", "tools.bench.big", "--here", str(path), "--width", str(options.width)]
        settings = ["--repair", options.repair, "--allocate", options.allocate, *["--as-large"] * options.as_large]
        done = subprocess.run([*command, *settings], check=True, capture_output=True, text=True)
        given = json.loads(done.stdout.splitlines()[-1])
        written = sum(file.stat().st_size for file in Path(folder).glob("sparse.onnx*"))
    versions = ", ".join(f"{key} {value}" for key, value in environment().items())
    print(f"{size / 1e9:.3f} GB of weights, {SAMPLES} samples, {options.repair}, {options.allocate}, one thread; {versions}")
    print(f"{given['seconds']:.0f} s, peak {given['peak'] / 1e9:.3f} GB, {given['own'] / 1e9:.3f} GB without mapped files,")
    print(f"sparsity {given['sparsity']:.4f}, written {written / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
