"""The supervisor of one fit: starts syncer and learners, restarts what a signal has ended, and leaves no process behind.

The rules:

* a learner that returns is done; the job is over when all are done;
* a learner that a signal has ended (killed, a spot instance's SIGTERM), or an error that says that memory has run out (`strategy.deaths`),
  is started again after a growing pause, at most `max_restarts` times; the syncer lets it take over its id, and it goes on from the
  global model;
* a learner that hangs for `hang_timeout_s` (`strategy.hang_watch`) is killed and started again in the same way;
* another exception in a learner ends the job: restarting would raise it again. The others are asked to leave, and the exception is raised
  here;
* Ctrl-C and SIGTERM of this process end the job as well: learners leave in order, the run's files say `stopped`;
* a syncer that a signal has ended is started again as often, and goes on with the job (`syncer_child`); one that hangs is killed first;
  one whose disk takes nothing is tried again until it does; another end of it ends the job.

However the loop ends, every child is asked, then killed with its process group. If this process itself is killed, the children see
their life lines close (`lightning_diloco.strategy.life_line`).
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_diloco.errors import LearnerFailedError
from lightning_diloco.runtime.children import Child, ExitStatus, child_environment, start_child
from lightning_diloco.strategy.deaths import death_of
from lightning_diloco.strategy.exchange import is_there, spare_file
from lightning_diloco.strategy.hang_watch import HangWatch
from lightning_diloco.strategy.results import LearnerResult, as_exception, read_result
from lightning_diloco.strategy.sigterm import tell_user
from lightning_diloco.strategy.syncer_child import SyncerChild

__all__ = ["JobPlan", "Supervisor"]

_log = logging.getLogger(__name__)

_TICK_S = 0.05
_LEAVE_S = 10.0
"""Learners that were asked to end have so long for their final contributions; then they are killed."""
_LEAVE_ALONE_S = 2.0
"""The same when the syncer is gone: there is nobody to take contributions, only files to close."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What a supervisor starts."""

    num_learners: int
    run_dir: Path
    launch_dir: Path
    payload_path: Path
    max_restarts: int
    hang_timeout_s: float | None
    """None: nobody looks whether a learner or the syncer hangs."""
    on_tick: Callable[[dict[str, int]], None]
    """Called in every turn of the loop with the restarts so far."""
    spare_dir: Path | None = None
    """A folder on another disk, for what `run_dir` does not take at the end."""


@dataclass
class _Learner:
    """One learner id over its lives."""

    learner_id: int
    life: int = 0
    child: Child | None = None
    result: LearnerResult | None = None
    start_at_s: float | None = None
    """When the next life is due; None while one runs or none is wanted."""
    is_done: bool = False
    watch: HangWatch | None = None
    is_hung: bool = False
    """Whether this life was ended because it hung."""


@dataclass
class _Signals:
    """Signals that this process received while the loop ran."""

    received: list[int] = field(default_factory=list)
    previous: dict[int, Any] = field(default_factory=dict)


class Supervisor:
    """Runs the processes of one job to its end.

    Args:
        plan: what to start, and where.
    """

    def __init__(self, plan: JobPlan) -> None:
        self._plan = plan
        self._token = secrets.token_hex(32)
        self._takeover_token = secrets.token_hex(32)
        self._environment = child_environment(plan.num_learners)
        self._learners = [_Learner(i) for i in range(plan.num_learners)]
        hello = {"token": self._token, "takeover_token": self._takeover_token, "num_slots": plan.num_learners}
        if plan.spare_dir is not None:
            hello["spare_dir"] = str(plan.spare_dir)
        self._syncer = SyncerChild(plan.run_dir, hello, self._environment, plan.max_restarts, plan.launch_dir, plan.hang_timeout_s)
        self._signals = _Signals()
        self.restarts = {"learners": 0, "syncer": 0}
        """How often a process was started again."""
        self.status: Literal["finished", "stopped", "failed"] = "failed"
        """How the job ended."""

    def run(self) -> LearnerResult:
        """Run the job.

        Returns:
            Learner 0's result.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            SIGTERMException: this process received SIGTERM.
            LearnerFailedError: a learner ended without a word, or too often.
            SyncerUnavailableError: the syncer ended.
            BaseException: a learner's own exception.
        """
        self._catch_signals()
        try:
            self._syncer.start()
            for learner in self._learners:
                self._start(learner)
            while not all(learner.is_done for learner in self._learners):
                self._turn()
            self._end_syncer("finished")
            self._await_exits()
            self.status = "finished"
        except (KeyboardInterrupt, SIGTERMException):
            self.status = "stopped"
            raise
        finally:
            try:
                if self.status != "finished":
                    self._stop_learners()
                    self._end_syncer(self.status)
            finally:
                self._kill_all()
                self._release_signals()
        result = self._learners[0].result
        if result is None:
            raise LearnerFailedError("Learner 0 ended without bringing a result back (was os._exit called?).")
        return result

    def forward(self, signum: int) -> None:
        """Send a signal to every learner that runs."""
        for learner in self._learners:
            if learner.child is not None and learner.child.poll() is None:
                learner.child.signal_group(signum)

    # -- one turn of the loop ------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._obey_signals()
        for learner in self._learners:
            self._look_after(learner)
        self._syncer.look_after()
        self.restarts["syncer"] = self._syncer.restarts
        self._plan.on_tick(self.restarts)
        time.sleep(_TICK_S)

    def _look_after(self, learner: _Learner) -> None:
        if learner.start_at_s is not None:
            if time.monotonic() >= learner.start_at_s:
                learner.start_at_s = None
                self._start(learner)
            return
        if learner.is_done or learner.child is None:
            return
        status = learner.child.poll()
        path = self._result_path(learner)
        if not is_there(path):
            path = spare_file(self._plan.spare_dir, path.name) or path
        if status is None:
            self._end_if_hung(learner)
            if not is_there(path):
                return
        result = learner.result = read_result(path)
        if result is not None and result.outcome == "done":
            # Its interpreter may take a second more to end; the syncer need not wait for that.
            learner.is_done = True
        elif status is None:
            return
        elif result is None and status.code == 0:
            learner.is_done = True
            self._tell_lost(learner)
        else:
            self._tell_lost(learner)
            self._restart_or_raise(learner, result, status)

    def _end_if_hung(self, learner: _Learner) -> None:
        if learner.child is None or learner.watch is None or not learner.watch.is_hung(time.monotonic()):
            return
        _log.warning(
            "learner %d has given no sign of life and used less than 1 %% of a core for %g s (hang_timeout_s): it is killed",
            learner.learner_id,
            learner.watch.timeout_s,
        )
        learner.watch, learner.is_hung = None, True
        learner.child.signal_group(signal.SIGKILL)

    def _restart_or_raise(self, learner: _Learner, result: LearnerResult | None, status: ExitStatus) -> None:
        said = None if result is None or result.outcome not in ("failed", "memory") else as_exception(learner.learner_id, result)
        death = death_of(result, status, self._plan.hang_timeout_s if learner.is_hung else None)
        if death is None:
            raise said or LearnerFailedError(
                f"Learner {learner.learner_id} ended with {status} and without an exception.{self._log_hint(learner)}"
            )
        if learner.life >= self._plan.max_restarts:
            raise LearnerFailedError(
                f"Learner {learner.learner_id} was ended by {death.by}, after {learner.life} restarts "
                f"(max_restarts={self._plan.max_restarts}).{self._log_hint(learner)} {death.remedy}"
            ) from said
        pause_s = min(_FIRST_PAUSE_S * 2**learner.life, _LONGEST_PAUSE_S)
        learner.life += 1
        learner.start_at_s = time.monotonic() + pause_s
        self.restarts["learners"] += 1
        _log.warning(
            "learner %d was ended by %s; restart %d of at most %d in %.1f s",
            learner.learner_id,
            death.by,
            learner.life,
            self._plan.max_restarts,
            pause_s,
        )

    # -- starting ------------------------------------------------------------------------------------------------------------------

    def _start(self, learner: _Learner) -> None:
        plan = self._plan
        log = None if learner.learner_id == 0 else plan.run_dir / "logs" / f"learner_{learner.learner_id}.log"
        learner.result = None
        learner.child = start_child("lightning_diloco.strategy.worker", [], log=log, environment=self._environment)
        signs_path = plan.launch_dir / f"signs_{learner.learner_id}_{learner.life}.bin"
        learner.is_hung = False
        if plan.hang_timeout_s is not None:
            learner.watch = HangWatch(learner.child.pid, signs_path, plan.hang_timeout_s, time.monotonic(), plan.spare_dir)
        learner.child.send_line(
            {
                "learner_id": learner.learner_id,
                "num_learners": plan.num_learners,
                "life": learner.life,
                "syncer_path": str(self._syncer.ready_path),
                "token": self._token,
                "takeover_token": self._takeover_token,
                "run_dir": str(plan.run_dir),
                "launch_dir": str(plan.launch_dir),
                "payload_path": str(plan.payload_path),
                "result_path": str(self._result_path(learner)),
                "signs_path": str(signs_path),
                "spare_dir": None if plan.spare_dir is None else str(plan.spare_dir),
                "sys_path": sys.path,
                "argv": sys.argv,
                "environment": {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")},
            }
        )

    def _result_path(self, learner: _Learner) -> Path:
        return self._plan.launch_dir / f"result_{learner.learner_id}_{learner.life}.pkl"

    def _log_hint(self, learner: _Learner) -> str:
        return "" if learner.learner_id == 0 else f" See {self._plan.run_dir}/logs/learner_{learner.learner_id}.log."

    # -- ending --------------------------------------------------------------------------------------------------------------------

    def _tell_lost(self, learner: _Learner) -> None:
        self._syncer.tell_lost(learner.learner_id, learner.life)

    def _end_syncer(self, status: Literal["finished", "stopped", "failed"]) -> None:
        heard = len(self._signals.received)
        self._syncer.finish(status, lambda: len(self._signals.received) != heard)
        self.restarts["syncer"] = self._syncer.restarts

    def _stop_learners(self) -> None:
        """Ask all learners to leave, and wait for them; a second signal to this process cuts the wait short."""
        running = [learner for learner in self._learners if learner.child is not None and learner.child.poll() is None]
        for learner in running:
            assert learner.child is not None
            learner.child.terminate()
        patience_s = _LEAVE_S if self._syncer.is_running else _LEAVE_ALONE_S
        deadline_s = time.monotonic() + patience_s
        heard = len(self._signals.received)
        while running and time.monotonic() < deadline_s and len(self._signals.received) == heard:
            running = [learner for learner in running if learner.child is not None and learner.child.poll() is None]
            time.sleep(_TICK_S)
        for learner in running:
            assert learner.child is not None
            _log.warning("learner %d did not leave within %g s and is killed", learner.learner_id, patience_s)
            _kill(learner.child)
            self._tell_lost(learner)

    def _await_exits(self) -> None:
        """Let learners whose fit has returned end in their own time, within reason: they flush logs, and exit handlers run."""
        deadline_s = time.monotonic() + _LEAVE_S
        children = [learner.child for learner in self._learners if learner.child is not None]
        while any(child.poll() is None for child in children) and time.monotonic() < deadline_s:
            self._obey_signals()
            time.sleep(_TICK_S)

    def _kill_all(self) -> None:
        for child in (*(learner.child for learner in self._learners), self._syncer.child):
            if child is not None and child.poll() is None:
                _kill(child)

    # -- signals of this process ---------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        """Note Ctrl-C and SIGTERM instead of being torn out of the loop; only the main thread may, and only there they arrive."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._signals.previous[signum] = signal.signal(signum, self._on_signal)

    def _release_signals(self) -> None:
        for signum, handler in self._signals.previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._signals.previous.clear()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signals.received.append(signum)
        if signum == signal.SIGTERM:
            # As Lightning does it; of SIGINT there is Python's own, which raises and nothing else.
            tell_user(self._signals.previous.get(signum), signum, frame)

    def _obey_signals(self) -> None:
        if self._signals.received:
            signum = self._signals.received[0]
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            raise SIGTERMException(128 + signum)


def _kill(child: Child) -> None:
    child.signal_group(signal.SIGKILL)
    while child.poll() is None:
        time.sleep(0.01)
