"""The syncer on the virtual clock: the real `SyncerMachine`; sockets become delays, tensors durations, the tape a list of lines.

One worker folds and merges, in the order of the machine's actions. Checksums are those of names, so that a mix-up of versions shows
as it would with bytes: the learner acknowledges the crc of the publication that it adopted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from zlib import crc32

from lightning_diloco.config import payload_bytes
from lightning_diloco.protocol.actions import (
    BeginFounding,
    Close,
    CloseSession,
    DropPayload,
    Ended,
    Fold,
    MakeDurable,
    Reply,
    SyncerAction,
    Tape,
    Transmit,
)
from lightning_diloco.protocol.events import ControlReceived, Durable, LearnerEvent, Merged, PublicationArrived, SyncerEvent, Tick
from lightning_diloco.protocol.job import JobOptions
from lightning_diloco.protocol.messages import Envelope, Publication
from lightning_diloco.protocol.records import EndRecord, Record, TapeLine, encode_line
from lightning_diloco.protocol.syncer import SyncerMachine
from lightning_diloco.sim.engine import Engine
from lightning_diloco.sim.network import Wire
from lightning_diloco.sim.options import SimOptions

__all__ = ["TAKEOVER_TOKEN", "Session", "SyncerProcess"]

TAKEOVER_TOKEN = "supervisor"
TICK_S = 1e-3
"""A deadline that has passed already is looked at again after so long: the machine waits for a merge."""


class Session(Protocol):
    """What the syncer sees of a learner's process."""

    wire: Wire

    def receive(self, event: LearnerEvent) -> None:
        """Take a control message."""

    def take(self, event: PublicationArrived) -> None:
        """Take a payload and acknowledge it."""


class SyncerProcess:
    """Drives one `SyncerMachine`.

    Args:
        engine: the clock.
        options: of the simulated job.
    """

    def __init__(self, engine: Engine, options: SimOptions) -> None:
        self.machine = SyncerMachine(
            JobOptions(
                job_id="sim",
                lineage=f"sim-{options.seed}",
                takeover_token=TAKEOVER_TOKEN,
                num_slots=len(options.learners),
                is_supervised=True,
            )
        )
        self.lines: list[bytes] = []
        """The tape so far."""
        self.end: Ended | None = None
        """The machine's last word."""
        self._engine = engine
        self._options = options
        self._sessions: dict[str, Session] = {}
        self._worker_free_s = 0.0
        self._tick_s: float | None = None
        job = self.machine.job.options
        self._envelope = partial(Envelope, job.job_id, job.lineage)
        self._handlers: dict[type, Callable[[Any], object]] = {
            Reply: self._reply,
            Fold: self._fold,
            Close: self._close,
            Transmit: self._transmit,
            Tape: lambda action: self._write(action.record),
            Ended: self._ended,
            CloseSession: lambda action: self._sessions.pop(action.session, None),
            BeginFounding: lambda action: None,
            DropPayload: lambda action: None,
            MakeDurable: lambda action: self._engine.schedule(partial(self.receive, Durable())),
        }

    def connect(self, name: str, session: Session) -> None:
        """A learner's process dialled in."""
        self._sessions[name] = session

    def receive(self, event: SyncerEvent) -> None:
        """Hand one event to the machine and do what it says."""
        actions: list[SyncerAction] = self.machine.handle(event, self._engine.now_s)
        handlers = self._handlers
        for action in actions:
            handlers[type(action)](action)
        self._look_again()

    # ---- actions ------------------------------------------------------------------------------------------------------------

    def _reply(self, action: Reply) -> None:
        session = self._sessions.get(action.session)
        if session is not None:
            envelope = self._envelope(self.machine.job.epoch, action.incarnation)
            session.wire.control(partial(session.receive, ControlReceived(envelope=envelope, message=action.message)))

    def _fold(self, action: Fold) -> None:
        self._worker_free_s = max(self._engine.now_s, self._worker_free_s) + self._options.fold_s

    def _close(self, action: Close) -> None:
        now_s = self._engine.now_s
        self._worker_free_s = max(now_s, self._worker_free_s) + self._options.merge_s
        crc = crc32(b"%d/%d/%d" % (action.fragment_id, action.version.epoch, action.version.n))
        merged = Merged(fragment_id=action.fragment_id, crc=crc, merge_s=self._worker_free_s - now_s)
        self._engine.schedule(partial(self.receive, merged), at_s=self._worker_free_s)

    def _transmit(self, action: Transmit) -> None:
        session = self._sessions.get(action.session)
        if session is None:
            return
        header = Publication(
            fragment_id=action.fragment_id,
            version=action.version,
            parent=action.parent,
            crc=action.crc,
            merged_through=action.merged_through,
        )
        arrived = PublicationArrived(envelope=self._envelope(self.machine.job.epoch, 0), header=header)
        wire_dtype = "fp32" if action.parent is None else self._options.config.wire_dtype
        num_bytes = payload_bytes(self._options.params_per_fragment, wire_dtype)
        session.wire.down(num_bytes, partial(session.take, arrived))

    def _ended(self, action: Ended) -> None:
        self.end = action
        self._write(EndRecord(status=action.status, versions=action.versions, global_sha256=None))
        self._engine.stop()

    def _write(self, record: Record) -> None:
        self.lines.append(encode_line(TapeLine(len(self.lines), self._engine.now_s, record)))

    # ---- time ---------------------------------------------------------------------------------------------------------------

    def _look_again(self) -> None:
        """Let the machine see the time of its next deadline."""
        deadline_s = self.machine.next_deadline_s()
        if deadline_s is None:
            return
        if self._tick_s is None or deadline_s < self._tick_s:
            now_s = self._engine.now_s
            self._tick_s = deadline_s if deadline_s > now_s else now_s + TICK_S
            self._engine.schedule(partial(self._tick, self._tick_s), at_s=self._tick_s)

    def _tick(self, at_s: float) -> None:
        if self._tick_s == at_s:
            self._tick_s = None
            self.receive(Tick())
