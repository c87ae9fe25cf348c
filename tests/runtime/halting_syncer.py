"""A syncer's process that stands still in the middle of a merge: ``python -m tests.runtime.halting_syncer FOLDER ARGUMENTS``.

The arguments are those of ``lightning-diloco``. While there is a file ``FOLDER/halt`` with the name of a moment, the numerics thread stops
at that moment of the next merge, writes which one it is to ``FOLDER/halted``, and goes on when ``halt`` is gone. The moments, in order:
``folded`` (contributions are in, nothing is merged), ``merged`` (their mean is there, the outer step is not), ``stepped`` (the new
version is there, and neither the tape nor anybody else knows of it). If there is a file ``FOLDER/bulk``, the endpoint in it is what
learners are told to send payloads to. The product has none of this: its functions are wrapped here.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from lightning_diloco.cli.main import main
from lightning_diloco.protocol.messages import ShardAddress
from lightning_diloco.runtime import store as store_module
from lightning_diloco.runtime.performer import Performer
from lightning_diloco.runtime.store import SyncerStore

__all__ = ["MOMENTS"]

MOMENTS = ("folded", "merged", "stepped")


def halt(folder: Path, moment: str, **which: int) -> None:
    """Stand still here as long as the file says so."""
    path = folder / "halt"
    is_here = path.exists() and path.read_text() == moment
    if is_here:
        temporary = folder / "halted.tmp"
        temporary.write_text(json.dumps(which))
        temporary.replace(folder / "halted")
    while is_here and path.exists():
        time.sleep(0.005)


def wrap(folder: Path) -> None:
    """Put the moments into the merge, and the other address into what learners are told."""
    close, take_step, job_options = SyncerStore.close, store_module.take_step, Performer.job_options

    def halting_close(self: SyncerStore, fragment_id: int, merge_index: int, **options: Any) -> Any:
        which = {"fragment_id": fragment_id, "n": merge_index}
        halt(folder, "folded", **which)
        closed = close(self, fragment_id, merge_index, **options)
        halt(folder, "stepped", **which)
        return closed

    def halting_step(fragment: Any, before: Any, merged: Any, step: Any, merge_index: int, **options: Any) -> Any:
        halt(folder, "merged", fragment_id=fragment.fragment_id, n=merge_index)
        return take_step(fragment, before, merged, step, merge_index, **options)

    def options_with_another_address(self: Performer) -> Any:
        path, options = folder / "bulk", job_options(self)
        return dataclasses.replace(options, shards=(ShardAddress(bulk_endpoint=path.read_text()),)) if path.exists() else options

    SyncerStore.close, store_module.take_step = halting_close, halting_step  # type: ignore[method-assign]
    Performer.job_options = options_with_another_address  # type: ignore[method-assign]


if __name__ == "__main__":
    wrap(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
