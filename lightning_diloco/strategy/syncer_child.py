"""The syncer of one fit, over its lives: started, started again where a signal ended it, asked to finish.

A syncer that a signal has ended (killed, out of memory) goes on with the job from its run directory (`--resume`), at the same addresses;
learners notice nothing but silence. One that hangs (`strategy.hang_watch`), or that started again and does not begin to serve, is killed,
and goes on in the same way. One that cannot write down its start, because the disk is full or can only be read, serves nothing
and ends; it is tried again, after pauses that grow, until the disk takes it, and that counts as no restart. One that ends with an error of
its own would end so again: the job is over. What the syncer was told of dead learners is told again to the next one, which knows only
what reached the tape.

Time in which this process itself stood still is no patience with the syncer (`strategy.awake_clock`).
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning_diloco.errors import SyncerUnavailableError
from lightning_diloco.runtime.children import Child, ExitStatus, start_child
from lightning_diloco.runtime.disk import DISK_FAILED
from lightning_diloco.runtime.life_signs import read_signs
from lightning_diloco.strategy.awake_clock import AwakeClock
from lightning_diloco.strategy.hang_watch import HangWatch

__all__ = ["SyncerChild"]

_log = logging.getLogger(__name__)

_START_S = 60.0
"""A syncer that has not answered by then never will: importing torch takes seconds, on a loaded machine tens of them."""
_READ_S = 600.0
"""So much more for one that starts again, which reads a snapshot first."""
_END_S = 300.0
"""The syncer writes the global model, a last snapshot and its last record in this time, or it is killed."""
_HANG_S = 300.0
"""A hung syncer is killed after `hang_timeout_s`, and by then. It runs no code of the user's that may wait half an hour by right: a turn
of its loop takes milliseconds, and nothing holds that up for minutes but a disk that does not answer."""
_GONE_S = 10.0
"""What is killed is gone after milliseconds, unless it is inside a call to a disk that does not answer."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0
"""Between two tries on a disk that takes nothing."""
_TICK_S = 0.05


class SyncerChild:
    """The syncer's process.

    Args:
        run_dir: of the job.
        hello: what its first line of standard input holds.
        environment: of its process.
        max_restarts: how often it may be started again.
        signs_dir: a folder for its signs of life (None: nobody looks whether it hangs).
        hang_timeout_s: see `strategy.options` (None: the same).
    """

    def __init__(
        self,
        run_dir: Path,
        hello: dict[str, Any],
        environment: dict[str, str],
        max_restarts: int,
        signs_dir: Path | None = None,
        hang_timeout_s: float | None = None,
    ) -> None:
        self.ready_path = run_dir / "syncer.json"
        """Where it says its address; learners wait for this file."""
        self.restarts = 0
        self.child: Child | None = None
        self._run_dir, self._hello, self._environment, self._max_restarts = run_dir, hello, environment, max_restarts
        self._signs_dir = None if hang_timeout_s is None else signs_dir
        self._hang_s = min(hang_timeout_s or _HANG_S, _HANG_S)
        self._spare_dir = Path(hello["spare_dir"]) if "spare_dir" in hello else None
        self._num_starts = 0
        self._watch: HangWatch | None = None
        """Of the present process, once it serves."""
        self._clock = AwakeClock()
        self._lost: list[dict[str, Any]] = []
        self._is_ready = self._has_served = False
        self._deadline_s = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._start_at_s: float | None = None
        """When it is tried again on a disk that has taken nothing."""

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self.child is not None and self.child.poll() is None

    def start(self) -> None:
        """Start the first one; learners start beside it and look for its address when they need it."""
        self.ready_path.unlink(missing_ok=True)
        self._start("tcp://127.0.0.1:0", {})

    def _start(self, bind: str, more: dict[str, str]) -> None:
        # Killed before it had written anything down, it begins anew.
        option = "--resume" if (self._run_dir / "snapshots" / "identity.json").exists() else "--run-dir"
        arguments = ["syncer", "--bind", bind, option, str(self._run_dir), "--supervised"]
        log = self._run_dir / "logs" / "syncer.log"
        self.child = start_child("lightning_diloco", arguments, log=log, environment=self._environment)
        self._num_starts, self._watch = self._num_starts + 1, None
        if self._signs_dir is not None:
            more = more | {"signs_path": str(self._signs_path(self._signs_dir))}
        self.child.send_line(self._hello | more)
        for command in self._lost:
            self.child.send_line(command)
        self._is_ready, self._deadline_s = False, self._clock.now_s() + _START_S + (_READ_S if option == "--resume" else 0.0)

    def look_after(self) -> None:
        """Start it again if a signal has ended it, or its disk has; end it if it hangs.

        Raises:
            SyncerUnavailableError: it ended otherwise, or too often, or does not begin to serve at its first start.
        """
        now_s = self._clock.now_s()
        if self._start_at_s is not None:
            if now_s >= self._start_at_s:
                self._resume()
            return
        if self.child is None:
            return
        status = self.child.poll()
        if status is not None:
            self._start_again(status)
        elif not self._is_ready:
            self._look_for_ready(self.child.pid, now_s)
        elif self._watch is not None and self._watch.is_hung(now_s):
            self._kill(
                f"hangs: its loop has not turned, and has used less than 1 % of a core, for {self._hang_s:g} s "
                f"(hang_timeout_s, at most {_HANG_S:g} s)"
            )

    def _look_for_ready(self, pid: int, now_s: float) -> None:
        self._is_ready = self._said().get("pid") == pid
        if self._is_ready:
            self._has_served, self._pause_s = True, _FIRST_PAUSE_S
            if self._signs_dir is not None and self._gives_signs(path := self._signs_path(self._signs_dir)):
                self._watch = HangWatch(pid, path, self._hang_s, now_s, self._spare_dir)
        elif now_s > self._deadline_s and self._has_served:
            self._kill("was started again and did not begin to serve in time")
        elif now_s > self._deadline_s:
            raise SyncerUnavailableError(f"The syncer process was not ready in time; see {self._log_path}.")

    def _signs_path(self, folder: Path) -> Path:
        return folder / f"signs_syncer_{self._num_starts}.bin"

    def _gives_signs(self, path: Path) -> bool:
        """Whether it could make the file, here or there: of silence from one that could not, nothing follows."""
        return bool(read_signs(path)) or (self._spare_dir is not None and bool(read_signs(self._spare_dir / path.name)))

    def _kill(self, why: str) -> None:
        """Have a signal end it, once."""
        assert self.child is not None
        _log.warning("the syncer %s: it is killed. %s may say why.", why, self._log_path)
        self._watch, self._deadline_s = None, math.inf
        self.child.signal_group(signal.SIGKILL)

    def _start_again(self, status: ExitStatus) -> None:
        if self._waits_for_disk(status):
            _log.error(
                "the syncer could not start again: its disk takes nothing (%s is on a disk that is full, or can only be read). It is tried "
                "again in %.1f s, until it starts; free the disk. Learners train on meanwhile, without merges.",
                self._run_dir,
                self._pause_s,
            )
            self._start_at_s = self._clock.now_s() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            return
        if status.signal_name is None or self.restarts >= self._max_restarts:
            often = f" after {self.restarts} restarts (max_restarts={self._max_restarts})" if status.signal_name else ""
            if status.code == DISK_FAILED:
                raise SyncerUnavailableError(
                    f"The syncer could not start: the disk of {self._run_dir} takes nothing. Free it, or give another one."
                )
            raise SyncerUnavailableError(
                f"The syncer process ended with {status}{often}, and with it the job; {self._log_path} may say why. "
                f"lightning-diloco syncer --resume {self._run_dir} goes on with it by hand, and so does fit(ckpt_path=...) in a new job."
            )
        self.restarts += 1
        _log.warning(
            "the syncer was ended by %s; restart %d of at most %d, from %s/snapshots. Learners go on meanwhile.",
            status.signal_name,
            self.restarts,
            self._max_restarts,
            self._run_dir,
        )
        self._resume()

    def _waits_for_disk(self, status: ExitStatus) -> bool:
        return self._has_served and status.code == DISK_FAILED

    def _resume(self) -> None:
        self._start_at_s = None
        said = self._said()
        self._start(said.get("endpoint", "tcp://127.0.0.1:0"), {"bulk": said["bulk"]} if "bulk" in said else {})

    def tell_lost(self, learner_id: int, life: int) -> None:
        """This learner's process is gone."""
        self._lost.append({"command": "lost", "learner_id": learner_id, "life": life})
        if self.child is not None:
            self.child.send_line(self._lost[-1])

    def finish(self, status: Literal["finished", "stopped", "failed"], is_cut_short: Callable[[], bool]) -> None:
        """Ask it to end the job, and wait for it.

        One that is killed meanwhile is started once more to do it, and a disk is waited for. One that does not end in time is killed here;
        the second that does not is given up.

        Args:
            status: how the job ends.
            is_cut_short: asked while waiting: whether to wait no longer.

        Raises:
            SyncerUnavailableError: a job that should be finished is not.
        """
        if self.child is None:
            return
        deadline_s = self._clock.now_s() + _END_S
        ended = self._finish(status, is_cut_short)
        is_patience_over = False
        while status == "finished" and not is_cut_short():
            if ended is None and not is_patience_over:
                is_patience_over = True
                self._kill(
                    f"was told to end the job and has not for {_END_S:g} s, so that another one is to do it from the newest snapshot"
                )
                ended = self._await_end(_GONE_S, is_cut_short)
            if ended is None or not self._can_start(ended, deadline_s):
                break
            if self._start_at_s is None:
                self._start_again(ended)
            while self._start_at_s is not None and not is_cut_short():
                time.sleep(_TICK_S)
                self.look_after()
            ended = self._finish(status, is_cut_short)
        if status == "finished" and (ended is None or ended.code != 0):
            problem = "did not end" if ended is None else f"ended with {ended}"
            raise SyncerUnavailableError(
                f"The syncer process {problem} after the learners had left; the global model may be incomplete, and {self._log_path} may "
                f"say why. lightning-diloco export {self._run_dir} OUT.ckpt has the model of the newest snapshot; lightning-diloco syncer "
                f"--resume {self._run_dir} goes on with the job by hand, and so does fit(ckpt_path=...) in a new job."
            )

    def _can_start(self, ended: ExitStatus, deadline_s: float) -> bool:
        if self._waits_for_disk(ended):
            return self._clock.now_s() < deadline_s
        return ended.signal_name is not None and self.restarts < self._max_restarts

    def _finish(self, status: str, is_cut_short: Callable[[], bool]) -> ExitStatus | None:
        assert self.child is not None
        self.child.send_line({"command": "finish", "status": status})
        return self._await_end(_END_S, is_cut_short)

    def _await_end(self, patience_s: float, is_cut_short: Callable[[], bool]) -> ExitStatus | None:
        assert self.child is not None
        deadline_s = self._clock.now_s() + patience_s
        while (ended := self.child.poll()) is None and self._clock.now_s() < deadline_s and not is_cut_short():
            time.sleep(_TICK_S)
        return ended

    @property
    def _log_path(self) -> Path:
        return self._run_dir / "logs" / "syncer.log"

    def _said(self) -> dict[str, Any]:
        try:
            said = json.loads(self.ready_path.read_text())
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}
