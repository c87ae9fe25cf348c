"""Run directories: where one job keeps its tape, summary, weights, checkpoints, logs and counters.

Without a wish a run goes to `outputs/DATE_TIME` under the working directory, and `outputs/latest` is a relative link to it, replaced in one
step so that it never dangles. Each fit is a new job: a directory that already holds a tape is not used again; the next free name with a
suffix -2, -3, ... is. Whoever writes the tape holds the directory's lock, so that two syncers can never write one tape.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Final

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.counters import counters_folder
from lightning_diloco.runtime.disk import disk_errors
from lightning_diloco.runtime.tape import TAPE_NAME

__all__ = ["SUBFOLDERS", "RunDirLock", "link_latest", "lock_run_dir", "make_run_dir"]

SUBFOLDERS: Final = ("checkpoints", "logs")
"""Folders that every run directory has, beside that of the counters."""
_OUTPUTS: Final = "outputs"
_LATEST: Final = "latest"
_LOCK_NAME: Final = ".lock"
_MAX_SUFFIX: Final = 10_000

_log = logging.getLogger(__name__)


def make_run_dir(path: Path | str | None = None) -> Path:
    """Create the directory of a new job.

    Args:
        path: where (created if missing), or None for `outputs/DATE_TIME` under the working directory. If it holds a tape, the same
            name with a suffix is used instead, and a log line says so. Inside a folder named `outputs` the link `latest` is set.

    Returns:
        The directory's absolute path, with its subfolders.

    Raises:
        ConfigurationError: the path is a file, or cannot be created.
    """
    try:
        run_dir = _make_dated(Path.cwd() / _OUTPUTS) if path is None else _make_given(Path(path).expanduser().absolute())
        for name in SUBFOLDERS:
            (run_dir / name).mkdir(exist_ok=True)
        counters_folder(run_dir)
    except OSError as error:
        raise ConfigurationError(f"run_dir={str(path)!r}: cannot be created ({error}). Give a directory that can be written to.") from error
    link_latest(run_dir)
    return run_dir


class RunDirLock:
    """An exclusive lock, held until `close` or the end of the process."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def close(self) -> None:
        """Give the directory free; idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> RunDirLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def lock_run_dir(run_dir: Path) -> RunDirLock:
    """Lock a run directory for the one process that writes its tape. The lock ends with the process, however it ends.

    Raises:
        ConfigurationError: another process holds it, or the directory cannot be written to.
        DiskError: its disk takes nothing now.
    """
    with disk_errors(run_dir):
        fd = os.open(run_dir / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ConfigurationError(
            f"{run_dir}: another syncer holds this run directory. One directory belongs to one job; stop that job or give another one."
        ) from error
    return RunDirLock(fd)


def _make_dated(outputs: Path) -> Path:
    outputs.mkdir(parents=True, exist_ok=True)
    return _make_fresh(outputs / time.strftime("%Y-%m-%d_%H-%M-%S"), is_first_free=True)


def _make_given(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(exist_ok=True)
    if not (path / TAPE_NAME).exists():
        return path
    fresh = _make_fresh(path, is_first_free=False)
    _log.warning("%s holds the tape of an earlier job; this job uses %s.", path, fresh)
    return fresh


def _make_fresh(path: Path, *, is_first_free: bool) -> Path:
    """Create a directory that nobody else has: mkdir is the arbiter between two jobs that start in the same second."""
    for number in range(1 if is_first_free else 2, _MAX_SUFFIX):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise FileExistsError(f"{path} and {_MAX_SUFFIX} names after it are taken")


def link_latest(run_dir: Path) -> None:
    """Point `latest` at a run in a folder named `outputs`, by a rename; a file system without links costs a log line and no more.

    Args:
        run_dir: of a run that starts; in another folder nothing is done.
    """
    if run_dir.parent.name != _OUTPUTS:
        return
    temporary = run_dir.parent / f".{_LATEST}.{run_dir.name}.{os.getpid()}"
    try:
        temporary.symlink_to(run_dir.name, target_is_directory=True)
        temporary.replace(run_dir.parent / _LATEST)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        _log.warning("%s could not be set to %s: %s", run_dir.parent / _LATEST, run_dir.name, error)
