"""Inner optimizer state from a healthy learner to one that has none, a fragment at a time (PROTOCOL.md section 9).

    a request goes through   it ends when
    waiting                  a place is free: then a peer is asked (`PeerStateWanted`)
    asked                    the peer offers its state; or it was not active, or took too long: another one is asked
    sending                  the state is here; or the peer is gone, or took too long: another one is asked
    relaying                 the learner that asked has it, or the transport gave up, or it took too long

The syncer relays bytes and never looks into them: whether a state fits is for the peer to say (no bytes: it has none) and for the
learner to check. Who is asked: an active member, of those with the fewest requests the one with the most inner steps of its own, because
its moments are the oldest; after an answer that was of no use, the next one.

Bounds. A learner has one request, for one fragment, and asks for the next one when that has ended; at most `MAX_AT_ONCE` requests are under
way, so that many newcomers at once take no more memory and bandwidth than two, and the others wait in line. Nothing waits for a request
but itself: a syncer that starts again forgets all of them, and learners ask again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_diloco.protocol.actions import DropPeerState, RelayPeerState, Reply, SyncerAction
from lightning_diloco.protocol.events import PeerStateArrived, PeerStateRelayed
from lightning_diloco.protocol.job import Job
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.messages import PeerState, PeerStateRequest, PeerStateWanted

__all__ = ["ANSWER_S", "MAX_AT_ONCE", "MAX_PEERS", "TRANSFER_S", "PeerStates"]

MAX_AT_ONCE = 2
"""Requests under way; each holds one payload at most."""
MAX_PEERS = 3
"""So many peers are asked in vain; then the request is dropped, and its learner may ask again."""
MAX_RELAYS = 3
"""A life gets so many states of one fragment: a learner has no use for more, and each costs the syncer and a peer its bytes."""
ANSWER_S = 10.0
"""A peer offers its state after so long, or three of its steps if they are longer: it copies it aside at the end of one."""
TRANSFER_S = 600.0
"""A state is here so long after it was first offered, and there so long after that."""


@dataclass(slots=True)
class _Request:
    session: str
    """Of the learner that asks."""
    fragment_id: int
    optimizers: tuple[str, ...]
    attempt: int
    num_failed: int = 0
    """Peers that were asked in vain."""
    stage: Literal["waiting", "asked", "sending", "relaying"] = "waiting"
    ticket: int = 0
    peer: str = ""
    """Session of the peer that was asked."""
    until_s: float = 0.0


class PeerStates:
    """The requests of one job, in the order in which they came.

    Args:
        job: whose members ask and are asked.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._requests: dict[str, _Request] = {}
        self._last_ticket = 0
        self._now_s = 0.0

    def requested(self, member: Member, message: PeerStateRequest, now_s: float) -> list[SyncerAction]:
        """A learner asks, or asks again; while an answer is under way that changes nothing. One that has had enough gets no answer."""
        if member.num_states.get(message.fragment_id, 0) >= MAX_RELAYS:
            return []
        known = self._requests.get(member.session)
        if known is None:
            self._requests[member.session] = _Request(member.session, message.fragment_id, message.optimizers, message.attempt)
        elif known.stage == "waiting":
            known.fragment_id, known.optimizers, known.attempt = message.fragment_id, message.optimizers, message.attempt
        return []

    def offered(self, session: str, header: PeerState) -> bool:
        """A peer offers a state: whether it is waited for. The peer has time for the transfer from its first offer on."""
        request = self._by_ticket(header.ticket)
        if request is None or request.peer != session or request.fragment_id != header.fragment_id:
            return False
        if request.stage == "asked":
            request.stage, request.until_s = "sending", self._now_s + TRANSFER_S
        return request.stage == "sending"

    def arrived(self, event: PeerStateArrived, now_s: float) -> list[SyncerAction]:
        """A state is here; who is not waiting for it any more does not get it."""
        if not self.offered(event.session, event.header):
            return []
        request = self._by_ticket(event.header.ticket)
        assert request is not None
        member = self._job.members.of(request.session)
        if member is not None:
            member.num_states[request.fragment_id] = member.num_states.get(request.fragment_id, 0) + 1
        request.stage, request.until_s = "relaying", now_s + TRANSFER_S
        return [RelayPeerState(session=request.session, header=event.header)]

    def relayed(self, event: PeerStateRelayed, now_s: float) -> list[SyncerAction]:
        """The request has ended; whether it was of use is seen by what its learner asks next."""
        request = self._by_ticket(event.ticket)
        if request is not None and request.stage == "relaying":
            del self._requests[request.session]
        return []

    def progress(self, now_s: float) -> list[SyncerAction]:
        """Time has passed or something has happened: end what takes too long, ask for what waits."""
        self._now_s = now_s
        if not self._requests:
            return []
        actions: list[SyncerAction] = []
        active = {m.session: m for m in self._job.members.active(now_s)}
        for request in list(self._requests.values()):
            is_gone = self._job.members.of(request.session) is None
            if request.stage == "relaying" and (is_gone or now_s >= request.until_s):
                actions.append(DropPeerState(ticket=request.ticket))
                del self._requests[request.session]
            elif is_gone:
                del self._requests[request.session]
            elif request.stage != "waiting" and request.stage != "relaying" and self._is_vain(request, active, now_s):
                self._fail(request)
        for request in self._requests.values():
            if request.stage == "waiting" and sum(r.stage != "waiting" for r in self._requests.values()) < MAX_AT_ONCE:
                actions += self._ask(request, active, now_s)
        return actions

    def _is_vain(self, request: _Request, active: dict[str, Member], now_s: float) -> bool:
        # One that is in a validation reaches no end of a step, but what it has copied aside is on its way all the same.
        is_there = request.peer in active if request.stage == "asked" else self._job.members.of(request.peer) is not None
        return not is_there or now_s >= request.until_s

    def _fail(self, request: _Request) -> None:
        request.num_failed += 1
        request.stage, request.peer = "waiting", ""
        if request.num_failed >= MAX_PEERS:
            del self._requests[request.session]

    def _ask(self, request: _Request, active: dict[str, Member], now_s: float) -> list[SyncerAction]:
        asked = [r.peer for r in self._requests.values() if r.stage != "waiting"]
        peers = [m for m in active.values() if m.session != request.session]
        if not peers:
            return []
        peers.sort(key=lambda m: (asked.count(m.session), -m.inner_step, m.learner_id))
        peer = peers[(request.attempt + request.num_failed) % len(peers)]
        self._last_ticket += 1
        request.stage, request.ticket, request.peer = "asked", self._last_ticket, peer.session
        request.until_s = now_s + max(ANSWER_S, 3 * (peer.step_time.value or 0.0))
        message = PeerStateWanted(ticket=request.ticket, fragment_id=request.fragment_id, optimizers=request.optimizers)
        return [Reply(session=peer.session, message=message, incarnation=peer.incarnation)]

    def _by_ticket(self, ticket: int) -> _Request | None:
        return next((r for r in self._requests.values() if r.ticket == ticket and r.stage != "waiting"), None)
