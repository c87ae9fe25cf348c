"""`LiveSummary` of a syncer with several shards: one fold over all their tapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from lightning_diloco.metrics import ShardedFold, renumbered
from lightning_diloco.protocol.records import ContributionRecord, JobRecord, MergeRecord, PublishRecord, TapeLine
from lightning_diloco.runtime.live_summary import PORTION_BYTES, LiveSummary
from lightning_diloco.runtime.shards import shard_dir
from lightning_diloco.runtime.tape import TAPE_NAME, TapeTail

__all__ = ["ShardedLive"]


class ShardedLive(LiveSummary):
    """Folds the tapes of all shards as far as they go; any thread may ask.

    Args:
        run_dir: of the syncer.
        num_shards: S.
    """

    def __init__(self, run_dir: Path, num_shards: int) -> None:
        super().__init__(run_dir)
        self._sharded = ShardedFold(num_shards)
        self._fold = self._sharded
        self._num_shards = num_shards
        self._tails = [TapeTail(shard_dir(run_dir, shard) / TAPE_NAME) for shard in range(num_shards)]

    @property
    def has_run_record(self) -> bool:
        """Never: each shard's last word is about itself."""
        return False

    def _feed(self, give_up: Callable[[], bool]) -> None:
        for shard, tail in enumerate(self._tails):
            is_done = False
            while not is_done:
                for line in tail.read_new(PORTION_BYTES):
                    self._sharded.feed_shard(shard, line)
                    self._feed_present(shard, line)
                is_done = not tail.has_more or give_up()

    def _feed_present(self, shard: int, line: TapeLine) -> None:
        """Who is there and how quick is the lead's to say; work and bytes are everybody's."""
        if isinstance(line.record, JobRecord) and self._sharded.job is not None:
            record = msgspec.structs.replace(line.record, fragments=self._sharded.job.fragments)
            line = TapeLine(seq=line.seq, t_s=line.t_s, record=record)
        elif shard and not isinstance(line.record, ContributionRecord | MergeRecord | PublishRecord):
            return
        self._present.feed(renumbered(line, shard, self._num_shards))
