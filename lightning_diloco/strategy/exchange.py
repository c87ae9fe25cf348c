"""The folders through which the processes of one fit hand files to each other.

One is in the run directory. The other, empty as long as all is well, is in the system's folder for temporary files, which is mostly another
disk: at the end of a fit it takes what the disk of the run directory does not (results, training state, global model), so that a disk that
is full hides no result. Only this user can enter them, and both go when the fit ends.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_diloco.runtime.disk import unlink_quietly

__all__ = ["Exchange", "first_that_takes", "is_there", "spare_file"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Two folders of one fit."""

    launch_dir: Path
    spare_dir: Path | None
    """None: it could not be made."""

    @classmethod
    def make(cls, run_dir: Path) -> Exchange:
        """Make them.

        Args:
            run_dir: of the job; a folder that an earlier fit has left in it is removed.

        Raises:
            OSError: the run directory cannot be written to.
        """
        path = run_dir / "launch"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        try:
            spare = Path(tempfile.mkdtemp(prefix="lightning_diloco_"))
        except OSError as error:
            _log.warning(
                "There is no second place for the end of this fit: %s. Should the disk of %s fail, its result is lost.", error, run_dir
            )
            return cls(path, None)
        return cls(path, spare)

    def found(self, name: str, usual: Path) -> Path:
        """The folder that a file was written to at the end.

        Args:
            name: of the file.
            usual: where it is if nothing failed.
        """
        spare = spare_file(self.spare_dir, name)
        return usual if spare is None else spare.parent

    def remove(self) -> None:
        """Remove both, with all that is in them; never raises."""
        for folder in (self.launch_dir, self.spare_dir):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def is_there(path: Path) -> bool:
    """Whether a file exists; not if its disk does not tell."""
    try:
        return path.exists()
    except OSError:
        return False


def spare_file(spare_dir: Path | None, name: str) -> Path | None:
    """A file of the second folder, if it is there, and the folder is still this user's alone.

    A folder for temporary files may be swept after days, and then anybody may make one of the same name in it.

    Args:
        spare_dir: as it was made; None: there is none.
        name: of the file.
    """
    if spare_dir is None:
        return None
    try:
        about = spare_dir.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o077
    return spare_dir / name if is_ours and is_there(spare_dir / name) else None


def first_that_takes(write: Callable[[Path], None], path: Path, spare_dir: Path | None) -> Exception | None:
    """Write a file in one of two places.

    Args:
        write: writes it to a path; what it leaves half-written there, or under the suffix `.tmp`, is removed.
        path: the usual place.
        spare_dir: holds the other one.

    Returns:
        None, or why none has taken it.
    """
    failed: Exception | None = None
    for place in (path, None if spare_dir is None else spare_dir / path.name):
        if place is None:
            continue
        try:
            write(place)
        except Exception as error:
            failed = error
            unlink_quietly(place)
            unlink_quietly(place.with_suffix(".tmp"))
        else:
            if place is path and spare_dir is not None:
                # Of an earlier life, when the disk took nothing: it is out of date now.
                unlink_quietly(spare_dir / path.name)
            return None
    return failed
