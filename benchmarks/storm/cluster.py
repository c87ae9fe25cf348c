"""Processes of a storm: one syncer, and learners that come, go and are started again.

The syncer is started, watched and started again by `SyncerChild`, the code of `Trainer(devices=N)`, with open membership: any learner that
has the job's token may join. The cluster is the supervisor of both. It tells the syncer at once which process is gone, and starts a learner
that ended without being asked to again, with the same id, after `RESTART_S`.

Why not `Trainer(devices=4)` itself: it has a fixed number of learners, so nobody could join late. Why not a syncer by hand: there a
learner that was killed stays a member until it was silent for 10 s, and a new process with its id is refused until then. That is another
promise, and `goodput_alive` would mostly measure those 10 s.
"""

from __future__ import annotations

import json
import logging
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.storm.proxy import Link, Proxies
from benchmarks.storm.steps import read_steps
from benchmarks.storm.tape import TapeWatch
from lightning_diloco.protocol.records import RunRecord
from lightning_diloco.runtime.children import Child, ExitStatus, child_environment, start_child
from lightning_diloco.runtime.summary import SummaryKeeper
from lightning_diloco.runtime.tape import TAPE_NAME, append_run_record
from lightning_diloco.strategy.syncer_child import SyncerChild

__all__ = ["Cluster", "Job", "Learner"]

_log = logging.getLogger(__name__)

RESTART_S = 0.5
TICK_S = 0.02
START_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is run.

    Args:
        folder: of everything that is written; must not exist.
        seed: of model, data, links.
        step_s: shortest length of an inner step.
        fall_steps: over which the learning rate falls to a tenth (0: it stays).
        sync: fields of `SyncConfig` beside those of `learner.SYNC`.
        proxies: the links; None: learners dial the syncer itself.
        on_start: called with (learner id, its process) right after its start, for instance to pin it.
    """

    folder: Path
    seed: int = 0
    step_s: float = 0.05
    fall_steps: int = 0
    sync: dict[str, Any] = field(default_factory=dict)
    proxies: Proxies | None = None
    on_start: Callable[[int, Child], None] = lambda learner_id, child: None

    @property
    def run_dir(self) -> Path:
        """The syncer's."""
        return self.folder / "run"


@dataclass
class Learner:
    """A learner id over its lives."""

    learner_id: int
    child: Child
    life: int = 0
    is_wanted: bool = True
    """Whether it is started again when it ends."""
    ended: ExitStatus | None = None
    """How its present life ended; None while it runs."""
    start_at_s: float | None = None
    ends: list[tuple[int, str]] = field(default_factory=list)
    """(life, how) of all lives that have ended."""


class Cluster:
    """See the module.

    Args:
        job: what to run.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.learners: dict[int, Learner] = {}
        self.tape = TapeWatch(job.run_dir / TAPE_NAME)
        self.restarts = 0
        self._hello = {"token": secrets.token_hex(16), "takeover_token": secrets.token_hex(16), "num_slots": None}
        self._environment = child_environment(4) | {"OMP_NUM_THREADS": "1"}
        self.syncer = SyncerChild(job.run_dir, self._hello, self._environment, max_restarts=10**6)
        self._keeper = SummaryKeeper(job.run_dir)
        self._started_s = time.monotonic()
        self._startup_s = 0.0
        self._is_ending = self._has_finished = False
        self._said: dict[str, Any] = {}

    # ---- the life of a job --------------------------------------------------------------------------------------------------

    def start(self, num_learners: int) -> None:
        """Start the syncer and learners 0 to `num_learners` - 1, and wait until all are members.

        Raises:
            TimeoutError: they are not after `START_S`.
        """
        for folder in (self.job.run_dir / "counters", self.job.folder / "logs", self.job.folder / "steps"):
            folder.mkdir(parents=True)
        self.syncer.start()
        self.wait(lambda: self.syncer.ready_path.exists(), "the syncer's start")
        self._said = json.loads(self.syncer.ready_path.read_text())
        for learner_id in range(num_learners):
            self.add(learner_id)
        self.wait(lambda: len(self.tape.members) == num_learners, "the first joins")
        self._startup_s = time.monotonic() - self._started_s

    def turn(self) -> None:
        """Look after everything once: a few milliseconds, then a short sleep."""
        if not self._has_finished:
            self.syncer.look_after()
        for learner in self.learners.values():
            self._look_after(learner)
        self.tape.look()
        self._keeper.tick(time.monotonic())
        time.sleep(TICK_S)

    def wait(self, is_so: Callable[[], bool], what: str, patience_s: float = START_S) -> None:
        """Turn until something is so.

        Raises:
            TimeoutError: it is not within `patience_s`.
        """
        end_s = time.monotonic() + patience_s
        while not is_so():
            if time.monotonic() > end_s:
                raise TimeoutError(f"{what}: not within {patience_s:g} s; see {self.job.folder}")
            self.turn()

    def finish(self, patience_s: float = 60.0) -> dict[str, Any]:
        """End the training of all members, wait until they have left, end the job; returns its summary.

        A process that is not a member yet is ended: it has nothing to hand over, and the job's end would wait for its start.
        """
        self._is_ending = True
        (self.job.folder / "end").touch()
        for learner in self.learners.values():
            learner.start_at_s = None
            if learner.ended is None and learner.learner_id not in self.tape.members:
                learner.child.signal_group(signal.SIGKILL)
        end_s = time.monotonic() + patience_s
        while self.tape.members and time.monotonic() < end_s:
            self.turn()
        for learner_id in self.tape.members:
            _log.error("learner %d did not leave within %g s and is killed", learner_id, patience_s)
            self.learners[learner_id].child.signal_group(signal.SIGKILL)
        self.syncer.finish("finished", lambda: False)
        self._has_finished = True
        self.wait(lambda: all(learner.ended is not None for learner in self.learners.values()), "the end of all learners")
        record = RunRecord(
            status="finished",
            startup_s=self._startup_s,
            restarts={"learners": self.restarts, "syncer": self.syncer.restarts},
            val=None,
        )
        append_run_record(self.job.run_dir / TAPE_NAME, record)
        return self._keeper.finish()

    def kill(self) -> None:
        """End everything that still runs."""
        children = [learner.child for learner in self.learners.values()]
        for child in [*children, *([self.syncer.child] if self.syncer.child is not None else [])]:
            child.signal_group(signal.SIGKILL)  # ends a stopped process too
            child.close_line()

    # ---- learners -----------------------------------------------------------------------------------------------------------

    def add(self, learner_id: int) -> Learner:
        """Start the first process of a learner id."""
        learner = self.learners[learner_id] = Learner(learner_id, self._start(learner_id, 0))
        return learner

    def link(self, learner_id: int) -> Link:
        """Its link."""
        assert self.job.proxies is not None
        return self.job.proxies.link(learner_id, [self._said["endpoint"], self._said["bulk"]])

    def steps(self, learner_id: int, life: int) -> list[float]:
        """Ends of the steps of one life."""
        return read_steps(self._steps_path(learner_id, life))

    def log_end(self, learner_id: int) -> str:
        """The last line that it wrote."""
        lines = self._log_path(learner_id).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _steps_path(self, learner_id: int, life: int) -> Path:
        return self.job.folder / "steps" / f"{learner_id}_{life}.bin"

    def _log_path(self, learner_id: int) -> Path:
        return self.job.folder / "logs" / f"learner_{learner_id}.log"

    def _start(self, learner_id: int, life: int) -> Child:
        child = start_child("benchmarks.storm.learner", [], log=self._log_path(learner_id), environment=self._environment)
        child.send_line(
            {
                "endpoint": self._said["endpoint"],
                "routes": self.link(learner_id).targets if self.job.proxies is not None else {},
                "learner_id": learner_id,
                "life": life,
                "token": self._hello["token"],
                "takeover_token": self._hello["takeover_token"],
                "run_dir": str(self.job.run_dir),
                "steps": str(self._steps_path(learner_id, life)),
                "end": str(self.job.folder / "end"),
                "seed": self.job.seed,
                "step_s": self.job.step_s,
                "fall_steps": self.job.fall_steps,
                "sync": self.job.sync,
            }
        )
        self.job.on_start(learner_id, child)
        return child

    def _look_after(self, learner: Learner) -> None:
        if learner.start_at_s is not None:
            if time.monotonic() >= learner.start_at_s:
                learner.start_at_s, learner.ended = None, None
                learner.life += 1
                self.restarts += 1
                learner.child = self._start(learner.learner_id, learner.life)
            return
        if learner.ended is not None:
            return
        learner.ended = learner.child.poll()
        if learner.ended is None:
            return
        learner.ends.append((learner.life, str(learner.ended)))
        self.syncer.tell_lost(learner.learner_id, learner.life)
        if learner.is_wanted and not self._is_ending and learner.ended.code != 0:
            learner.start_at_s = time.monotonic() + RESTART_S
