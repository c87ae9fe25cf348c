"""What a join waits for, on the training thread, before the first step: the syncer's word, and the first samples. Later nothing waits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from lightning_diloco.errors import ShardedSyncerError, SyncerUnavailableError
from lightning_diloco.outer import Layout
from lightning_diloco.protocol.identity import DataSpec
from lightning_diloco.protocol.learner import LearnerMachine
from lightning_diloco.runtime.client_loop import ClientLoop
from lightning_diloco.runtime.client_options import ClientOptions
from lightning_diloco.runtime.leases import Link
from lightning_diloco.runtime.life_signs import give_sign
from lightning_diloco.runtime.transport import LearnerTransport
from lightning_diloco.runtime.unanswered import explain

__all__ = ["FounderWatch", "wait_for_join", "wait_for_lease"]

_log = logging.getLogger(__name__)

COMPLAIN_S = 30.0
"""A founder that is waited for is named so often."""


class FounderWatch:
    """Says from time to time that a join waits for the learner that founds the job: it may be dead.

    Args:
        machine: of the learner that waits.
        layout: what it joins: a model, or a shard's part of one.
    """

    def __init__(self, machine: LearnerMachine, layout: Layout) -> None:
        self._machine, self._begun_s = machine, time.monotonic()
        self._due_s = self._begun_s + COMPLAIN_S
        self._name = "The syncer" if layout.num_shards == 1 else f"Shard {layout.shard} of the syncer"

    def look(self) -> None:
        """Complain if it is time."""
        now_s = time.monotonic()
        if now_s >= self._due_s and self._machine.is_waiting:
            self._due_s = now_s + COMPLAIN_S
            text = "%s waits for learner 0 to found the job, for %.0f s now: start that learner if it is not running, or read what it says."
            _log.warning(text, self._name, now_s - self._begun_s)


def wait_for_join(
    loop: ClientLoop, transport: LearnerTransport, options: ClientOptions, patience_s: float, *looks: Callable[[], None]
) -> None:
    """Wait until the learner is a member. A syncer that answers is waited for without limit: a slow founder may need minutes.

    Unless there is no way for payloads: without one nobody becomes a member (`link_care`).

    Args:
        loop: started, and `Hello` is said.
        transport: the loop's.
        options: of this process.
        patience_s: silence of the syncer, or time without any connection for payloads, after which it is given up.
        looks: called again and again meanwhile; what they raise ends the wait.

    Raises:
        DiLoCoError: the syncer said no, is silent, cannot be reached with payloads, or has several shards (`ShardedSyncerError`).
    """
    while not loop.settled.wait(0.05):
        give_sign()
        for look in looks:
            look()
        if time.monotonic() - loop.reports.heard_s > patience_s:
            why = explain(transport.failed_handshakes, options.keys)
            raise SyncerUnavailableError(f"No syncer answered at {options.endpoint} for {patience_s:g} s. {why}")
        if loop.links.blocked_s > patience_s:
            raise SyncerUnavailableError(f"There was no connection for payloads for {patience_s:g} s. {loop.links.why_blocked}")
    if loop.fatal is not None:
        raise loop.fatal
    if loop.sharded is not None:
        raise ShardedSyncerError(loop.sharded.endpoints)


def wait_for_lease(loop: ClientLoop, machine: LearnerMachine, options: ClientOptions, data: DataSpec, patience_s: float) -> None:
    """Wait for samples: a learner begins with some.

    Args:
        loop: of a learner that has joined.
        machine: its rules.
        options: of this process, with leases.
        data: what the job hands out.
        patience_s: silence of the syncer after which it is given up.

    Raises:
        DiLoCoError: the syncer is silent, or has ended this session.
    """
    leases = options.leases
    assert leases is not None
    leases.follow(data)
    leases.connect(
        Link(
            send=loop.send,
            wake=loop.wake,
            is_heard=loop.reports.is_heard,
            syncer_epoch=lambda: machine.state.envelope.epoch,
            heartbeat_s=options.config.heartbeat_s,
        )
    )
    loop.reports.leases = leases
    loop.wake()
    while not leases.has_answer and loop.fatal is None and loop.stop_reason is None and loop.reports.offline_stop is None:
        if time.monotonic() - loop.reports.heard_s > patience_s:
            raise SyncerUnavailableError(f"The syncer at {options.endpoint} has fallen silent before it handed out any samples.")
        give_sign()
        time.sleep(0.005)
    if loop.fatal is not None:
        raise loop.fatal
