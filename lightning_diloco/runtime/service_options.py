"""What a syncer's service is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_diloco.runtime.keys import SyncerKeys

__all__ = ["ServiceOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """What a syncer is started with.

    Args:
        run_dir: the job's folder, which this service locks.
        bind: control endpoint to bind; port 0 takes a free one; `inproc://NAME` for a learner in this process.
        token: what a learner must show ("" = nothing).
        takeover_token: what lets a process take a learner's id ("" = nobody).
        num_slots: configured learners (None: open membership).
        supervised: somebody else decides the end (`finish`) and writes `summary.json`.
        resume: the job in the folder goes on.
        rebuild: nothing of the job is left but its learners: they dial `bind`, and the folder is written from what they tell.
        bulk: bulk endpoint to bind ("": any free port beside `bind`).
        observer_token: what `lightning-diloco status` must show ("" = nothing).
        keys: of this syncer: links are encrypted, and only sites that it admits are let in.
        shard: which part of the fragments this process merges.
        num_shards: how many such processes the syncer has.
        spare_dir: where the global model goes at the end if `run_dir` does not take it (None: then the run has failed).
        shard_endpoints: where the others listen, from shard 1 on; only the lead (shard 0) is asked, so the others need not know.
    """

    run_dir: Path
    bind: str = "tcp://127.0.0.1:0"
    bulk: str = ""
    token: str = ""
    takeover_token: str = ""
    num_slots: int | None = None
    supervised: bool = False
    resume: bool = False
    rebuild: bool = False
    observer_token: str = ""
    keys: SyncerKeys | None = None
    shard: int = 0
    num_shards: int = 1
    shard_endpoints: tuple[str, ...] = ()
    spare_dir: Path | None = None
