"""`SyncerMachine`: the rules of the syncer, without I/O, clock, or tensor.

`handle(event, now_s)` takes one event and returns what is to be done, in order. It decides which contributions are merged, with which
weights, when, and who gets the result; it emits `Fold(contribution, weight)` and `Close(fragment)`. The runtime performs them with tensors,
the simulator as durations. What a peer may send in which stage is decided here and in the parts that this class composes: `Admission`
(join, found, leave, fence), `Rounds` (due, quorum, grace, merge), `Contributions` (accept or refuse), `Publisher` (who holds what),
`PeerStates` (inner optimizer state from one learner to another).

Invariants (each a property test): a contribution is merged at most once; no merge of fewer contributions than its quorum; versions only
grow; only an empty job is founded; a fenced incarnation changes nothing; every pull and every round ends; the ledger's identity holds;
memory is bounded by learners times fragments.

References:
    Decoupled DiLoCo, arXiv 2604.21428, algorithm 2 and equation 3.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_diloco.protocol.actions import CloseSession, DropPayload, Reply, SyncerAction, Tape
from lightning_diloco.protocol.admission import Admission
from lightning_diloco.protocol.contributions import Contributions
from lightning_diloco.protocol.departures import Departures
from lightning_diloco.protocol.events import (
    ContributionArrived,
    CountersRead,
    Durable,
    Finish,
    FoundingArrived,
    HeldArrived,
    HeldMoves,
    LearnerLost,
    Merged,
    MessageReceived,
    PayloadFailed,
    PeerStateArrived,
    PeerStateRelayed,
    PublicationDelivered,
    PublicationFailed,
    SyncerEvent,
    Tick,
)
from lightning_diloco.protocol.faults import fault_of
from lightning_diloco.protocol.identity import ContributionKey, Version
from lightning_diloco.protocol.job import Job, JobOptions
from lightning_diloco.protocol.leasing import Leasing
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.messages import (
    Adopted,
    BatchChosen,
    Busy,
    Found,
    FromLearner,
    Heartbeat,
    Hello,
    JoinRefused,
    LeaseRequest,
    Leave,
    NeedFull,
    NotHeld,
    Paused,
    PeerStateRequest,
    Ping,
    Pong,
    Progress,
    Ready,
    Resolved,
    Stop,
    StopRequest,
    WhoAreYou,
)
from lightning_diloco.protocol.peer_state import PeerStates
from lightning_diloco.protocol.records import CountersRecord, DiscardRecord, ProgressRecord
from lightning_diloco.protocol.recovery import Recovery, Resumption
from lightning_diloco.protocol.rounds import Rounds
from lightning_diloco.protocol.step_target import StepTarget

__all__ = ["SyncerMachine"]


class SyncerMachine:
    """The syncer's state and rules.

    Args:
        options: identity and policy of the job.
        resumption: a job to go on with; None: a new one.
    """

    def __init__(self, options: JobOptions, resumption: Resumption | None = None) -> None:
        self.job = Job(options)
        self.rounds = Rounds(self.job)
        self._target = StepTarget(options)
        self._admission = Admission(self.job, self.rounds)
        self._contributions = Contributions(self.job, self.rounds, self._admission)
        self._departures = Departures(self.job, self.rounds, self._admission)
        self._leasing = Leasing(self.job)
        self.peer_states = PeerStates(self.job)
        self.recovery = None if resumption is None else Recovery(self.job, self.rounds, self._admission, resumption)
        self._departures.is_winding_up = resumption is not None and resumption.history.is_winding_up
        self._now_s = 0.0
        self._handlers: dict[type, Callable[..., list[SyncerAction]]] = {
            MessageReceived: self._message,
            ContributionArrived: self._contribution,
            PayloadFailed: self._payload_failed,
            FoundingArrived: self._admission.founded,
            HeldArrived: lambda event, now_s: self.recovery.arrived(event, now_s) if self.recovery is not None else [],
            HeldMoves: lambda event, now_s: self.recovery.moves(event, now_s) if self.recovery is not None else [],
            PeerStateArrived: self.peer_states.arrived,
            PeerStateRelayed: self.peer_states.relayed,
            Durable: self._durable,
            Merged: self.rounds.merged,
            PublicationDelivered: self._delivered,
            PublicationFailed: self._delivery_failed,
            LearnerLost: self._departures.lost,
            CountersRead: self._counters,
            Finish: self._finish,
            Tick: lambda event, now_s: [],
        }
        self._messages: dict[type, Callable[..., list[SyncerAction]]] = {
            Progress: self._progress,
            Heartbeat: self._heartbeat,
            Busy: lambda member, m, now_s: self._end_pull(member, m, now_s),
            Adopted: self._adopted,
            NeedFull: self._need_full,
            Paused: self._paused,
            StopRequest: self._stop_request,
            LeaseRequest: self._leasing.requested,
            Leave: self._leave,
            BatchChosen: self._target.chosen,
            PeerStateRequest: self.peer_states.requested,
        }

    def handle(self, event: SyncerEvent, now_s: float) -> list[SyncerAction]:
        """Take one event; returns the actions that follow from it, in the order in which they must be performed.

        Args:
            event: what happened.
            now_s: monotonic time in seconds; never falls.
        """
        if self.job.is_ended:
            return []
        self._now_s = now_s
        if self.recovery is not None:
            self.recovery.begin(now_s)
        member = self.job.members.of(getattr(event, "session", ""))
        if member is not None and not isinstance(event, PublicationFailed):
            # Whatever comes from a process shows that it lives; what the transport gave up on does not.
            member.last_heard_s = now_s
        actions = self._handlers[type(event)](event, now_s) + self._departures.expire(now_s)
        if self.recovery is not None and self.recovery.is_running:
            return actions + self.recovery.progress(now_s)
        if self.job.is_founded:
            actions += self.rounds.tick(now_s)
            actions += self.rounds.open_due(now_s)
            actions += self._departures.complete(now_s)
            actions += self.peer_states.progress(now_s)
        return actions

    def next_deadline_s(self) -> float | None:
        """The time at which a `Tick` has something to do, if nothing happens before.

        Silence is judged at whatever comes next, so a runtime ticks about once a second in any case.
        """
        if self.recovery is not None and self.recovery.is_running:
            return self.recovery.next_deadline_s()
        if not self.job.is_founded:
            return None
        times = (self._departures.next_deadline_s(self._now_s), self.rounds.next_deadline_s(self._now_s))
        return min((t for t in times if t is not None), default=None)

    # ---- messages -----------------------------------------------------------------------------------------------------------

    def _message(self, event: MessageReceived, now_s: float) -> list[SyncerAction]:
        message, session = event.message, event.session
        is_recovering = self.recovery is not None and self.recovery.is_running
        if isinstance(message, Hello) and self.recovery is not None:
            return self.recovery.hello(event, message, now_s)
        if isinstance(message, Hello):
            return self._admission.hello(session, event.envelope, message, now_s)
        member = self.job.members.of(session)
        if isinstance(message, Ping):
            num_gaps = member.num_gaps if member is not None and member.incarnation == event.envelope.incarnation else 0
            pong = Pong(number=message.number, num_gaps=num_gaps, target_step_s=self._target.target_s)
            return [Reply(session=session, message=pong)]
        if member is None or event.envelope.incarnation != member.incarnation:
            # A leave that was completed is told so again: the answer may have been lost.
            return [*self._leasing.late(event), self._admission.farewell(session) or Reply(session=session, message=WhoAreYou())]
        if is_recovering or event.envelope.epoch < self.job.epoch:
            return self._of_old_epoch(member, message, now_s)
        if isinstance(message, Found):
            return self._admission.found(session, message, now_s)
        actions: list[SyncerAction] = []
        if isinstance(message, (Ready, Progress)):
            # Only a learner that has joined counts steps: a lost `Ready` is made up for by the next report.
            actions += self._admission.ready(session, now_s)
        handler = self._messages.get(type(message))
        may_speak = member.stage == "joined" or (member.stage == "receiving" and isinstance(message, NeedFull))
        if isinstance(message, Leave) and not may_speak:
            return self._departures.leave_early(member, message, now_s)
        if handler is None or not may_speak:
            return actions
        fault = fault_of(self.job, message)
        return actions + (self._close_session(member, "wrong_layout", fault, now_s) if fault else handler(member, message, now_s))

    def _of_old_epoch(self, member: Member, message: FromLearner, now_s: float) -> list[SyncerAction]:
        """Of one that does not know yet that this syncer has started again reports count, and nothing else; it is asked who it is."""
        actions: list[SyncerAction] = []
        if member.stage == "joined" and isinstance(message, Progress | Heartbeat) and not fault_of(self.job, message):
            actions += self._progress(member, message, now_s) if isinstance(message, Progress) else self._report(member, message, now_s)
        if member.stage == "joined" and isinstance(message, Heartbeat | Paused):
            member.is_paused = message.is_paused
        if self.recovery is not None and isinstance(message, NotHeld):
            return self.recovery.not_held(member.session, message.fragment_id)
        if self.recovery is None or not self.recovery.is_running or not self.recovery.knows(member.session):
            actions.append(Reply(session=member.session, message=WhoAreYou()))
        return actions

    def _contribution(self, event: ContributionArrived, now_s: float) -> list[SyncerAction]:
        member = self.job.members.of(event.session)
        if self.recovery is not None and self.recovery.is_running:
            learner_id = member.learner_id if member is not None else 0
            return [DropPayload(key=ContributionKey(learner_id, event.header.fragment_id, event.header.seq))]
        fault = fault_of(self.job, event.header) if member is not None and member.stage == "joined" else ""
        if member is None or not fault:
            return self._contributions.arrived(event, now_s)
        key = ContributionKey(member.learner_id, event.header.fragment_id, event.header.seq)
        return [DropPayload(key=key), *self._close_session(member, "wrong_layout", fault, now_s)]

    def _progress(self, member: Member, message: Progress, now_s: float) -> list[SyncerAction]:
        member.advance(message.inner_step, message.tokens, now_s)
        self.job.ledger.trained(member.learner_id, member.tokens)
        return self._check_budget()

    def _heartbeat(self, member: Member, message: Heartbeat, now_s: float) -> list[SyncerAction]:
        actions = self._report(member, message, now_s)
        for fragment_id, n in enumerate(message.versions[: self.job.num_fragments]):
            current = self.job.currents[fragment_id]
            if n != current.version.n:
                actions += self.job.publisher.reported(member, fragment_id, Version(self.job.epoch, n), current)
        on_way = 0
        for item in message.unresolved:
            known = self.job.decisions.get((member.learner_id, item.fragment_id), {}).get(item.seq)
            if known is None:
                on_way += 1
                continue
            answer = Resolved(fragment_id=item.fragment_id, seq=item.seq, outcome=known.outcome, reason=known.reason)
            actions.append(Reply(session=member.session, message=answer, incarnation=member.incarnation))
        if on_way == 0:
            member.answered()
        if not self._departures.is_leaving(member):
            if message.is_paused != member.is_paused:
                actions += self._paused(member, Paused(is_paused=message.is_paused), now_s)
            if self.job.stop_reason is not None:
                actions.append(Reply(session=member.session, message=Stop(reason=self.job.stop_reason), incarnation=member.incarnation))
        return actions + self._check_budget()

    def _report(self, member: Member, message: Heartbeat, now_s: float) -> list[SyncerAction]:
        member.advance(message.inner_step, message.tokens, now_s)
        member.batch_size = message.batch_size or member.batch_size
        self.job.ledger.trained(member.learner_id, member.tokens)
        # Tokens that came without a step are nobody's; the tape and the ledger must tell the same.
        tokens = min(message.tokens, member.tokens)
        member.taped_tokens = max(member.taped_tokens, tokens)
        self._leasing.reported(member, message)
        # A report tells again what its learner does not know to be on the tape.
        untold = slice(max(0, member.num_gaps - message.first_gap), None)
        first_gap = max(member.num_gaps, message.first_gap)
        member.num_gaps = max(member.num_gaps, message.first_gap + len(message.step_gaps_s))
        record = ProgressRecord(
            learner_id=member.learner_id,
            incarnation=member.incarnation,
            inner_steps=message.inner_step,
            tokens=tokens,
            first_gap=first_gap,
            step_gaps_s=message.step_gaps_s[untold],
            paused_s=message.paused_s[untold],
            stalls_s=message.stalls_s[untold],
            last_step_age_s=message.last_step_age_s + member.delay_s(message.clock_s, now_s),
            is_paused=message.is_paused,
            batch_size=member.batch_size,
            samples=message.samples,
            again=message.again,
        )
        self._target.told(member.learner_id, record, self.job.members.active(now_s), now_s)
        actions: list[SyncerAction] = [Tape(record=record)]
        for item in message.discarded:
            new = self.job.ledger.report_discarded(member.learner_id, item)
            if new > 0:
                discard = DiscardRecord(
                    learner_id=member.learner_id,
                    fragment_id=item.fragment_id,
                    reason=item.reason,
                    tokens=new,
                    incarnation=member.incarnation,
                )
                actions.append(Tape(record=discard))
        return actions

    def _end_pull(self, member: Member, message: Busy, now_s: float) -> list[SyncerAction]:
        member.answered()
        return self.rounds.end_pull(member.learner_id, message.fragment_id, message.round_id, now_s)

    def _adopted(self, member: Member, message: Adopted, now_s: float) -> list[SyncerAction]:
        current = self.job.currents[message.fragment_id]
        if message.version != current.version:
            return []
        return [] if message.crc == current.crc else self.job.publisher.needs_full(member, message.fragment_id, current)

    def _need_full(self, member: Member, message: NeedFull, now_s: float) -> list[SyncerAction]:
        return self.job.publisher.needs_full(member, message.fragment_id, self.job.currents[message.fragment_id])

    def _paused(self, member: Member, message: Paused, now_s: float) -> list[SyncerAction]:
        member.is_paused = message.is_paused
        if not message.is_paused:
            # The pause is not a step time, and the counter gets its full patience again.
            member.last_advance_s = now_s
            return []
        actions: list[SyncerAction] = []
        for round_ in self.rounds.all:
            if round_.is_collecting:
                actions += self.rounds.end_pull(member.learner_id, round_.fragment_id, None, now_s)
        return actions

    def _stop_request(self, member: Member, message: StopRequest, now_s: float) -> list[SyncerAction]:
        return self._stop(message.reason) if member.learner_id == self.job.options.founder_id else []

    def _stop(self, reason: str) -> list[SyncerAction]:
        if self.job.stop_reason is not None:
            return []
        self.job.stop_reason = reason
        return [Reply(session=m.session, message=Stop(reason=reason), incarnation=m.incarnation) for m in self.job.members.joined()]

    def _check_budget(self) -> list[SyncerAction]:
        budget = self.job.config.token_budget
        if budget is None or sum(self.job.ledger.tokens(m) for m in self.job.ledger.learners()) < budget:
            return []
        return self._stop("token_budget")

    def _leave(self, member: Member, message: Leave, now_s: float) -> list[SyncerAction]:
        if self._departures.is_leaving(member):
            return []
        return self._report(member, message.report, now_s) + self._departures.leave(member, message, now_s)

    def _counters(self, event: CountersRead, now_s: float) -> list[SyncerAction]:
        member = self.job.members.by_id(event.learner_id)
        if member is None or member.incarnation != event.incarnation or member.stage != "joined":
            return []
        has_more_samples = self._leasing.read(event)
        if event.tokens <= member.taped_tokens and not has_more_samples:
            return []
        member.tokens, member.inner_step = max(member.tokens, event.tokens), max(member.inner_step, event.inner_steps)
        member.taped_tokens = max(member.taped_tokens, event.tokens)
        self.job.ledger.trained(event.learner_id, event.tokens)
        record = CountersRecord(
            learner_id=event.learner_id,
            incarnation=event.incarnation,
            inner_steps=event.inner_steps,
            tokens=event.tokens,
            samples=event.samples if self.job.leases is not None else None,
        )
        return [Tape(record=record)]

    def _durable(self, event: Durable, now_s: float) -> list[SyncerAction]:
        if self.recovery is not None and self.recovery.is_running:
            return self.recovery.durable(event, now_s)
        return self._departures.durable(event, now_s)

    def _finish(self, event: Finish, now_s: float) -> list[SyncerAction]:
        if self.recovery is not None and self.recovery.is_running:
            return self.recovery.finish_later(lambda at_s: self._departures.finish(event, at_s))
        return self._departures.finish(event, now_s)

    # ---- payloads -----------------------------------------------------------------------------------------------------------

    def _delivered(self, event: PublicationDelivered, now_s: float) -> list[SyncerAction]:
        member = self.job.members.of(event.session)
        if member is None:
            return []
        member.answered()
        self.rounds.delivered(event.fragment_id, event.version, now_s)
        actions = self.job.publisher.delivered(member, event.fragment_id, self.job.currents[event.fragment_id], event.version)
        return actions + (self._admission.ready(event.session, now_s) if member.is_ready else [])

    def _delivery_failed(self, event: PublicationFailed, now_s: float) -> list[SyncerAction]:
        member = self.job.members.of(event.session)
        if member is None:
            return []
        return self.job.publisher.failed(member, event.fragment_id, self.job.currents[event.fragment_id], event.version)

    def _payload_failed(self, event: PayloadFailed, now_s: float) -> list[SyncerAction]:
        member = self.job.members.of(event.session)
        if member is None:
            return [CloseSession(session=event.session)]
        return self._close_session(member, event.reason, "A payload broke the rules of the wire; the session is closed.", now_s)

    def _close_session(self, member: Member, reason: str, detail: str, now_s: float) -> list[SyncerAction]:
        refused = Reply(session=member.session, message=JoinRefused(reason=reason, detail=detail), incarnation=member.incarnation)
        self._departures.forget(member.session)
        return [refused, *self._admission.end(member, "died", now_s)]
