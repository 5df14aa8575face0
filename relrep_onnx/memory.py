"""How much memory there is: what a file asks for is held against it before it is read."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

UNKNOWN = 8 << 30
"""Bytes that are taken to be free where the system does not tell."""
WIDEST = 8
"""Bytes of the largest numbers."""


def free_memory() -> int:
    """Bytes that can still be had without swapping, within this process's limit (`ulimit -v`) if it has one."""
    return min(_available(), _under_limit())


def has_room(shape: Sequence[int]) -> bool:
    """Whether an array of this shape fits, whatever numbers it holds."""
    return math.prod(shape) * WIDEST <= free_memory()


def _available() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/meminfo").read_text(encoding="ascii").split("MemAvailable:")[1].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return UNKNOWN


def _under_limit() -> int:
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            return max(0, limit - used)
    return sys.maxsize
