"""Real disks that fail: a small file system of its own, one without a byte left, one that can only be read. Only root can mount them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")


@contextmanager
def small_disk(path: Path, size: str = "2m") -> Iterator[Path]:
    """A file system of its own at `path`, which is created; skips the test where it cannot be mounted."""
    path.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> None:
    """Take what room there is, also what somebody has given free since the last call."""
    with (disk / "filler").open("ab", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """No byte is left, for the tape neither."""
    fill(disk)
    try:
        yield
    finally:
        (disk / "filler").unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Whoever opens a file of the run directory in it from now on can only read it: as after a remount, for processes that start."""
    folder = str(disk / "run")
    _mount("--bind", folder, folder)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


WAYS = {"full": full, "read_only": read_only}
