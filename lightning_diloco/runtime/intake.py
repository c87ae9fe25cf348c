"""Payloads that reach the syncer: who may send one, and what becomes of it.

Memory is for members alone, and only for what a learner can have on its way. A payload is decoded and measured on the numerics thread; the
rules hear of it as facts (a norm, a checksum, where it was written down), on the loop thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from lightning_diloco.outer import FragmentState
from lightning_diloco.protocol.events import ContributionArrived, FoundingArrived, HeldArrived, SyncerEvent
from lightning_diloco.protocol.messages import Contribution, Envelope, HeldFragment, PeerState
from lightning_diloco.protocol.syncer import SyncerMachine
from lightning_diloco.protocol.wire import decode_learner_header
from lightning_diloco.runtime.founding import Founded
from lightning_diloco.runtime.healing import is_sound
from lightning_diloco.runtime.payloads import PayloadKey
from lightning_diloco.runtime.performer import Performer
from lightning_diloco.runtime.relay import PeerStateRelay
from lightning_diloco.runtime.store import Measured

__all__ = ["MIN_DECODING", "Intake"]

MIN_DECODING = 32
"""Twice so many payloads of one learner may wait for decoding, and twice so many items may stand in its reports, whatever the layout."""


class Intake:
    """The way of a payload from the socket to the rules; lives on the loop thread.

    Args:
        machine: whose rules they are.
        performer: owns the store.
        relay: of inner optimizer states, which pass through.
        submit: runs (work, then) on the numerics thread and back.
        handle: gives the machine an event, with the contribution that it is about.
    """

    def __init__(
        self,
        machine: SyncerMachine,
        performer: Performer,
        relay: PeerStateRelay,
        *,
        submit: Callable[[Callable[[], Any], Callable[[Any], None]], None],
        handle: Callable[[SyncerEvent, Measured | None], None],
    ) -> None:
        self._machine, self._performer, self._relay, self._submit, self._handle = machine, performer, relay, submit, handle
        self._decoding: dict[str, int] = {}
        self._storing: set[tuple[str, int]] = set()

    def accepts(self, peer: bytes, header: bytes, total_bytes: int) -> bool | str:
        """Whether memory may be given to a payload that is offered: the transport's `accept`."""
        session, job = peer.hex(), self._machine.job
        if job.members.of(session) is None or self._decoding.get(session, 0) > 2 * max(job.num_fragments, MIN_DECODING):
            return "refused"
        recovery = self._machine.recovery
        if recovery is not None and recovery.is_running:
            return self._performer.accepts_held(header, total_bytes, lambda held: self._expects(session, held))
        is_accepted = self._relay.accepts(session, header, total_bytes)
        return self._performer.accepts(session, header, total_bytes) if is_accepted is None else is_accepted

    def _expects(self, session: str, held: HeldFragment) -> bool:
        """Asked twice, a learner offers a copy when the first one has arrived: what is being looked at is not taken once more."""
        recovery, is_here = self._machine.recovery, (session, held.fragment_id) in self._storing
        return not is_here and recovery is not None and recovery.expects(session, held.fragment_id, held.version)

    def take(self, session: str, data: bytes, payload: memoryview) -> None:
        """Take a payload that is complete."""
        envelope, header = decode_learner_header(data)  # `accepts` has decoded it once, so it is valid
        if isinstance(header, Contribution):
            self._contribution(session, envelope, header, payload)
        elif isinstance(header, HeldFragment):
            self._held(session, header, payload)
        elif isinstance(header, PeerState):
            self._relay.take(session, header, payload)
        else:
            self._performer.take_founding(session, header, payload, lambda founded: self._founded(session, founded))

    def _contribution(self, session: str, envelope: Envelope, header: Contribution, payload: memoryview) -> None:
        store = self._performer.store
        if store is None:
            return

        written = self._record(session, envelope, header, payload)

        def then(measured: Measured) -> None:
            """On the loop thread: wait for the disk, if payloads are kept."""
            self._performer.payloads.when_written(written, lambda payload_at: decided(measured, payload_at))

        def decided(measured: Measured, payload_at: int | None) -> None:
            """On the loop thread: tell the machine what has arrived."""
            self._decoding[session] -= 1
            if not self._decoding[session]:
                del self._decoding[session]
            event = ContributionArrived(
                session=session,
                envelope=envelope,
                header=header,
                norm=measured.norms.whole,
                is_finite=is_sound(measured.norms.whole),
                payload_bytes=len(payload),
                crc_ok=measured.crc_ok,
                payload_at=payload_at,
            )
            self._handle(event, measured)

        self._decoding[session] = self._decoding.get(session, 0) + 1
        self._submit(lambda: store.measure_contribution(header.fragment_id, payload, header.crc), then)

    def _record(self, session: str, envelope: Envelope, header: Contribution, payload: memoryview) -> Future[int | None] | None:
        """Have the payload written down, if payloads are kept; of a stranger nothing is."""
        member = self._machine.job.members.of(session)
        if member is None:
            return None
        key = PayloadKey(
            kind="contribution",
            fragment_id=header.fragment_id,
            learner_id=member.learner_id,
            incarnation=envelope.incarnation,
            seq=header.seq,
        )
        return self._performer.payloads.put(key, payload)

    def _held(self, session: str, header: HeldFragment, payload: memoryview) -> None:
        store, recovery = self._performer.store, self._machine.recovery
        if store is None or recovery is None or not recovery.expects(session, header.fragment_id, header.version):
            return

        def then(state: FragmentState | None) -> None:
            """On the loop thread: it is in the store, if it is what was asked for."""
            self._decoding.pop(session, None)
            self._storing.discard((session, header.fragment_id))
            # Another copy, or another learner's, may have been quicker.
            if not recovery.expects(session, header.fragment_id, header.version):
                return
            # What the rules will not take must not stand in the store under the version that they fall back to.
            if state is not None and recovery.is_sound(header):
                self._performer.put_recalled(header.fragment_id, state)
                self._submit(lambda: store.put_recalled(header.fragment_id, state), lambda result: None)
            self._handle(HeldArrived(session=session, header=header, crc_ok=state is not None), None)

        self._decoding[session] = self._decoding.get(session, 0) + 1
        self._storing.add((session, header.fragment_id))
        self._submit(lambda: store.recalled(header.fragment_id, payload, header.crc, header.version.n), then)

    def _founded(self, session: str, founded: Founded) -> bool:
        """Whether the rules take this for the founding: its founder may have died a moment ago."""
        event = FoundingArrived(session=session, crcs=founded.crcs, payload_bytes=founded.num_bytes, payload_at=founded.payload_at)
        self._handle(event, None)
        return self._machine.job.is_founded
