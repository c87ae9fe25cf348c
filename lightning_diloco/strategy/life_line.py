"""A child's life line: the pipe on its standard input, whose other end only its supervisor holds.

A supervisor that ends, however it ends, closes the pipe; a thread that reads end-of-file then ends the child's whole process group, with
the loader workers in it. (Linux's parent-death signal would fire when the *thread* that started the child ends.) The first line on the
pipe is the child's assignment, so that nothing secret stands in its arguments or environment.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

__all__ = ["hold_life_line", "read_assignment"]

_MAX_LINE_BYTES = 1 << 20


def read_assignment(fd: int) -> dict[str, Any]:
    """Read the first line, byte for byte: a buffered reader would hold the pipe's lock when the interpreter ends.

    Raises:
        ValueError: the line is no JSON object, or the pipe was closed within it.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte or len(line) > _MAX_LINE_BYTES:
            raise ValueError("The assignment was cut off. This program is started by a supervisor, not by hand.")
        line += byte
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"The assignment is {value!r}: it must be a JSON object.")
    return value


def hold_life_line(fd: int) -> None:
    """End this process group when the pipe `fd` is closed; from here on standard input is empty."""
    line = os.dup(fd)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, fd)
    os.close(empty)
    threading.Thread(target=_watch, args=(line,), name="life-line", daemon=True).start()


def _watch(fd: int) -> None:
    while os.read(fd, 4096):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
