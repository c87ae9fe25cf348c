"""Signs of life of the thread that this process is there for, for a supervisor in another one: a counter in a mapped file of eight bytes.

In a learner that is the training thread, in a syncer the loop. There is one of them in a process that is watched, so the counter is the
process's own: whoever works or waits on that thread gives signs, wherever it stands in the code. A sign is one 8-byte store: no system
call, no lock. A process that nobody watches has no file, and gives none.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

__all__ = ["begin_signs", "give_sign", "read_signs"]

_SIZE = 8

_words: memoryview | None = None


def begin_signs(path: Path) -> None:
    """Give signs in this file from now on.

    Args:
        path: created or overwritten; its folder must exist.

    Raises:
        OSError: the file cannot be created, or the disk is full.
    """
    global _words
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        # Real blocks now: a store into a hole of a full disk would end the process with SIGBUS.
        os.posix_fallocate(fd, 0, _SIZE)
        _words = memoryview(mmap.mmap(fd, _SIZE)).cast("Q")
    finally:
        os.close(fd)


def give_sign() -> None:
    """The thread lives: it begins something, ends something, or waits for something that is right to wait for."""
    if _words is not None:
        _words[0] += 1


def read_signs(path: Path) -> int:
    """How many signs a process has given; 0 before it has begun."""
    try:
        return int.from_bytes(path.read_bytes()[:_SIZE], "little")
    except OSError:
        return 0
