"""The process of one shard, over its lives: started, watched, and started again where a signal has ended it.

A shard that was killed goes on from its own snapshots and tape (`--resume`) at the same ports, where its learners redial. If somebody has
taken a port meanwhile, the disk takes nothing, or the system has no process to give, it is tried again until that is over. A shard that
ends with another error would end so again: then the job is over. Its standard input is its life line: when that closes it ends itself.
Signals that ask it to end it does not heed, for only whoever looks after all of them can end a job.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Literal

from lightning_diloco.errors import SyncerUnavailableError
from lightning_diloco.runtime.children import Child, child_environment, start_child
from lightning_diloco.runtime.disk import DISK_FAILED

__all__ = ["CANNOT_LISTEN", "ShardProcess"]

_log = logging.getLogger(__name__)

CANNOT_LISTEN = 75
"""Exit code of a shard whose address is taken (`EX_TEMPFAIL` of sysexits.h: it may be otherwise in a while)."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
"""Between the end of a shard and its next start; doubled each time, until one has served for `QUIET_S`."""
QUIET_S = 60.0
READY_S = 660.0
"""A shard that has not answered by then never will: torch is imported, and a snapshot read."""


class ShardProcess:
    """One shard.

    Args:
        shard: its number.
        run_dir: its folder.
        arguments: of the command, beside folder and address.
        bind: where it is to listen.
        hello: what its first line of standard input holds.
    """

    def __init__(self, shard: int, run_dir: Path, arguments: list[str], bind: str, hello: dict[str, Any]) -> None:
        self.shard, self.restarts = shard, 0
        self.is_done = False
        """Whether the job is over at this shard."""
        self.has_failed = False
        self._run_dir, self._arguments, self._bind, self._hello = run_dir, arguments, bind, hello
        self._child: Child | None = None
        self._was_ready = False
        self._is_shut_out = False
        """Whether its ports were taken when it was started last."""
        self._started_s = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._start_at_s: float | None = None
        self._finish: dict[str, Any] | None = None

    def start(self) -> None:
        """Start a process for it; what there is of the job in its folder goes on.

        Raises:
            OSError: the disk failed, or the system has no process to give.
        """
        self._run_dir.mkdir(parents=True, exist_ok=True)
        (self._run_dir / "syncer.json").unlink(missing_ok=True)
        is_old = (self._run_dir / "snapshots" / "identity.json").exists()
        if self._was_ready and not is_old:
            _log.error("%s: this shard's part of the job is lost. The job ends.", self._run_dir)
            self.is_done = self.has_failed = True
            return
        folder = ["--resume" if is_old else "--run-dir", str(self._run_dir)]
        bind, hello = self._bind, self._hello
        if self._is_shut_out and self._finish is not None:
            # Nobody is to dial it any more: any port will do for writing its model.
            bind, hello = f"{bind.rpartition(':')[0]}:0", {**hello, "bulk": ""}
        arguments = ["syncer", "--as-shard", "--bind", bind, *folder, *self._arguments]
        self._child = start_child("lightning_diloco", arguments, log=None, environment=_environment())
        self._child.send_line(hello)
        if self._finish is not None:
            self._child.send_line(self._finish)
        self._started_s, self._start_at_s = time.monotonic(), None

    def await_ready(self) -> None:
        """Wait until it serves, and remember where.

        Raises:
            SyncerUnavailableError: it has ended, or does not begin to serve.
        """
        while not self.look_for_ready():
            self.look_after()
            if self.is_done or time.monotonic() > self._started_s + READY_S:
                raise SyncerUnavailableError(f"Shard {self.shard} did not begin to serve; what it has printed says why.")
            time.sleep(0.02)

    def look_for_ready(self) -> bool:
        """Whether the present process serves."""
        try:
            said = json.loads((self._run_dir / "syncer.json").read_text())
        except (OSError, ValueError):
            return False
        if self._child is None or said["pid"] != self._child.pid:
            return False
        self._bind, self._hello["bulk"], self._was_ready = said["endpoint"], said["bulk"], True
        return True

    def tell_endpoints(self, endpoints: list[str]) -> None:
        """What every process of this shard tells learners of all shards, from its next start on."""
        self._hello["endpoints"] = endpoints

    @property
    def endpoints(self) -> tuple[str, str]:
        """Where it listens: control, payloads; after `await_ready`."""
        return self._bind, self._hello["bulk"]

    @property
    def pid(self) -> int | None:
        """Of the present process."""
        return None if self._child is None else self._child.pid

    def look_after(self) -> None:
        """Start it again, after a pause, if a signal has ended it, its ports were taken, or its disk took nothing."""
        if self.is_done:
            return
        if self._start_at_s is not None:
            if time.monotonic() >= self._start_at_s:
                self._start_again()
            return
        status = None if self._child is None else self._child.poll()
        if status is None:
            return
        self._is_shut_out = self._was_ready and status.code == CANNOT_LISTEN
        if self._was_ready and status.code == DISK_FAILED:
            self.restarts -= 1
            self._wait("could not start, because its disk takes nothing,")
        elif self._is_shut_out:
            self.restarts -= 1  # it was none
            self._wait(f"cannot listen at {self._bind}")
        elif status.signal_name is not None:
            self._wait(f"was ended by {status.signal_name}")
        else:
            self.is_done, self.has_failed = True, status.code != 0

    def _start_again(self) -> None:
        try:
            self.start()
        except OSError as error:
            self._wait(f"could not be started ({error})")
        else:
            self.restarts += not self.is_done

    def _wait(self, why: str) -> None:
        """Start it again after a pause, which grows."""
        now_s = time.monotonic()
        if now_s - self._started_s > QUIET_S:
            self._pause_s = FIRST_PAUSE_S
        text = "Shard %d %s and is started again in %g s. Its fragments stay as they are until then; the others go on."
        _log.warning(text, self.shard, why, self._pause_s)
        self._start_at_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def finish(self, status: Literal["finished", "stopped", "failed"]) -> None:
        """Nobody will come back: close what is held, and end."""
        if self._finish is None and not self.is_done:
            self._finish = {"command": "finish", "status": status}
            if self._child is not None:
                self._child.send_line(self._finish)

    def kill(self) -> None:
        """End its process, if there is one."""
        self.is_done = True
        if self._child is not None:
            self._child.signal_group(9)
            while self._child.poll() is None:
                time.sleep(0.01)


def _environment() -> dict[str, str]:
    """As a syncer by hand has it: one thread for tensors, unless the user says otherwise."""
    return {**child_environment(1), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
