"""Disks that take nothing: what is said of it, and what is done without them.

While a job runs, a disk that fails costs what cannot be written and no more. At a start it is different: the number of this start (the
epoch) must be durable before anything is served, or the next start would use it again, for other bytes. So a syncer that cannot write it
ends with `DISK_FAILED`, and whoever looks after it tries again.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from lightning_diloco.errors import ConfigurationError, DiskError

__all__ = ["DISK_FAILED", "FAILS", "disk_errors", "lose_output_of_a_full_disk", "unlink_quietly"]

DISK_FAILED: Final = 74
"""Exit code of a syncer whose disk takes nothing (`EX_IOERR` of sysexits.h)."""
FAILS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Errors of a disk that may be over in a while; others, as of rights, are not."""

_log = logging.getLogger(__name__)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says of a disk into a sentence.

    Args:
        folder: what is written to.

    Raises:
        DiskError: instead of an OSError that says so.
        ConfigurationError: instead of another one, as of rights. (Whoever reads our output and goes is no matter of the folder.)
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        if error.errno not in FAILS:
            raise ConfigurationError(f"{folder}: cannot be written to ({error}). Give a directory that can be written to.") from error
        raise DiskError(
            f"{folder}: its disk takes nothing ({error}). A syncer that cannot write down its start serves nothing. Free the disk, or make "
            "it writable, and start again."
        ) from error


def unlink_quietly(path: Path) -> None:
    """Remove a half-written file, which would go on taking room; a disk that refuses that too has been complained of."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def lose_output_of_a_full_disk() -> None:
    """From here on a `print` into a file whose disk is full, or can only be read, is lost, and raises nothing.

    The output of most processes of a job is a file of the run directory. Without this a line of the user's that prints would end the job,
    and a syncer that has a sentence to say of its disk would end with another exit code.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with suppress(OSError, ValueError, AttributeError):
            if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                stream.flush()
                buffer = io.BufferedWriter(_Lossy(stream.fileno(), "wb", closefd=False))
                form: dict[str, Any] = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
                setattr(sys, name, io.TextIOWrapper(buffer, **form))


class _Lossy(io.FileIO):
    """A file that takes everything, and keeps what its disk takes."""

    def write(self, data: Any, /) -> int:
        """Write what the disk takes; what a full or read-only one refuses counts as written."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in FAILS:
                raise
            return int(memoryview(data).nbytes)
