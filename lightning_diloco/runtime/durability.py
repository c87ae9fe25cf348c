"""When snapshots are written: on a thread of their own, which waits for the disk so that nobody else does.

A disk that fails never ends a run: the error is logged loudly, the snapshot before stays, and the next one is tried at its time. What is
written is asked for fragment by fragment, on the disk thread: one read of a reference that the loop thread replaces.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from lightning_diloco.protocol.identity import Version
from lightning_diloco.runtime.snapshot import FragmentSnapshot, SnapshotStore
from lightning_diloco.runtime.threads import never_interrupt_others

__all__ = ["SnapshotKeeper"]

_log = logging.getLogger(__name__)


class SnapshotKeeper:
    """Writes snapshots of one job; its methods belong to the loop thread.

    Args:
        snapshots: where they go.
        ask: gives one fragment as it is now; called on the disk thread.
        on_loop: runs a function on the loop thread, soon.
    """

    def __init__(
        self, snapshots: SnapshotStore, *, ask: Callable[[int], FragmentSnapshot], on_loop: Callable[[Callable[[], None]], None]
    ) -> None:
        self._snapshots, self._ask, self._on_loop = snapshots, ask, on_loop
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="diloco-disk", initializer=never_interrupt_others)
        self._num_fragments = 0
        self._interval_s = 0.0
        self._due_s = 0.0
        self._is_writing = False
        self._versions: tuple[Version, ...] = ()
        self.num_written = 0
        """Snapshots that are on the disk."""
        self.num_failed = 0
        """Snapshots that the disk refused."""

    def begin(self, num_fragments: int, interval_s: float) -> None:
        """There is a model: the first snapshot is due now."""
        self._num_fragments, self._interval_s, self._due_s = num_fragments, interval_s, time.monotonic()

    def tick(self, now_s: float) -> None:
        """Write if it is time, and if the last one is done."""
        if self._num_fragments and not self._is_writing and now_s >= self._due_s:
            self.write(lambda: None)

    def write(self, then: Callable[[], None]) -> None:
        """Write one now, behind the one that is being written; `then` is called on the loop thread, whether the disk took it or not."""
        self._is_writing, self._due_s = True, time.monotonic() + self._interval_s
        self._thread.submit(self._write, then)

    def close(self, *, writes: bool) -> None:
        """End the thread; `writes`: the job is over, one last snapshot is kept."""
        if writes and self._num_fragments:
            self._thread.submit(self._write, lambda: None)
            self._thread.submit(self._snapshots.prune, 1)
        self._thread.shutdown(wait=True)

    def _write(self, then: Callable[[], None]) -> None:
        """On the disk thread."""
        try:
            versions = tuple(self._ask(i).version for i in range(self._num_fragments))
            if versions != self._versions:
                self._snapshots.write([partial(self._ask, i) for i in range(self._num_fragments)])
                self._versions = versions
                self.num_written += 1
        except Exception as error:  # whatever it is, it must not end the run, and the loop waits for an answer
            self.num_failed += 1
            _log.error(
                "The snapshot could not be written to %s: %s. The run goes on, and the snapshot before is kept; free the disk, or a "
                "syncer that starts again goes back to it.",
                self._snapshots.folder,
                error,
            )
        self._on_loop(partial(self._done, then))

    def _done(self, then: Callable[[], None]) -> None:
        self._is_writing = False
        then()
