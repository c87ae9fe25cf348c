"""Data leases, the syncer's part: requests of learners into grants, and what is told of samples into the ledger.

A request has a number, one more for each of a life; the syncer answers each once, and a copy gets the same answer. What a learner has
trained comes as a running total with every report. So no message that is lost, doubled or late changes what is handed out.

A syncer that has started again knows what its tape knows. A learner tells it the grants that it has received last (`known`); those that
the tape has lost are put down as they were. It does so once: what it shows later is not taken.

Where no supervisor says who is dead, silence must: when nothing is free, what learners hold that were not heard for ten heartbeats (10 s at
least) is taken back for the one that asks. They stay members, and what they say later of these samples counts.

A life that holds more than any learner has use for is not answered until it has reported more as trained: one that asks without end takes
neither the epoch from the others nor memory from the syncer.
"""

from __future__ import annotations

from lightning_diloco.protocol.actions import Reply, SyncerAction, Tape
from lightning_diloco.protocol.events import CountersRead, MessageReceived
from lightning_diloco.protocol.identity import DataSpec
from lightning_diloco.protocol.job import Job
from lightning_diloco.protocol.leases import LeaseLedger, Life
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.messages import Heartbeat, LeaseGrant, LeaseRequest, Leave
from lightning_diloco.protocol.records import LeaseBackRecord, LeaseLateRecord, LeaseRecord

__all__ = ["Leasing", "data_difference"]


class Leasing:
    """Hands out sample ranges.

    Args:
        job: its state.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def requested(self, member: Member, message: LeaseRequest, now_s: float) -> list[SyncerAction]:
        """A learner asks for ranges; nothing is given to one that leaves."""
        ledger, actions = self._job.leases, list[SyncerAction]()
        if ledger is None or member.is_leaving:
            return []
        life = ledger.life(member.learner_id, member.incarnation)
        if message.known and self._job.epoch > 0 and not life.has_told:
            life.has_told = True
            actions += self._told(ledger, life, message)
        if message.number < life.number:
            return actions
        if message.number > life.number and message.wanted and ledger.has_enough(life, message.samples, message.batch_size):
            return actions
        if message.number > life.number:
            is_news = message.samples > life.claimed
            ledger.trained(member.learner_id, member.incarnation, message.samples)
            if message.wanted and not ledger.has_free(message.until):
                actions += self._take_back(ledger, now_s)
            ledger.grant(life, message.number, wanted=message.wanted, batch_size=message.batch_size, until=message.until)
            life.was_over = message.wanted > 0 and not life.last
            actions += self._tape(life) if life.last or is_news else []
        answer = LeaseGrant(number=message.number, ranges=life.last, is_over=life.was_over)
        return [*actions, Reply(session=member.session, message=answer, incarnation=member.incarnation)]

    def _take_back(self, ledger: LeaseLedger, now_s: float) -> list[SyncerAction]:
        """What silent learners hold is free again, where nobody else says that they are dead."""
        job = self._job
        silent = [m for m in job.members.joined() if not job.options.is_supervised and m.unheard_s(now_s) > job.silent_after_s]
        taken = [m for m in silent if ledger.reclaim(m.learner_id, m.incarnation)]
        return [Tape(record=LeaseBackRecord(learner_id=m.learner_id, incarnation=m.incarnation)) for m in taken]

    def _told(self, ledger: LeaseLedger, life: Life, message: LeaseRequest) -> list[SyncerAction]:
        """Grants that a syncer before this one gave, and that the tape has lost."""
        actions: list[SyncerAction] = []
        for grant in message.known:
            is_new = life.number < grant.number < message.number and not ledger.has_enough(life, message.samples, message.batch_size)
            if is_new and ledger.is_possible(grant.ranges):
                ledger.take(life, grant.number, grant.ranges, grant.before)
                actions += self._tape(life, is_told=True)
        return actions

    def _tape(self, life: Life, *, is_told: bool = False) -> list[SyncerAction]:
        record = LeaseRecord(
            learner_id=life.learner_id,
            incarnation=life.incarnation,
            number=life.number,
            ranges=life.last,
            samples=life.claimed,
            before=life.granted - sum(r.stop - r.start for r in life.last),
            is_told=is_told,
        )
        return [Tape(record=record)]

    def reported(self, member: Member, report: Heartbeat) -> None:
        """A learner's totals."""
        if self._job.leases is not None:
            self._job.leases.trained(member.learner_id, member.incarnation, report.samples, report.again)

    def read(self, event: CountersRead) -> bool:
        """Totals of a process that is gone; returns whether they tell what was not known."""
        ledger = self._job.leases
        if ledger is None:
            return False
        is_news = ledger.life(event.learner_id, event.incarnation).counted != event.samples
        ledger.counted(event.learner_id, event.incarnation, event.samples)
        return is_news

    def late(self, event: MessageReceived) -> list[SyncerAction]:
        """A word of a process whose life was ended: what it has trained meanwhile is known now, and changes nothing else."""
        ledger, message = self._job.leases, event.message
        report = message.report if isinstance(message, Leave) else message
        if ledger is None or not isinstance(report, Heartbeat | LeaseRequest):
            return []
        life = ledger.late_life(event.session)
        if life is None or life.incarnation != event.envelope.incarnation or not ledger.late(event.session, report.samples):
            return []
        record = LeaseLateRecord(learner_id=life.learner_id, incarnation=life.incarnation, session=event.session, samples=report.samples)
        return [Tape(record=record)]


def data_difference(ours: DataSpec | None, theirs: DataSpec | None) -> str | None:
    """Why a learner with other data may not join, in a sentence, or None. The seed is the founder's for all."""
    if ours is None or theirs is None:
        if ours is theirs:
            return None
        name, job = ("lease" if spec is not None else "shard" for spec in (theirs, ours))
        return f"data={name!r} differs from the job's {job!r}. All learners of a job share its data in one way: use the same value."
    if ours.num_samples != theirs.num_samples:
        return (
            f"The data set has {theirs.num_samples} samples and the job's has {ours.num_samples}. With data='lease' all learners read "
            "the same data set: give this one the same."
        )
    if ours.is_shuffled != theirs.is_shuffled:
        return (
            f"shuffle={theirs.is_shuffled} of the DataLoader differs from the job's {ours.is_shuffled}. With data='lease' all learners "
            "share one order of the samples: use the same value."
        )
    return None
