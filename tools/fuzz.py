"""Hostile models and data through the real commands: `python tools/fuzz.py [--models N] [--data N] [--first SEED]`.

Each case is written by its seed (`tools/hostile*.py`) and goes through `inspect` and `optimize`, or as calibration data through
`optimize`, inside a worker process that is used until it dies.  A finding is: a traceback or anything but one sentence; an exit
code other than 0, 1, 2, 3; a time limit passed; memory beyond a limit; an output or a temporary file left by a command that
failed; a file outside the model's folder opened by anyone, ONNX Runtime included (watched by inotify, on Linux).  A worker that
dies inside ONNX Runtime is counted by itself.  The exit code is 0 when nothing was found.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import io
import json
import os
import re
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SECONDS: Final = 20.0
"""Of the processor, for one case, before it counts as a hang;"""
PATIENCE: Final = 30
"""or so many times as long on the clock: it waits for something, or the machine is very busy."""
MEMORY: Final = 3 << 30
"""Of address space that a worker may add to what it has when it is ready;"""
RESIDENT: Final = 256 << 20
"""and of memory that a case, whose files are some kilobytes, may really use."""
IN_ACCESS_OR_OPEN: Final = 0x1 | 0x20
PROGRESS: Final = re.compile(r"[a-z]+ \d+/\d+(, .*)?")


@dataclass(frozen=True)
class Outcome:
    """What became of one case: exit codes of its commands, messages, and what is wrong, if anything."""

    kind: str
    seed: int
    what: str
    codes: tuple[int, ...]
    messages: tuple[str, ...]
    findings: tuple[str, ...]


class Watch:
    """Tells whether a file was opened or read, by whomever; blind where the system has no inotify."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK) if hasattr(self._libc, "inotify_init1") else -1

    @contextlib.contextmanager
    def on(self, path: Path) -> Iterator[None]:
        """Watches a file for a while."""
        added = self._libc.inotify_add_watch(self._fd, os.fsencode(path), IN_ACCESS_OR_OPEN) if self._fd >= 0 else -1
        try:
            yield
        finally:
            if added >= 0:
                self._libc.inotify_rm_watch(self._fd, added)

    def seen(self) -> bool:
        """Whether something happened since it was last asked."""
        with contextlib.suppress(BlockingIOError):
            return self._fd >= 0 and any(event != 0x8000 for event in _masks(os.read(self._fd, 65536)))
        return False


def _masks(events: bytes) -> Iterator[int]:
    while events:
        yield int.from_bytes(events[4:8], sys.byteorder)
        events = events[16 + int.from_bytes(events[12:16], sys.byteorder) :]


def command(*arguments: str | Path) -> tuple[int, str, str]:
    """Runs one command as the installed program would: exit code, and what is wrong with how it ended, and its last line."""
    from relrep_onnx.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    problem = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.main([str(a) for a in arguments], prog_name="relrep-onnx")
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:  # what a user would see as a traceback
            problem, code = "traceback: " + traceback.format_exc()[-1500:], 1
    lines = [line for line in err.getvalue().split("\n") if line and not PROGRESS.fullmatch(line)]
    if not problem and code not in (0, 1, 2, 3):
        problem = f"exit code {code}"
    if not problem and lines[:-1] and not lines[0].startswith("Usage: "):
        problem = f"more than one sentence: {lines}"
    if not problem and bool(code) != bool(lines and lines[-1].startswith("Error: ")):
        problem = f"exit code {code} and {lines}"
    if not problem and re.search(r"[^\n -~\u00a0-\U0010ffff]", out.getvalue() + err.getvalue()):
        problem = "control characters in the output"
    if not problem and lines and len(lines[-1]) > 2000:
        problem = f"a message of {len(lines[-1])} characters"
    assert isinstance(code, int)
    return code, problem, lines[-1] if lines else ""


QUICK: Final = (
    "--num-samples",
    "8",
    "--batch-size",
    "4",
    "--threads",
    "1",
    "--min-size",
    "8",
    "--sparsity",
    "0.5",
    "--positions",
    "4",
)


def run_case(kind: str, seed: int, watch: Watch) -> Outcome:
    """One case in a folder that goes away."""
    from tools import hostile, hostile_bases, hostile_data

    with tempfile.TemporaryDirectory(prefix="relrep-fuzz-") as place:
        folder, results = Path(place), list[tuple[int, str, str, str]]()
        secret = folder / hostile.OUTSIDE
        if kind == "model":
            path, what = hostile.write_model(seed, folder)
            ids = ("--random-range", "0,10") if hostile.base_of(seed) is hostile_bases.attention else ()
            steps: list[tuple[str | Path, ...]] = [
                ("inspect", path, "--min-size", "8", *(["--gradients"] if seed % 3 == 0 else [])),
                ("optimize", path, path.with_name("out.onnx"), "--calib", "random", *QUICK, *ids,
                 *(("--allocate", "uniform", "--repair", "variance") if seed % 4 else ())),
            ]  # fmt: skip
        else:
            import numpy as np

            path = folder / "model.onnx"
            path.write_bytes(hostile_bases.conv(np.random.default_rng(0)).SerializeToString())
            data, what = hostile_data.write_data(seed, folder)
            skip = ("--skip-bad-samples",) if seed % 2 else ()
            steps = [("optimize", path, path.with_name("out.onnx"), "--calib", data, *QUICK, "--allocate", "uniform", *skip)]
        secret.parent.mkdir(exist_ok=True)
        secret.touch()
        before = set(path.parent.rglob("*"))
        findings = []
        reset_peak()
        resting = peak()
        with watch.on(secret):
            watch.seen()
            results.extend((*command(*step), str(step[0])) for step in steps)
            if watch.seen():
                findings.append("read outside the model's folder")
        if (grown := peak() - resting) > RESIDENT:
            findings.append(f"{grown >> 20} MiB of memory")
        findings += [f"{name}: {problem}" for _, problem, _, name in results if problem]
        findings += [f"{name}: {message}" for _, _, message, name in results if "out of memory" in message]
        left = {p.name for p in path.parent.rglob("*") if p not in before}
        if any(name.endswith(".tmp") or results[-1][0] != 0 for name in left):
            findings.append(f"left behind: {sorted(left)}")
        codes, messages = tuple(r[0] for r in results), tuple(r[2] for r in results)
        return Outcome(kind, seed, what, codes, messages, tuple(findings))


def reset_peak() -> None:
    """Starts the count of resident memory anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most bytes of memory that were resident since then."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
    return 0


def processor_seconds(process: int) -> float:
    """What a process has used so far."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def address_space() -> int:
    """Bytes of address space in use."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 1 << 30


def worker() -> None:
    """Reads cases, a line each, and answers with their outcomes, a line each."""
    answers = os.fdopen(os.dup(1), "w")
    import relrep_onnx.cli  # noqa: F401  before memory is counted
    from tools import hostile, hostile_data  # noqa: F401

    command("--version")
    limit = address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch()
    for line in sys.stdin:
        kind, seed = json.loads(line)
        answers.write(json.dumps(asdict(run_case(kind, seed, watch))) + "\n")
        answers.flush()


class Pool:
    """One worker, replaced when it dies or hangs."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self.process: subprocess.Popen[str] | None = None
        self._noise: IO[str] | None = None
        self.started = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None
        if self._noise is not None:
            self._noise.close()

    def run(self, kind: str, seed: int) -> Outcome:
        """One case; a hang is a finding, a death is told as the exit code of its signal, negative."""
        process = self.process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # a worker that is dead is met below
            process.stdin.write(json.dumps([kind, seed]) + "\n")
            process.stdin.flush()
        ready = self._answers(process)
        line = process.stdout.readline() if ready else ""
        if line:
            said = json.loads(line)
            return Outcome(kind, seed, said["what"], *(tuple(said[name]) for name in ("codes", "messages", "findings")))
        if ready:
            code = process.wait()
            last = self._said()
            self.close()
            ours = () if code < 0 else (f"the worker ended with {code}",)  # a signal is ONNX Runtime's, all else the fuzzer's
            return Outcome(kind, seed, f"the worker died: {last}", (code,), (), ours)
        self.close()
        return Outcome(kind, seed, "", (), (), (f"no end after {self._seconds:g} s",))

    def _answers(self, process: subprocess.Popen[str]) -> bool:
        """Whether the worker says something, or dies, in time."""
        assert process.stdout is not None
        began, used = time.monotonic(), processor_seconds(process.pid)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not selector.select(1.0):
                spent = processor_seconds(process.pid) - used
                if max(spent, (time.monotonic() - began) / PATIENCE) > self._seconds:
                    return False
        return True

    def _said(self) -> str:
        assert self._noise is not None
        self._noise.seek(0)
        return self._noise.read()[-300:]

    def _start(self) -> subprocess.Popen[str]:
        self.started += 1
        self._noise = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the worker
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._noise, text=True,
            env=environment,
        )  # fmt: skip
        return self.process


def attack(cases: list[tuple[str, int]], out: IO[str] | None = None) -> list[Outcome]:
    """Runs the cases in order."""
    outcomes = []
    with Pool() as pool:
        for number, (kind, seed) in enumerate(cases):
            outcome = pool.run(kind, seed)
            outcomes.append(outcome)
            if out is not None:
                out.write(json.dumps(asdict(outcome)) + "\n")
                out.flush()
            if number % 500 == 499:
                print(f"{number + 1} of {len(cases)}", file=sys.stderr)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """How many cases ended how."""
    lines = []
    for kind in dict.fromkeys(o.kind for o in outcomes):
        mine = [o for o in outcomes if o.kind == kind]
        last = collections.Counter(o.codes[-1] if o.codes else "hang" for o in mine)
        ends = ", ".join(
            f"{count} {'died by ' if isinstance(end, int) and end < 0 else ''}{end}"
            for end, count in sorted(last.items(), key=str)
        )
        found = sum(bool(o.findings) for o in mine)
        lines.append(f"{len(mine)} {kind} cases by the last exit code: {ends}; {found} with findings")
    return "\n".join(lines)


def main() -> None:
    """Runs the cases and lists what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--data", type=int, default=2_000)
    parser.add_argument("--first", type=int, default=0, help="The first seed of both.")
    parser.add_argument("--log", type=Path, help="Every outcome, as a line of JSON.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    cases = [(kind, arguments.first + i) for kind, n in (("model", arguments.models), ("data", arguments.data)) for i in range(n)]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(arguments.log.open("a")) if arguments.log else None
        outcomes = attack(cases, out)
    for outcome in outcomes:
        for finding in outcome.findings:
            print(f"{outcome.kind} {outcome.seed} ({outcome.what}): {finding}")
    print(table(outcomes))
    raise SystemExit(any(o.findings for o in outcomes))


if __name__ == "__main__":
    main()
