"""What is kept of a founding that is complete, before anybody is told that there is a job: its files, and its payloads if they are kept.

Runs on the numerics thread, once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_diloco.outer import buffer_of
from lightning_diloco.runtime.payloads import PayloadKeeper, PayloadKey
from lightning_diloco.runtime.snapshot import Founding, SnapshotStore
from lightning_diloco.runtime.store import SyncerStore

__all__ = ["Founded", "founding_entries", "keep_founding"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Founded:
    """What a founding put into the store."""

    crcs: tuple[int, ...]
    """Of every fragment's values."""
    num_bytes: int
    """Payload bytes in all."""
    payload_at: int | None
    """Where its payloads were recorded; None: nowhere."""


def keep_founding(store: SyncerStore, snapshots: SnapshotStore, payloads: PayloadKeeper) -> Founded:
    """Put a complete founding on the disk; a disk that fails is logged, tried again before each snapshot, and the job begins."""
    founding = Founding(config=store.config, fingerprint=store.layout.fingerprint(), layout=store.layout, static=store.static)
    try:
        snapshots.write_founding(founding)
    except OSError as error:
        _log.error(
            "The founding could not be written to %s: %s. It is tried again before each snapshot; until it is there the run cannot be "
            "resumed. Free the disk.",
            snapshots.folder.parent,
            error,
        )
    return Founded(store.crcs(), store.founding_bytes, payloads.put_founding(founding_entries(store)))


def founding_entries(store: SyncerStore) -> Iterator[tuple[PayloadKey, memoryview | bytes]]:
    """What is kept of a founding that is complete: the layout, then each fragment's values, and its momentum if the founder brought one."""
    yield PayloadKey(kind="layout"), store.layout.to_bytes()
    for i in range(len(store.layout.fragments)):
        state = store.state(i)
        yield PayloadKey(kind="values", fragment_id=i), buffer_of(state.theta)
        if "momentum" in store.founding_parts:
            yield PayloadKey(kind="momentum", fragment_id=i), buffer_of(state.momentum)
