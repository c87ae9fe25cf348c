"""The ends of a learner's steps, measured in the learner and readable from outside, also after its death.

A file of 8-byte words, mapped into memory: the number of steps, then the monotonic time of each step's end as float64. Linux has one
monotonic clock for all processes, so the times of several learners, and of the faults, lie on one axis. The file has its full size from
the beginning: to write is two stores into memory, no system call. Whoever is killed leaves all steps but perhaps the last.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

__all__ = ["StepFile", "longest_gap_s", "read_steps"]

MAX_STEPS = 200_000


class StepFile:
    """The writing side.

    Args:
        path: of the file, which must not exist.
    """

    def __init__(self, path: Path) -> None:
        size = 8 * (1 + MAX_STEPS)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.posix_fallocate(fd, 0, size)
        self._map = mmap.mmap(fd, size)
        os.close(fd)
        self._count = 0

    def note(self) -> None:
        """A step has ended."""
        if self._count < MAX_STEPS:
            struct.pack_into("<d", self._map, 8 * (1 + self._count), time.monotonic())
            self._count += 1
            struct.pack_into("<q", self._map, 0, self._count)


def read_steps(path: Path) -> list[float]:
    """Monotonic times of the ends of all steps so far; empty if the process has not begun."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        head = file.read(8)
        count = struct.unpack("<q", head)[0] if len(head) == 8 else 0
        return list(struct.unpack(f"<{count}d", file.read(8 * count)))


def longest_gap_s(ends: list[float], begin_s: float, end_s: float) -> float | None:
    """The longest distance between two ends of steps of which the later one is after `begin_s` and the earlier one before `end_s`.

    Returns:
        None if there is no such pair.
    """
    gaps = [after - before for before, after in zip(ends, ends[1:], strict=False) if after > begin_s and before < end_s]
    return max(gaps, default=None)
