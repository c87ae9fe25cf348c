"""A syncer of several shards: one process for each, and this one, which merges nothing and looks after them.

    this process          starts the shards, starts again what was killed, keeps `summary.json` of the whole, puts the model together
      shard 0 (the lead)  decides who takes part; tells learners where the others are
      shard 1 ... S - 1   merge their fragments

The shards do not speak to one another. So a shard that dies takes nobody with it: its learners go on, the fragments of the others are
merged, and the next process of it goes on from its snapshots. That holds for the lead too; without it nobody can join for a while. If
this process is killed the shards see their life lines close and end as if they had been killed, all of them: `--resume RUN_DIR` starts
them again.

The job is over at a shard when its learners have left it. They leave all shards at once, so what another one still waits for after that is
a learner that has died in between: it is told to end.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import Any, Literal

from lightning_diloco.errors import DiLoCoError
from lightning_diloco.protocol.members import GIVEN_UP_S
from lightning_diloco.protocol.records import JoinRecord
from lightning_diloco.runtime.disk import disk_errors
from lightning_diloco.runtime.shard_process import ShardProcess
from lightning_diloco.runtime.sharded_live import ShardedLive
from lightning_diloco.runtime.shards import endpoints_of, shard_dir, write_num_shards
from lightning_diloco.runtime.summary import SummaryKeeper
from lightning_diloco.runtime.tape import TAPE_NAME, TapeTail

__all__ = ["ShardedSyncer"]

_log = logging.getLogger(__name__)

_TICK_S = 0.05
_MARGIN_S = 5.0
_STOP_S = 300.0
"""A shard writes its model and a last snapshot in this time, or it is killed."""


class ShardedSyncer:
    """The shards of one job.

    Args:
        run_dir: of the job; locked by the caller.
        num_shards: S.
        bind: the address that the syncer was given.
        arguments: of every shard's command, beside folder and address.
        started_s: monotonic time at which this process started: `startup_s` counts from here to the first join.
    """

    def __init__(self, run_dir: Path, num_shards: int, bind: str, arguments: list[str], started_s: float) -> None:
        self.live = ShardedLive(run_dir, num_shards)
        self.has_ended = False
        """Whether the job is over, and written down."""
        self._run_dir = run_dir
        self._keeper = SummaryKeeper(run_dir, live=self.live)
        self._stop = threading.Event()
        self._started_s = started_s
        self._startup_s: float | None = None
        lead = TapeTail(shard_dir(run_dir, 0) / TAPE_NAME)
        self._tail = None if lead.path.exists() else lead
        """Until the first join was seen; None also where it was before this process."""
        self._drain_s: float | None = None
        """How long the job's learners wait at their end, by its configuration; None until a tape has told."""
        self._shards = []
        for shard in range(num_shards):
            control, bulk = endpoints_of(bind, shard, num_shards)
            hello: dict[str, Any] = {"shard": shard, "num_shards": num_shards, "bulk": bulk, "endpoints": []}
            self._shards.append(ShardProcess(shard, shard_dir(run_dir, shard), arguments, control, hello))

    def start(self) -> tuple[str, str]:
        """Start all shards; returns where the lead listens: control, payloads.

        Raises:
            SyncerUnavailableError: one of them does not begin to serve.
            DiskError: the disk failed.
            OSError: the system has no process to give.
        """
        with disk_errors(self._run_dir):
            write_num_shards(self._run_dir, len(self._shards))
        try:
            for shard in self._shards[1:]:
                shard.start()
            for shard in self._shards[1:]:
                shard.await_ready()
            self._shards[0].tell_endpoints([shard.endpoints[0] for shard in self._shards[1:]])
            self._shards[0].start()
            self._shards[0].await_ready()
        except BaseException:
            self._kill_all()
            raise
        return self._shards[0].endpoints

    @property
    def ports(self) -> tuple[tuple[str, str], ...]:
        """Where each shard listens: control, payloads."""
        return tuple(shard.endpoints for shard in self._shards)

    def stop(self) -> None:
        """End the job; from any thread."""
        self._stop.set()

    def run(self) -> Literal["finished", "stopped", "failed"]:
        """Look after the shards until the job is over at all of them, then put together what they leave.

        Returns:
            How the run ended.
        """
        over_s: float | None = None
        kill_s: float | None = None
        try:
            while not all(shard.is_done for shard in self._shards):
                self._turn()
                now_s = time.monotonic()
                if over_s is None and any(shard.is_done for shard in self._shards):
                    over_s = now_s
                word = self._word(now_s, over_s)
                if word is not None:
                    kill_s = now_s + _STOP_S if kill_s is None else kill_s
                    for shard in self._shards:
                        shard.finish(word)
                if kill_s is not None and now_s > kill_s:
                    _log.error("A shard did not end within %g s, and is killed.", _STOP_S)
                    self._shards[0].has_failed = True
                    break
                time.sleep(_TICK_S)
        finally:
            self._kill_all()
        return self._end()

    def _turn(self) -> None:
        for shard in self._shards:
            shard.look_after()
        self._look_for_join()
        self._keeper.known = self._known
        self._keeper.tick(time.monotonic())

    def _look_for_join(self) -> None:
        if self._tail is None:
            return
        # A tape that cannot be read is the keeper's to complain of.
        with contextlib.suppress(OSError, DiLoCoError):
            if any(isinstance(line.record, JoinRecord) for line in self._tail.read_new()):
                self._startup_s, self._tail = time.monotonic() - self._started_s, None

    @property
    def _known(self) -> dict[str, Any]:
        return {"restarts": self._restarts} | ({} if self._startup_s is None else {"startup_s": self._startup_s})

    def _word(self, now_s: float, over_s: float | None) -> Literal["finished", "stopped", "failed"] | None:
        """What those that still run are to be told: None while there is nothing to be said."""
        if self._stop.is_set():
            return "stopped"
        if any(shard.has_failed for shard in self._shards):
            return "failed"
        if over_s is None:
            return None
        # Whoever has left one shard leaves the others within the same drain. Without the lead's word somebody may come back.
        patience_s = self._look_for_drain() + _MARGIN_S + (0.0 if self._shards[0].is_done else GIVEN_UP_S)
        return "finished" if now_s > over_s + patience_s else None

    def _look_for_drain(self) -> float:
        if self._drain_s is None:
            # What the tapes tell is folded every few seconds only. One that cannot be read is the keeper's to complain of.
            with contextlib.suppress(OSError, DiLoCoError):
                self.live.feed()
            self._drain_s = self.live.result("running", is_strict=False)["config"].get("drain_timeout_s")
        return self._drain_s or 0.0

    @property
    def _restarts(self) -> dict[str, int]:
        return {"learners": 0, "syncer": sum(shard.restarts for shard in self._shards)}

    def _end(self) -> Literal["finished", "stopped", "failed"]:
        # Imported late: nothing of torch is needed before.
        from lightning_diloco.runtime.sharded_model import put_together

        has_failed = any(shard.has_failed for shard in self._shards)
        status: Literal["finished", "stopped", "failed"] = "failed" if has_failed else "stopped" if self._stop.is_set() else "finished"
        sha256 = None
        try:
            sha256 = put_together(self._run_dir)
        except Exception as error:
            _log.error("The global model could not be put together in %s: %s. The run has failed.", self._run_dir, error)
            status = "failed"
        self._keeper.known = self._known | {"status": status, "global_sha256": sha256}
        self._keeper.finish()
        self.has_ended = True
        return status

    def _kill_all(self) -> None:
        for shard in self._shards:
            shard.kill()
