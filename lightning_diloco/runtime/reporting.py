"""What a learner tells its syncer at every heartbeat, and how it notices that nobody answers. Lives on the background thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec

from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import Layout
from lightning_diloco.protocol.learner import LearnerMachine
from lightning_diloco.protocol.messages import FromSyncer, Heartbeat, LeaseGrant, Leave, Message, Ping, Pong, StopRequest
from lightning_diloco.runtime.figures import StepTimes
from lightning_diloco.runtime.leases import Leases

__all__ = ["Reports"]

_log = logging.getLogger(__name__)

SILENT_HEARTBEATS = 10
"""After so many heartbeats (at least `SILENT_S`) without a word the syncer counts as lost."""
SILENT_S = 10.0


class Reports:
    """Reports of one learner.

    Args:
        machine: whose state they tell.
        lock: held while the machine is asked.
        times: of the steps.
        config: of the job.
        send: sends a control message; whether the socket took it.
        layout: what its syncer merges: a model, or a shard's part of one.
    """

    def __init__(
        self,
        machine: LearnerMachine,
        lock: threading.Lock,
        times: StepTimes,
        config: SyncConfig,
        send: Callable[[Message], bool],
        layout: Layout,
    ) -> None:
        self.leave: Leave | None = None
        """Said once, it is the report that is repeated: its figures are the last ones."""
        self.lost_syncer = False
        self.heard_s = time.monotonic()
        self.leases: Leases | None = None
        """The learner's data leases, if it has any."""
        self._machine, self._lock, self._times, self._config, self._send = machine, lock, times, config, send
        self._name = "the syncer" if layout.num_shards == 1 else f"shard {layout.shard} of the syncer"
        self._goes_on = "training goes on with local steps"
        if layout.num_shards > 1:
            self._goes_on = "training goes on, and its fragments stay as they are; those of other shards are merged"
        self._due_s = 0.0
        self._is_taken = True
        self._pings = 0
        self.offline_stop: str | None = None
        """Why this learner ends by itself: there was no syncer for `max_offline_steps`."""
        self._seen_s, self._heard_step = self.heard_s, 0
        self.target_step_s = 0.0
        """What a step is to take where batch sizes are found automatically; 0 until the syncer has said it."""

    def tick(self, now_s: float) -> None:
        """Report if it is time, or if many steps wait."""
        # A report that the socket did not take waits for its time: many steps waiting are no reason to try at every turn.
        is_early = self._times.is_full and self._is_taken and self.leave is None
        if now_s >= self._due_s or is_early:
            self._report(now_s)
        self._count_offline_steps()
        if self.leases is not None and self.leave is None:
            self.leases.tick(now_s)

    def _count_offline_steps(self) -> None:
        inner_step, limit = self._machine.state.inner_step, self._config.max_offline_steps
        if self.heard_s > self._seen_s:
            self._seen_s, self._heard_step = self.heard_s, inner_step
        steps = inner_step - self._heard_step
        # Steps may be much shorter than the time between two words of a syncer that is well: it has to count as lost first.
        if limit is not None and self.lost_syncer and self.offline_stop is None and steps >= limit:
            self.offline_stop = f"no {self._name.removeprefix('the ')} for {steps} inner steps (max_offline_steps={limit})"
            _log.error("This learner ends: %s. It keeps the published parameters that it has.", self.offline_stop)

    def is_heard(self, now_s: float) -> bool:
        """Whether the syncer answers; if not, what is out of date by then would push the reports out of the socket's queue."""
        return now_s - self.heard_s < 3 * self._config.heartbeat_s

    def make(self) -> Heartbeat:
        """A full report of this moment, with all step times of which it is not known that they are on the tape."""
        steps = self._times.take(is_heard=self.is_heard(time.monotonic()))
        samples, again = (self.leases.samples, self.leases.reported_again()) if self.leases is not None else (0, ())
        with self._lock:
            report = self._machine.report(
                first_gap=steps.first,
                step_gaps_s=steps.gaps_s,
                paused_s=steps.paused_s,
                stalls_s=steps.stalls_s,
                last_step_age_s=steps.age_s,
                clock_s=time.monotonic(),
            )
        return msgspec.structs.replace(report, samples=samples, again=again)

    def heed(self, message: FromSyncer) -> None:
        """The syncer has said how many steps it has on its tape and how long one is to be, or which samples are this learner's."""
        if isinstance(message, Pong):
            self._times.confirm(message.num_gaps)
            self.target_step_s = message.target_step_s or self.target_step_s
        elif isinstance(message, LeaseGrant) and self.leases is not None:
            self.leases.granted(message)

    def _report(self, now_s: float) -> None:
        self._due_s = now_s + self._config.heartbeat_s
        self._pings += 1
        self._is_taken = self._send(self.make() if self.leave is None else self.leave)
        self._send(Ping(number=self._pings))
        state = self._machine.state
        if state.wants_stop is not None and not state.is_stopped:
            self._send(StopRequest(reason=state.wants_stop))
        silent_s = max(SILENT_S, SILENT_HEARTBEATS * self._config.heartbeat_s)
        if not self.lost_syncer and now_s - self.heard_s > silent_s:
            self.lost_syncer = True
            _log.warning("Nothing was heard from %s for %.0f s; %s.", self._name, silent_s, self._goes_on)
        elif self.lost_syncer and now_s - self.heard_s <= silent_s:
            self.lost_syncer = False
            _log.warning("%s is back.", self._name[0].upper() + self._name[1:])
