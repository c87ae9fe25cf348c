"""How a syncer goes on with a job that it finds (PROTOCOL.md section 8).

    stage         what happens                                                                   it ends when
    collecting    members of the tape say hello and show which versions they hold                all have, or `COLLECT_S` is over
    recalling     of each fragment the highest version is fetched, if a learner has a higher     all are here
                  one than the snapshot (`recalling`)
    writing       every fragment has become (new epoch, n) with unchanged bytes; this is made    the snapshot is durable
                  durable
    done          the restart is on the tape; members are welcomed back, newcomers let in

Nothing is merged and nothing published before `done`, so whatever a learner holds of the new epoch outlives another crash. What the old
syncer held is lost here: live learners keep that work and send it again, that of ended lives is discarded (`rollback`). A job is never
founded twice: a fragment that nobody has, neither snapshot nor learner, is waited for.

Invariants: the epoch grows; the version chosen is the highest that anybody showed and could give; the ledger's identity holds on the tape
at every line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_diloco.config import SyncConfig
from lightning_diloco.protocol.actions import CloseSession, Ended, MakeDurable, Reply, SyncerAction, Tape
from lightning_diloco.protocol.admission import Admission
from lightning_diloco.protocol.events import Durable, HeldArrived, HeldMoves, MessageReceived
from lightning_diloco.protocol.history import History, Life
from lightning_diloco.protocol.identity import MergedThrough, Origin, Version
from lightning_diloco.protocol.job import Job
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.messages import HeldFragment, Hello, JoinRefused
from lightning_diloco.protocol.publisher import Current
from lightning_diloco.protocol.recalling import Recalling
from lightning_diloco.protocol.records import CountersRecord, DiscardRecord, JoinRecord, LeaveRecord, RestartRecord
from lightning_diloco.protocol.rounds import Rounds

__all__ = ["Recovery", "Resumption", "Stage"]

Stage = Literal["collecting", "recalling", "writing", "done"]

COLLECT_S = 5.0
"""Members that live have said hello again by then: their transport reconnects within a second, and they speak at every step."""
MAX_NUMBER = 2**53
"""No version's number and no total of tokens gets above this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """A job as its run directory tells it.

    Args:
        history: the whole tape.
        config: the founder's.
        fingerprint: of the layout.
        static_crc: of the static state.
        static_bytes: its length.
        currents: per fragment what the snapshot holds; None: it holds nothing.
        origins: per fragment what that was, if the restart that made it did not come onto the tape; None otherwise. Empty: all None.
    """

    history: History
    config: SyncConfig
    fingerprint: str
    static_crc: int
    static_bytes: int
    currents: tuple[Current | None, ...]
    origins: tuple[Origin | None, ...] = ()


class Recovery:
    """From the start of a syncer to the moment at which it serves.

    Args:
        job: empty; becomes the job of `resumption`.
        rounds: of all fragments.
        admission: the door.
        resumption: what is known.
    """

    def __init__(self, job: Job, rounds: Rounds, admission: Admission, resumption: Resumption) -> None:
        self._job, self._rounds, self._admission = job, rounds, admission
        self._history = resumption.history
        self.stage: Stage = "collecting"
        self._deadline_s = 0.0
        self._has_begun = False
        self.recalls = Recalling(job, resumption.currents)
        self._recalled: set[int] = set()
        self._closed: set[int] = set()
        self._finish: Callable[[float], list[SyncerAction]] | None = None
        self._in_snapshot = list(resumption.currents)
        self._untold = resumption.origins or (None,) * len(resumption.currents)
        self._origins: tuple[Origin, ...] = ()
        self._restore(resumption)

    @property
    def is_running(self) -> bool:
        """Whether the syncer does not serve yet."""
        return self.stage != "done"

    def expects(self, session: str, fragment_id: int, version: Version | None = None) -> bool:
        """Whether this fragment was asked for of this session, at this version (None: at any), and has not come."""
        return self.is_running and self.recalls.expects(session, fragment_id, version)

    def is_sound(self, header: HeldFragment) -> bool:
        """Whether what is said to be in a version can be."""
        job = self._job
        return all(m < job.num_ids and x.seq <= MAX_NUMBER and x.tokens <= MAX_NUMBER for m, x in header.merged_through.items())

    def knows(self, session: str) -> bool:
        """Whether this process has said hello since the restart, or is in line."""
        member = self._job.members.of(session)
        return session in self.recalls.hellos or (member is not None and member.stage != "joined")

    def _restore(self, known: Resumption) -> None:
        job, history = self._job, self._history
        unknown = Current(version=Version(0, 0), parent=None, crc=0, merged_through={}, difference_bytes=0, full_bytes=0)
        job.restore(
            config=known.config,
            fingerprint=known.fingerprint,
            fragments=history.fragments,
            currents=[unknown if c is None else c for c in known.currents],
            ledger=history.ledger,
            last_seq=history.last_seq,
        )
        job.static_crc, job.static_bytes, job.leases = known.static_crc, known.static_bytes, history.leases
        self._rounds.start(history.round_ids)
        for learner_id, incarnation in history.next_incarnation.items():
            job.members.seen(learner_id, incarnation)
        for life in history.lives.values():
            member = Member(life.learner_id, life.incarnation, life.session, "joined", life.device, life.batch_size, life.tokens_per_step)
            member.life, member.joined_at_step = life.life, life.joined_at_step
            member.inner_step, member.tokens, member.taped_tokens = life.inner_steps, life.tokens, life.tokens
            member.num_gaps = life.num_gaps
            # Not asked for anything before it has stepped and spoken again.
            member.fall_silent()
            job.members.restore(member, life.incarnation + 1)
        job.members.restore_ended(history.ended)
        job.members.set_job_step(history.job_step())
        job.stop_reason = "stopped" if history.is_stopped else None

    def begin(self, now_s: float) -> None:
        """The clock runs from the first event: silence of members counts from here."""
        if self._has_begun:
            return
        self._has_begun, self._deadline_s = True, now_s + COLLECT_S
        for member in self._job.members.present():
            member.last_heard_s = now_s

    # ---- collecting ---------------------------------------------------------------------------------------------------------

    def hello(self, event: MessageReceived, hello: Hello, now_s: float) -> list[SyncerAction]:
        """A process that holds this job's versions is noted, or let in if it comes late; any other one waits in line."""
        is_known = self._job.members.of(event.session) is not None
        if not hello.lineage or (not self.is_running and is_known):
            return self._admission.hello(event.session, event.envelope, hello, now_s)
        refusal = self._admission.refuse(event.session, event.envelope, hello)
        if refusal:
            return refusal
        if not self._is_possible(hello):
            detail = "It shows versions or totals that no learner of this job can have. Start a fresh learner."
            refused = JoinRefused(reason="lineage", detail=detail)
            return [Reply(session=event.session, message=refused), CloseSession(session=event.session)]
        actions: list[SyncerAction] = []
        member = self._job.members.of(event.session)
        if member is None:
            member = self._find_unknown(event, hello)
            if member is None:
                return [self._admission.fence(event.session)]
            actions.append(self._admission.join_record(member))
        member.last_heard_s = now_s
        member.advance(hello.inner_step, hello.tokens, now_s)
        self._job.ledger.trained(member.learner_id, member.tokens)
        if not self.is_running:
            return actions + self._admission.resume(member, hello, now_s)
        if len(hello.versions) == self._job.num_fragments:
            self.recalls.returned(event.session, hello, now_s)
        return actions

    def _is_possible(self, hello: Hello) -> bool:
        totals = (hello.tokens, hello.inner_step, hello.joined_at_step)
        return all(v.epoch < self._job.epoch and v.n <= MAX_NUMBER for v in hello.versions) and max(totals) <= MAX_NUMBER

    def _find_unknown(self, event: MessageReceived, hello: Hello) -> Member | None:
        """A member whose join did not reach the disk; None if its place belongs to another life."""
        job, learner_id, incarnation = self._job, hello.learner_id, event.envelope.incarnation
        if learner_id is None or learner_id >= job.num_ids or self._admission.farewell(event.session) is not None:
            return None
        if learner_id in self._closed:
            return None  # what is merged of it was put down as an ended life's, and would count twice
        if job.members.by_id(learner_id) is not None or incarnation < job.members.next_incarnation(learner_id):
            return None
        member = Member(learner_id, incarnation, event.session, "joined", hello.device, hello.batch_size, hello.tokens_per_step)
        member.life, member.joined_at_step = hello.life, hello.joined_at_step
        job.members.restore(member, incarnation + 1)
        self._history.lives[learner_id] = Life(
            learner_id=learner_id,
            incarnation=incarnation,
            session=event.session,
            life=hello.life,
            joined_at_step=hello.joined_at_step,
        )
        return member

    def progress(self, now_s: float) -> list[SyncerAction]:
        """Go on as far as it goes."""
        actions: list[SyncerAction] = []
        if self._finish is not None and self.recalls.missing:
            # Nobody will come who could show them: there is no model to end with.
            self._job.is_ended = True
            return [Ended(status="failed", versions=())]
        if self.stage == "collecting" and self._has_collected(now_s):
            self.stage = "recalling"
        if self.stage == "recalling":
            actions += self.recalls.tick(now_s)
            if not self.recalls.open:
                self.stage = "writing"
                return [*actions, *self._begin_epoch()]
        return actions

    def finish_later(self, finish: Callable[[float], list[SyncerAction]]) -> list[SyncerAction]:
        """The job shall end: when its newest model has been found, with all that learners hold of it."""
        self._finish = finish
        return []

    def next_deadline_s(self) -> float | None:
        """When `progress` has something to do. While fragments are missing that is for a message to say, not for the time."""
        if self.stage == "collecting":
            return None if self.recalls.missing else self._deadline_s
        return self.recalls.next_deadline_s() if self.stage == "recalling" else None

    def _has_collected(self, now_s: float) -> bool:
        if self.recalls.missing:
            return False
        expected = [m for m in self._job.members.joined() if m.session not in self.recalls.hellos]
        return not expected or now_s >= self._deadline_s

    # ---- recalling ----------------------------------------------------------------------------------------------------------

    def not_held(self, session: str, fragment_id: int) -> list[SyncerAction]:
        """A learner cannot give what it was asked for."""
        if self.stage == "recalling" and self.expects(session, fragment_id):
            self.recalls.failed(session, fragment_id, "it cannot be given any more")
        return []

    def moves(self, event: HeldMoves, now_s: float) -> list[SyncerAction]:
        """Bytes of a version that was asked for have come."""
        self.recalls.moved(event.session, now_s)
        return []

    def arrived(self, event: HeldArrived, now_s: float) -> list[SyncerAction]:
        """A version that was asked for is stored, or is not what it should be."""
        header, job = event.header, self._job
        if self.stage != "recalling" or not self.expects(event.session, header.fragment_id, header.version):
            return []
        if not event.crc_ok or not self.is_sound(header):
            self.recalls.failed(event.session, header.fragment_id, "what came is not what it should be")
            return []
        info, wire_dtype = job.fragments[header.fragment_id], job.config.wire_dtype
        job.currents[header.fragment_id] = Current.alone(info, wire_dtype, header.version, header.crc, header.merged_through)
        self.recalls.arrived(event.session, header.fragment_id, now_s)
        self._recalled.add(header.fragment_id)
        return []

    # ---- serving ------------------------------------------------------------------------------------------------------------

    def _begin_epoch(self) -> list[SyncerAction]:
        self._origins = tuple(self._origin(p) for p in range(self._job.num_fragments))
        for current in self._job.currents:
            current.version, current.parent = Version(self._job.epoch, current.version.n), None
        return [MakeDurable(origins=self._origins)]

    def _origin(self, fragment_id: int) -> Origin:
        """In terms of versions that a line of the tape makes, also if a syncer was killed between its snapshot and its line."""
        snapshot, untold, version = self._in_snapshot[fragment_id], self._untold[fragment_id], self._job.currents[fragment_id].version
        momentum = untold.momentum if untold is not None else None if snapshot is None else snapshot.version
        if fragment_id in self._recalled:
            return Origin(version=version, momentum=momentum, is_recalled=True)
        return untold or Origin(version=version, momentum=momentum)

    def durable(self, event: Durable, now_s: float) -> list[SyncerAction]:
        """The new epoch is on the disk: write the restart down and serve."""
        if self.stage != "writing":
            return []
        job, self.stage = self._job, "done"
        job.is_recovering = False
        versions, through = tuple(c.version for c in job.currents), tuple(dict(c.merged_through) for c in job.currents)
        record = RestartRecord(
            epoch=job.epoch,
            versions=versions,
            merged_through=through,
            recalled=tuple(p for p, origin in enumerate(self._origins) if origin.is_recalled),
            origins=tuple(origin.version for origin in self._origins),
            momenta=tuple(origin.momentum for origin in self._origins),
        )
        for fragment_id, merged in enumerate(through):
            for learner_id, item in merged.items():
                # A full disk may have kept it off the tape; a later life must not use the number again.
                key = (learner_id, fragment_id)
                job.last_seq[key] = max(item.seq, job.last_seq.get(key, 0))
        actions: list[SyncerAction] = [Tape(record=record), *self._close_accounts(versions, through)]
        for session, hello in self.recalls.hellos.items():
            member = job.members.of(session)
            if member is not None:
                actions += self._admission.resume(member, hello, now_s)
        actions += self._admission.let_in(now_s)
        return actions + (self._finish(now_s) if self._finish is not None else [])

    def _close_accounts(self, versions: tuple[Version, ...], through: tuple[dict[int, MergedThrough], ...]) -> list[SyncerAction]:
        """What ended lives had handed over and what is in no version any more is lost; what they had not handed over died with them."""
        job, history, actions = self._job, self._history, list[SyncerAction]()
        for learner_id, life in list(history.lives.items()):
            member = job.members.by_id(learner_id)
            if member is None or member.incarnation != life.incarnation:
                del history.lives[learner_id]
        lost = history.lost(versions)
        history.restart(versions, through)
        for learner_id, fragment_id, tokens in lost:
            job.ledger.discard(learner_id, fragment_id, "rollback", tokens, is_reported=False)
            actions.append(Tape(record=DiscardRecord(learner_id=learner_id, fragment_id=fragment_id, reason="rollback", tokens=tokens)))
        for learner_id in job.ledger.learners():
            actions += self._complete_total(learner_id)
            if job.members.by_id(learner_id) is None:
                for fragment_id, tokens in job.ledger.end_incarnation(learner_id):
                    died = DiscardRecord(learner_id=learner_id, fragment_id=fragment_id, reason="died", tokens=tokens)
                    actions.append(Tape(record=died))
        return actions

    def _complete_total(self, learner_id: int) -> list[SyncerAction]:
        """A version may hold more of a learner than the tape knows, if the machine itself went down with unwritten lines."""
        job = self._job
        lacking = -min((job.ledger.pending(learner_id, p) for p in range(job.num_fragments)), default=0)
        if lacking <= 0:
            return []
        member, tokens = job.members.by_id(learner_id), job.ledger.current(learner_id) + lacking
        job.ledger.trained(learner_id, tokens)
        if member is not None:
            told = CountersRecord(learner_id=learner_id, incarnation=member.incarnation, inner_steps=member.inner_step, tokens=tokens)
            return [Tape(record=told)]
        # Of an ended life: a life of its own on the tape, or nobody who reads it would know whose tokens these are.
        incarnation = job.members.next_incarnation(learner_id)
        job.members.seen(learner_id, incarnation + 1)
        self._closed.add(learner_id)
        joined = JoinRecord(learner_id=learner_id, incarnation=incarnation, role="earlier")
        counters = CountersRecord(learner_id=learner_id, incarnation=incarnation, inner_steps=0, tokens=lacking)
        left = LeaveRecord(learner_id=learner_id, incarnation=incarnation, reason="died")
        return [Tape(record=joined), Tape(record=counters), Tape(record=left)]
