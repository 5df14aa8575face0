"""Where points run: in this process one by one, or in several; a Dask cluster is in `cluster.py`.

An engine is a function of tasks that yields each with its outcome, in whatever order they end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Final

from relrep_onnx.sweeps.trial import Outcome, Task, attempt

Engine = Callable[[Sequence[Task]], Iterator[tuple[Task, Outcome]]]
MATRIX_THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What NumPy's matrix products read when they are loaded."""


def here(tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
    """One by one in this process."""
    return ((task, attempt(task)) for task in tasks)


def processes(jobs: int) -> Engine:
    """So many at a time, each in a fresh process: its memory is given back, and one that is killed takes no other with it."""

    def run(tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        context = get_context("spawn")
        waiting = deque(tasks)
        running: dict[Connection, tuple[BaseProcess, Task]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    receiver, sender = context.Pipe(duplex=False)
                    process: BaseProcess = context.Process(target=_serve, args=(sender, waiting[0]), daemon=True)
                    with _cores_shared(jobs), _interrupts_ours():
                        process.start()
                    sender.close()
                    running[receiver] = process, waiting.popleft()
                ready = connection.wait(list(running))
                for receiver in [r for r in running if r in ready]:
                    ended, task = running.pop(receiver)
                    yield task, _outcome(receiver, ended)
        finally:
            for left, _ in running.values():
                left.terminate()
                left.join()

    return run


def _serve(sender: Connection, task: Task) -> None:
    """The body of a process; it ends with the one that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(attempt(task))


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _outcome(receiver: Connection, process: BaseProcess) -> Outcome:
    """What a process sent, or how it died."""
    with receiver, suppress(EOFError):
        outcome: Outcome = receiver.recv()
        process.join()
        return outcome
    process.join()
    code = process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
    return f"its process {how}; if memory ran out, give fewer --jobs or a smaller --max-memory"


@contextmanager
def _interrupts_ours() -> Iterator[None]:
    """New processes never see Ctrl-C, which a terminal sends to all: the one that started them ends them."""
    resource_tracker.ensure_running()  # else the first process starts it, which lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _cores_shared(jobs: int) -> Iterator[None]:
    """New processes get their share of the cores for matrix products, unless the environment already says how many."""
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    added = [name for name in MATRIX_THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, share))
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
