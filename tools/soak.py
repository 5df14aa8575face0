"""The sparse kernels over a long time: `python tools/soak.py [--runs 10000] [--sessions 500]`.

Memory after many runs with changing shapes, and after many sessions, against memory after the first tenth of them; then threads
that run one session together while they open and close their own.  The exit code is 0 when memory stood still and every answer
was right.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.kernel_models import SparseLayer, session, sparse_weight
from tests.models import random

ALLOWED: Final = 2048
"""Kilobytes that the process may grow by, whatever the number of runs."""
THREADS: Final = 8
CONV: Final = SparseLayer(sparse_weight(5, (64, 32, 3, 3), 0.2), activation="Relu", window={"pads": [1, 1, 1, 1]})
GEMM: Final = SparseLayer(sparse_weight(5, (96, 64), 0.2))


def memory() -> int:
    """Kilobytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def growth(act: Callable[[int], None], count: int) -> int:
    """Kilobytes gained between the first tenth of `count` acts and the last."""
    for i in range(count // 10):
        act(i)
    before = memory()
    for i in range(count // 10, count):
        act(i)
    return memory() - before


def runs(count: int) -> int:
    """Growth over runs of a convolution and a product whose input shapes change."""
    conv, gemm = session(CONV.sparse(), sparse=True, threads=2), session(GEMM.sparse(), sparse=True, threads=2)

    def act(i: int) -> None:
        conv.run(None, {"x": np.zeros((1 + i % 2, 32, 8 + i % 12, 8), np.float32)})
        gemm.run(None, {"x": np.zeros((1 + i % 40, 64), np.float32)})

    return growth(act, count)


def sessions(count: int) -> int:
    """Growth over sessions that are made, run and closed."""
    model, x = CONV.sparse().SerializeToString(), {"x": random(1, 1, 32, 9, 9)}

    def act(_: int) -> None:
        session(model, sparse=True, threads=2).run(None, x)

    return growth(act, count)


def crowd(rounds: int) -> int:
    """Wrong answers while `THREADS` threads run one session together, and open and close their own."""
    model, x = CONV.sparse().SerializeToString(), {"x": random(1, 1, 32, 28, 28)}
    shared = session(model, sparse=True, threads=2)
    wanted = session(model, sparse=True).run(None, x)[0]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(rounds):
            own = session(model, sparse=True, threads=2)
            wrong.extend(1 for s in (own, shared) if not np.array_equal(s.run(None, x)[0], wanted))
            del own  # closes while the others run

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong)


def main() -> None:
    """Prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--sessions", type=int, default=500)
    arguments = parser.parse_args()
    grown = {f"{arguments.runs} runs": runs(arguments.runs), f"{arguments.sessions} sessions": sessions(arguments.sessions)}
    for what, kilobytes in grown.items():
        print(f"{what}: memory grew by {kilobytes} kB", flush=True)
    rounds = max(1, arguments.sessions // THREADS)
    wrong = crowd(rounds)
    print(f"{THREADS} threads, {THREADS * rounds} sessions opened and closed around a shared one: {wrong} wrong answers")
    sys.exit(1 if wrong or max(grown.values()) > ALLOWED else 0)


if __name__ == "__main__":
    main()
