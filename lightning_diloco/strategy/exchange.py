"""The folders through which the processes of one fit hand files to each other.

One is in the run directory. The other, empty as long as all is well, is in the system's folder for temporary files, which is mostly another
disk: at the end of a fit it takes what the disk of the run directory does not (results, training state, global model), so that a disk that
is full hides no result. Only this user can enter them, and both go when the fit ends.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_diloco.runtime.disk import unlink_quietly

__all__ = ["Exchange", "first_that_takes"]

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
        return self.spare_dir if self.spare_dir is not None and (self.spare_dir / name).exists() else usual

    def remove(self) -> None:
        """Remove both, with all that is in them; never raises."""
        for folder in (self.launch_dir, self.spare_dir):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


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
            return None
    return failed
