"""`summary.json` of a syncer with several shards, folded from the tapes of all of them.

Each shard has a tape of its own, about its own fragments, and is told of the same lives, steps and tokens. So everything about
fragments is added up over the tapes, and everything about learners and time is the lead's (shard 0): joins, step times, leases, T0 and T1.

Lives are the same at all shards by their process (`session`), not by their number: a process that got in at one shard only is counted
there. A life's tokens are the largest total that any shard was told. A shard that was told less (the life ended by a death, or while the
shard was down) lacks the difference, in all of its fragments: it is discarded for the reason for which the life ended there (as always,
computed from totals and never added up from what is believed lost). So tokens = merged + pending + discarded holds exactly over all shards.

Invariant: what was fed in which order between tapes does not matter; lines of one tape come in theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from lightning_diloco.metrics.summary import SummaryFold
from lightning_diloco.protocol.identity import DiscardReason
from lightning_diloco.protocol.records import (
    BatchRecord,
    ContributionRecord,
    CountersRecord,
    DiscardRecord,
    EndRecord,
    JobRecord,
    JoinRecord,
    LeaveRecord,
    MergeRecord,
    ProgressRecord,
    PublishRecord,
    RestartRecord,
    RunRecord,
    TapeLine,
)

__all__ = ["ShardedFold", "renumbered"]


@dataclass(slots=True)
class _Life:
    """What one shard knows of one process."""

    inner_steps: int = 0
    tokens: int = 0
    lost: DiscardReason | None = None
    """Why what this shard was not told of is discarded; None while the life runs there."""


@dataclass(slots=True)
class _Shard:
    """One tape so far."""

    job: JobRecord | None = None
    sessions: dict[tuple[int, int], str] = field(default_factory=dict)
    lives: dict[tuple[int, str], _Life] = field(default_factory=dict)
    end: tuple[float, EndRecord] | None = None

    def session(self, record: JoinRecord | ProgressRecord | CountersRecord | LeaveRecord) -> str:
        """The process that a record is about."""
        return self.sessions.get((record.learner_id, record.incarnation), f"#{record.incarnation}")


def renumbered(line: TapeLine, shard: int, num_shards: int) -> TapeLine:
    """A line about one fragment of a shard, with the fragment's number in the whole.

    Args:
        line: of a contribution, merge, discard or publication.
        shard: whose tape it is from.
        num_shards: S.
    """
    record = line.record
    if not isinstance(record, MergeRecord | DiscardRecord | ContributionRecord | PublishRecord) or record.fragment_id < 0:
        return line
    moved = msgspec.structs.replace(record, fragment_id=record.fragment_id * num_shards + shard)
    return TapeLine(seq=line.seq, t_s=line.t_s, record=moved)


class ShardedFold(SummaryFold):
    """Folds the tapes of all shards of one job.

    Args:
        num_shards: S.
    """

    def __init__(self, num_shards: int) -> None:
        super().__init__()
        self._shards = [_Shard() for _ in range(num_shards)]
        self._numbers: dict[tuple[int, str], int] = {}
        self._corrected: dict[tuple[int, int, int, DiscardReason], int] = {}

    def feed_shard(self, shard: int, line: TapeLine) -> None:
        """Take the next line of one shard's tape.

        Args:
            shard: its number.
            line: with the fragments' numbers of that shard.
        """
        told = self._shards[shard]
        match line.record:
            case JobRecord() as record:
                told.job = record
                self._found_all()
            case JoinRecord() as record:
                if record.session:
                    told.sessions[record.learner_id, record.incarnation] = record.session
                told.lives.setdefault((record.learner_id, told.session(record)), _Life())
            case ProgressRecord() | CountersRecord() as record:
                self._report(told, record)
            case LeaveRecord() as record:
                self._life(told, record).lost = {"died": "died", "fenced": "fenced"}.get(record.reason, "drain")  # type: ignore[assignment]
            case RestartRecord() as record:
                self._restart_shard(shard, record)
            case EndRecord() as record:
                told.end = (line.t_s, record)
                self._end_all()
            case MergeRecord() | DiscardRecord() | ContributionRecord() | PublishRecord():
                super().feed(renumbered(TapeLine(seq=line.seq, t_s=0.0, record=line.record), shard, len(self._shards)))
            case _:
                pass
        if shard == 0:
            self._feed_lead(line)

    def result(self, status: str | None = None, now_t_s: float | None = None, *, is_strict: bool = True) -> dict[str, Any]:
        """See `SummaryFold.result`; `global_sha256` is None, for no tape has that of the whole."""
        self._correct()
        return {**super().result(status, now_t_s, is_strict=is_strict), "global_sha256": None}

    def _feed_lead(self, line: TapeLine) -> None:
        """Learners and time; tokens are counted for all shards above."""
        match line.record:
            case ProgressRecord() as record:
                self._activity.progress(line.t_s, record)
            case JoinRecord() as record:
                self._activity.join(line.t_s, record)
            case BatchRecord() as record:
                self._activity.chose(record)
            case LeaveRecord() as record:
                self._activity.leave(line.t_s, record)
            case RunRecord():
                return  # each shard's own word; the syncer's is said once
            case _:
                pass
        self._last_s = max(self._last_s, line.t_s)
        self._fold_leases(line)

    # ---- fragments ----------------------------------------------------------------------------------------------------------

    @property
    def job(self) -> JobRecord | None:
        """The job as far as it is founded, with the fragments of all shards."""
        return self._job

    def _global(self, fragment_id: int, shard: int) -> int:
        return fragment_id * len(self._shards) + shard

    def _found_all(self) -> None:
        """The job as far as it is founded: that of the lead, with the fragments of all shards."""
        found = [(k, told.job) for k, told in enumerate(self._shards) if told.job is not None]
        pairs = sorted(
            (self._global(f.fragment_id, k), f, n) for k, job in found for f, n in zip(job.fragments, job.founded_n, strict=True)
        )
        before = self._versions
        self._bytes_up -= self._job.founding_bytes if self._job is not None else 0
        self._found(
            msgspec.structs.replace(
                found[0][1],
                fragments=tuple(msgspec.structs.replace(f, fragment_id=p) for p, f, _ in pairs),
                founded_n=tuple(n for _, _, n in pairs),
                founding_bytes=sum(job.founding_bytes for _, job in found),
            )
        )
        self._versions |= before

    def _restart_shard(self, shard: int, record: RestartRecord) -> None:
        versions = {self._global(i, shard): version.n for i, version in enumerate(record.versions)}
        through = {self._global(i, shard): merged for i, merged in enumerate(record.merged_through)} if record.merged_through else None
        self._versions |= versions
        self._merges.restart(versions, through)
        self._shards[shard].end = self._end = None

    def _end_all(self) -> None:
        """The job has ended when every shard has, at the time of the lead."""
        ends = [told.end for told in self._shards]
        if ends[0] is None or any(end is None for end in ends):
            return
        words = [end[1].status for end in ends if end is not None]
        status = next((word for word in ("failed", "stopped") if word in words), "finished")
        self._end = (ends[0][0], msgspec.structs.replace(ends[0][1], status=status, global_sha256=None))

    # ---- lives --------------------------------------------------------------------------------------------------------------

    def _life(self, told: _Shard, record: ProgressRecord | CountersRecord | LeaveRecord) -> _Life:
        return told.lives.setdefault((record.learner_id, told.session(record)), _Life())

    def _report(self, told: _Shard, record: ProgressRecord | CountersRecord) -> None:
        life = self._life(told, record)
        life.inner_steps, life.tokens = max(life.inner_steps, record.inner_steps), max(life.tokens, record.tokens)
        self._accounts.report(record.learner_id, self._number(record.learner_id, told.session(record)), life.inner_steps, life.tokens)

    def _number(self, learner_id: int, session: str) -> int:
        """A life's number among those of its learner, in the order in which they were seen."""
        key = (learner_id, session)
        if key not in self._numbers:
            self._numbers[key] = sum(m == learner_id for m, _ in self._numbers)
        return self._numbers[key]

    def _correct(self) -> None:
        """Discard what a shard was not told of a life that has ended there."""
        totals: dict[tuple[int, str], int] = {}
        for told in self._shards:
            for key, life in told.lives.items():
                totals[key] = max(totals.get(key, 0), life.tokens)
        wanted: dict[tuple[int, int, int, DiscardReason], int] = {}
        for shard, told in enumerate(self._shards):
            for (learner_id, session), total in totals.items():
                life = told.lives.get((learner_id, session), _Life(lost="died" if told.end is not None else None))
                if life.lost is None or told.job is None or total == life.tokens:
                    continue
                for info in told.job.fragments:
                    if info.kind == "parameters":
                        fragment_id = self._global(info.fragment_id, shard)
                        account = (learner_id, self._number(learner_id, session), fragment_id, life.lost)
                        wanted[account] = wanted.get(account, 0) + total - life.tokens
        for account in {**self._corrected, **wanted}:
            if more := wanted.get(account, 0) - self._corrected.get(account, 0):
                self._accounts.correct(*account, more)
        self._corrected = wanted
