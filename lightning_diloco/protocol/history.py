"""What the tape says of a job, for a syncer that starts again: who is a member, who has trained how much, what became of it.

`History.feed` takes the records of the tape in their order. The tape is written before what it tells takes effect (a merge is on it before
its version leaves the syncer), so it knows at least as much as any learner. Tensors are not on it: they come from a snapshot and from
learners, at versions that may be older than the newest on the tape. `History.restart` takes the merges above these versions back.

Accounts are those of `Ledger`; a running incarnation's tokens stay its own, so that its reports go on from where they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median_low

from lightning_diloco.protocol.identity import FragmentInfo, LeaveReason, MergedThrough, Version
from lightning_diloco.protocol.lease_fold import fold_leases
from lightning_diloco.protocol.leases import LeaseLedger
from lightning_diloco.protocol.ledger import Ledger
from lightning_diloco.protocol.records import (
    ContributionRecord,
    CountersRecord,
    DiscardRecord,
    EndRecord,
    JobRecord,
    JoinRecord,
    LeaveRecord,
    MergeRecord,
    ProgressRecord,
    Record,
    RestartRecord,
    RoundOpenRecord,
)
from lightning_diloco.protocol.records import Member as MergedMember

__all__ = ["History", "Life"]


@dataclass(slots=True)
class Life:
    """An incarnation that had joined and not left when the tape ends."""

    learner_id: int
    incarnation: int
    session: str
    life: int
    joined_at_step: int
    device: str = ""
    batch_size: int = 0
    tokens_per_step: int = 0
    inner_steps: int = 0
    tokens: int = 0
    num_gaps: int = 0


class History:
    """A fold over the records of one job.

    Args:
        keep_above: per fragment, the version of the snapshot: only merges above it may have to be undone by what comes after the tape.
            Empty: all may.
    """

    def __init__(self, keep_above: tuple[Version | None, ...] = ()) -> None:
        self.epoch = 0
        """The highest epoch on the tape."""
        self.job: JobRecord | None = None
        self.fragments: tuple[FragmentInfo, ...] = ()
        self.lives: dict[int, Life] = {}
        """Members at the end of the tape, by learner id."""
        self.next_incarnation: dict[int, int] = {}
        self.last_seq: dict[tuple[int, int], int] = {}
        self.ledger = Ledger(0)
        self.leases: LeaseLedger | None = None
        self.ended: dict[str, LeaveReason] = {}
        """Sessions whose incarnations have ended, the newest last."""
        self.is_winding_up = False
        """Whether somebody has reached its limit, or was stopped, and the job has not ended since."""
        self.is_stopped = False
        """Whether somebody left because the job was stopped, and the job has not ended since."""
        self.round_ids: dict[int, int] = {}
        self._farthest_step = 0
        self._keep_above = keep_above
        self._held: dict[tuple[int, int], list[MergedMember]] = {}
        self._merges: list[list[tuple[Version, tuple[MergedMember, ...]]]] = []
        self._sessions: dict[tuple[int, int], str] = {}

    def feed(self, record: Record) -> None:
        """Take the next record."""
        self.leases = fold_leases(self.leases, record, self._sessions)
        match record:
            case JobRecord():
                self._found(record)
            case JoinRecord():
                self._join(record)
            case ProgressRecord():
                num_gaps = record.first_gap + len(record.step_gaps_s)
                self._report(record.learner_id, record.incarnation, record.inner_steps, record.tokens, num_gaps)
            case CountersRecord():
                self._report(record.learner_id, record.incarnation, record.inner_steps, record.tokens)
            case RoundOpenRecord():
                self.round_ids[record.fragment_id] = record.round_id
            case ContributionRecord():
                self._contribution(record)
            case MergeRecord():
                self._merge(record)
            case DiscardRecord():
                self._discard(record)
            case LeaveRecord():
                self._leave(record)
            case RestartRecord():
                self.epoch = max(self.epoch, record.epoch)
                self.restart(record.versions, record.merged_through)
            case EndRecord():
                self.is_winding_up = self.is_stopped = False
            case _:
                pass  # cancelled rounds, publications and the supervisor's word leave nothing behind

    def job_step(self) -> int:
        """The job's inner step: the median of its members', or how far the last ones had come."""
        return median_low([x.joined_at_step + x.inner_steps for x in self.lives.values()]) if self.lives else self._farthest_step

    def restart(self, versions: tuple[Version, ...], through: tuple[dict[int, MergedThrough], ...]) -> None:
        """The syncer went on from these versions: what was held is lost, what was merged above them is not merged.

        Args:
            versions: per fragment.
            through: what is in them, per fragment; it also undoes merges that `keep_above` left out. Empty: the record does not say.
        """
        for fragment_id, version in enumerate(versions):
            for members in self._take_above(fragment_id, version.n):
                for member in members:
                    self.ledger.unmerge(member.learner_id, fragment_id, member.tokens)
            if through:
                self.ledger.restate(fragment_id, {learner_id: merged.tokens for learner_id, merged in through[fragment_id].items()})
        for (learner_id, fragment_id), held in self._held.items():
            self.ledger.release(learner_id, fragment_id, sum(m.tokens for m in held))
        self._held = {}

    def lost(self, versions: tuple[Version, ...]) -> list[tuple[int, int, int]]:
        """What nobody can send again when the syncer goes on from these versions: (learner_id, fragment_id, tokens).

        That is what ended incarnations have handed over and what is not in them: merged above them, or only held.
        """
        found: dict[tuple[int, int], int] = {}
        for fragment_id, version in enumerate(versions):
            undone = [m for v, members in self._merges[fragment_id] if v.n > version.n for m in members]
            held = [m for (_, p), members in self._held.items() if p == fragment_id for m in members]
            for member in undone + held:
                life = self.lives.get(member.learner_id)
                if life is None or life.incarnation != member.incarnation:
                    key = (member.learner_id, fragment_id)
                    found[key] = found.get(key, 0) + member.tokens
        return [(learner_id, fragment_id, tokens) for (learner_id, fragment_id), tokens in sorted(found.items())]

    def _take_above(self, fragment_id: int, n: int) -> list[tuple[MergedMember, ...]]:
        merges, taken = self._merges[fragment_id], []
        while merges and merges[-1][0].n > n:
            taken.append(merges.pop()[1])
        return taken

    def _found(self, record: JobRecord) -> None:
        self.job, self.fragments, self.epoch = record, record.fragments, max(self.epoch, record.epoch)
        self.ledger = Ledger(len(record.fragments))
        self._merges = [[] for _ in record.fragments]

    def _join(self, record: JoinRecord) -> None:
        self.next_incarnation[record.learner_id] = record.incarnation + 1
        self.lives[record.learner_id] = Life(
            learner_id=record.learner_id,
            incarnation=record.incarnation,
            session=record.session,
            life=record.life,
            joined_at_step=record.job_step,
            device=record.device,
            batch_size=record.batch_size,
            tokens_per_step=record.tokens_per_step,
        )

    def _report(self, learner_id: int, incarnation: int, inner_steps: int, tokens: int, num_gaps: int = 0) -> None:
        life = self.lives.get(learner_id)
        if life is not None and life.incarnation == incarnation:
            life.inner_steps, life.tokens = max(life.inner_steps, inner_steps), max(life.tokens, tokens)
            life.num_gaps = max(life.num_gaps, num_gaps)
            self.ledger.trained(learner_id, life.tokens)
            self._farthest_step = max(self._farthest_step, life.joined_at_step + life.inner_steps)

    def _contribution(self, record: ContributionRecord) -> None:
        key = (record.learner_id, record.fragment_id)
        if record.outcome != "duplicate" and record.reason not in ("conflict", "stale_incarnation"):
            self.last_seq[key] = max(record.seq, self.last_seq.get(key, 0))
        if record.outcome in ("folded", "carried"):
            member = MergedMember(
                learner_id=record.learner_id,
                incarnation=record.incarnation,
                seq=record.seq,
                steps=record.steps,
                tokens=record.tokens,
                weight=record.weight,
            )
            self._held.setdefault(key, []).append(member)
            self.ledger.hold(record.learner_id, record.fragment_id, record.tokens)

    def _merge(self, record: MergeRecord) -> None:
        for member in record.members:
            key = (member.learner_id, record.fragment_id)
            self._held[key] = [m for m in self._held.get(key, []) if m.seq != member.seq]
            self.ledger.merge(member.learner_id, record.fragment_id, member.tokens)
        kept = self._keep_above[record.fragment_id] if self._keep_above else None
        if kept is None or record.version.n > kept.n:
            self._merges[record.fragment_id].append((record.version, record.members))

    def _discard(self, record: DiscardRecord) -> None:
        life = self.lives.get(record.learner_id)
        is_reported = life is not None and life.incarnation == record.incarnation
        self.ledger.discard(record.learner_id, record.fragment_id, record.reason, record.tokens, is_reported=is_reported)

    def _leave(self, record: LeaveRecord) -> None:
        life = self.lives.get(record.learner_id)
        if life is not None and life.incarnation == record.incarnation:
            del self.lives[record.learner_id]
            self.ledger.close(record.learner_id)
            self.ended[life.session] = record.reason
            self.is_stopped = self.is_stopped or record.reason == "stopped"
            self.is_winding_up = self.is_winding_up or record.reason in ("limit", "stopped")
