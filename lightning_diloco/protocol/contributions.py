"""What becomes of a contribution: folded, carried, acknowledged again, or refused (PROTOCOL.md sections 4, 6, 7).

The checks in their order: whose life (`stale_incarnation`), which history (`stale_epoch`), which bytes (`bad_checksum`), a copy of a known
seq (the same answer again, or `conflict`), another one of this learner held or a base without what was merged (`overlap`), and
only then the values (`nonfinite`, `norm`). Every refusal names the seq, is counted and on the tape, and changes nothing else.
"""

from __future__ import annotations

from lightning_diloco.protocol.actions import DropPayload, Fold, Reply, SyncerAction, Tape
from lightning_diloco.protocol.admission import Admission
from lightning_diloco.protocol.events import ContributionArrived
from lightning_diloco.protocol.identity import ContributionKey, Refusal
from lightning_diloco.protocol.job import Decision, Held, Job
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.messages import Contribution, Resolved, WhoAreYou
from lightning_diloco.protocol.records import ContributionRecord, Outcome
from lightning_diloco.protocol.rounds import Rounds

__all__ = ["Contributions", "contribution_weight"]


def contribution_weight(tokens: int, steps: int) -> float:
    """Weight of a contribution: quantity times quality, tokens * (tokens / steps).

    References:
        Decoupled DiLoCo, arXiv 2604.21428, algorithm 2.
    """
    return tokens * (tokens / steps)


class Contributions:
    """Decides on every contribution of a job exactly once."""

    def __init__(self, job: Job, rounds: Rounds, admission: Admission) -> None:
        self._job = job
        self._rounds = rounds
        self._admission = admission

    def arrived(self, event: ContributionArrived, now_s: float) -> list[SyncerAction]:
        """Decide on one complete payload."""
        job, header = self._job, event.header
        member = job.members.of(event.session)
        if member is None or member.stage != "joined":
            return self._stranger(event)
        key = ContributionKey(member.learner_id, header.fragment_id, header.seq)
        member.answered()
        if event.envelope.incarnation == member.incarnation:
            member.advance(header.inner_step, header.total_tokens, now_s)
            job.ledger.trained(member.learner_id, member.tokens)
        known = job.decisions.get((member.learner_id, header.fragment_id), {}).get(header.seq)
        if known is not None and known.crc == header.crc:
            return self._again(event, member, key, known, now_s)
        if known is None and header.base.epoch < job.epoch and header.seq <= job.merged_seq(member.learner_id, header.fragment_id):
            # The syncer before this one has merged it: the version of this epoch that its learner has not seen yet contains it.
            merged = Resolved(fragment_id=header.fragment_id, seq=header.seq, outcome="merged", reason=None)
            return [DropPayload(key=key), Reply(session=member.session, message=merged, incarnation=member.incarnation)]
        if header.after is not None and known is None and self._must_wait(member, header.fragment_id):
            later = Resolved(fragment_id=header.fragment_id, seq=header.seq, outcome="unknown", reason=None)
            return [DropPayload(key=key), Reply(session=member.session, message=later, incarnation=member.incarnation)]
        reason = self._refusal(event, member, known)
        if reason is not None:
            return self._refuse(event, member, key, reason, now_s)
        return self._accept(event, member, key, now_s)

    def _must_wait(self, member: Member, fragment_id: int) -> bool:
        """Whether the part of its work before this one came during a merge, which has to end first; the learner sends it again."""
        round_ = self._rounds.of(fragment_id)
        return round_.stage == "merging" and any(h.learner_id == member.learner_id for h in round_.held)

    def _refusal(self, event: ContributionArrived, member: Member, known: Decision | None) -> Refusal | None:
        job, header = self._job, event.header
        if event.envelope.incarnation != member.incarnation:
            return "stale_incarnation"
        if event.envelope.lineage != job.options.lineage or event.envelope.epoch != job.epoch or header.base.epoch != job.epoch:
            return "stale_epoch"
        if not event.crc_ok:
            return "bad_checksum"
        if known is not None or header.base > job.currents[header.fragment_id].version:
            return "conflict"
        if self._overlaps(header, member):
            return "overlap"
        # The values count in the gate's statistics whatever the verdict.
        admitted = job.gates[header.fragment_id].admits(event.norm, header.steps) if event.is_finite else False
        if not event.is_finite:
            return "nonfinite"
        return None if admitted else "norm"

    def _overlaps(self, header: Contribution, member: Member) -> bool:
        """Whether it holds work that is in the model, or held for it, already."""
        job, learner_id, fragment_id = self._job, member.learner_id, header.fragment_id
        round_ = self._rounds.of(fragment_id)
        held = sum(h.tokens for h in round_.held + round_.merging if h.learner_id == learner_id)
        if header.tokens > job.ledger.pending(learner_id, fragment_id) - held or header.steps > member.inner_step:
            return True
        last_seq = job.last_seq.get((learner_id, fragment_id), 0)
        if header.seq < last_seq:
            return True
        if header.after is not None:
            earlier = job.decisions.get((learner_id, fragment_id), {}).get(header.after)
            count = sum(h.learner_id == learner_id for h in round_.held + round_.merging)
            return not header.is_final or header.after != last_seq or earlier is None or earlier.outcome == "refused" or count > 1
        return round_.holds(learner_id) or header.base_merged_seq != job.merged_seq(learner_id, fragment_id)

    def _accept(self, event: ContributionArrived, member: Member, key: ContributionKey, now_s: float) -> list[SyncerAction]:
        job, header = self._job, event.header
        round_ = self._rounds.of(header.fragment_id)
        actions: list[SyncerAction] = []
        if header.after is not None and any(h.learner_id == member.learner_id for h in round_.held):
            # Two parts of one learner's work are added up, never averaged: the earlier one is merged before this one is folded in.
            actions += self._rounds.force(round_, now_s)
        outcome: Outcome = "folded" if round_.is_collecting else "carried"
        weight = contribution_weight(header.tokens, header.steps)
        held = Held(
            learner_id=member.learner_id,
            incarnation=member.incarnation,
            seq=header.seq,
            steps=header.steps,
            tokens=header.tokens,
            weight=weight,
        )
        round_.held.append(held)
        job.ledger.hold(member.learner_id, header.fragment_id, header.tokens)
        job.decide(member.learner_id, header.fragment_id, header.seq, Decision(crc=header.crc, outcome="held"))
        member.snapshot_step[header.fragment_id] = header.inner_step
        actions += [Fold(key=key, weight=weight), self._tape(event, member, weight, outcome, None)]
        actions.append(self._answer(member, header, "held", None))
        # A late answer to the previous round is in this one: nothing more will come of this learner while it is held.
        return actions + self._rounds.end_pull(member.learner_id, header.fragment_id, None, now_s)

    def _again(self, event: ContributionArrived, member: Member, key: ContributionKey, known: Decision, now_s: float) -> list[SyncerAction]:
        """A copy of a known contribution: the same answer, and nothing else."""
        header = event.header
        answer = Resolved(fragment_id=header.fragment_id, seq=header.seq, outcome=known.outcome, reason=known.reason)
        actions: list[SyncerAction] = [DropPayload(key=key), self._tape(event, member, 0.0, "duplicate", None)]
        actions.append(Reply(session=member.session, message=answer, incarnation=member.incarnation))
        return actions + self._rounds.end_pull(member.learner_id, header.fragment_id, header.round_id, now_s)

    def _refuse(
        self, event: ContributionArrived, member: Member, key: ContributionKey, reason: Refusal, now_s: float
    ) -> list[SyncerAction]:
        header = event.header
        actions: list[SyncerAction] = [DropPayload(key=key), self._tape(event, member, 0.0, "refused", reason)]
        if reason == "stale_incarnation":
            return actions
        if reason != "conflict":
            self._job.decide(member.learner_id, header.fragment_id, header.seq, Decision(crc=header.crc, outcome="refused", reason=reason))
        actions.append(self._answer(member, header, "refused", reason))
        return actions + self._rounds.end_pull(member.learner_id, header.fragment_id, header.round_id, now_s)

    def _stranger(self, event: ContributionArrived) -> list[SyncerAction]:
        """No member: an ended life is told so, anyone else is asked who it is; nothing changes."""
        key = ContributionKey(0, event.header.fragment_id, event.header.seq)
        if self._job.finish_status is not None and self._job.members.end_of(event.session) == "died":
            # Ended with the job, by whoever stops the syncer: it is told nothing, and goes on as without a syncer.
            return [DropPayload(key=key)]
        farewell = self._admission.farewell(event.session)
        return [DropPayload(key=key), farewell or Reply(session=event.session, message=WhoAreYou())]

    def _answer(self, member: Member, header: Contribution, outcome: str, reason: Refusal | None) -> Reply:
        message = Resolved(fragment_id=header.fragment_id, seq=header.seq, outcome=outcome, reason=reason)  # type: ignore[arg-type]
        return Reply(session=member.session, message=message, incarnation=member.incarnation)

    def _tape(self, event: ContributionArrived, member: Member, weight: float, outcome: Outcome, reason: Refusal | None) -> Tape:
        header = event.header
        record = ContributionRecord(
            learner_id=member.learner_id,
            incarnation=event.envelope.incarnation,
            fragment_id=header.fragment_id,
            seq=header.seq,
            base=header.base,
            steps=header.steps,
            tokens=header.tokens,
            weight=weight,
            norm=event.norm if event.is_finite else -1.0,
            payload_bytes=event.payload_bytes,
            outcome=outcome,
            reason=reason,
            is_final=header.is_final,
            payload_at=event.payload_at,
        )
        return Tape(record=record)
