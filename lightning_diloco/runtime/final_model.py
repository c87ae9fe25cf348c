"""What a syncer leaves at the end of a job: the global model, and what a checkpoint needs to go on from it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from lightning_diloco.runtime.disk import unlink_quietly
from lightning_diloco.runtime.global_state import OUTER_NAME
from lightning_diloco.runtime.store import SyncerStore

__all__ = ["GLOBAL_NAME", "keep_final_model"]

GLOBAL_NAME: Final = "global.safetensors"
"""Name of the global model inside a run directory."""

_log = logging.getLogger(__name__)


def keep_final_model(store: SyncerStore, versions: tuple[int, ...], run_dir: Path, spare_dir: Path | None) -> bool:
    """Write the global model, and its outer state beside it; into another folder if the run directory does not take them.

    Args:
        store: holds the model.
        versions: of its fragments.
        run_dir: of the job.
        spare_dir: a folder on another disk, from which the calling process takes them (None: there is none).

    Returns:
        Whether they are in one of the two; what stops that is logged.
    """
    for folder in (run_dir, spare_dir):
        if folder is None:
            continue
        files = [folder / GLOBAL_NAME, folder / OUTER_NAME]
        try:
            store.save_global(files[0])
            store.save_outer(files[1], versions)
        except (OSError, SafetensorError) as error:
            _log.error("The global model could not be written to %s: %s.", folder, error)
            for path in files:
                unlink_quietly(path.with_suffix(".tmp"))
        else:
            return True
    return False
