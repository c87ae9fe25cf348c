"""When learners stepped: step times, stalls, presence, and from them goodput and uptime.

All times are seconds on the tape's clock. T0 is the first join, T1 the end of the drain.

**Steps.** A progress report brings the gap before each step since the last report, and for each gap the part that was paused (validation,
checkpoints) and the part spent in outer-sync code. A step's time is gap - paused: fetching data and stalls are in it. The first gap of
an incarnation starts at its join.

**Goodput** = sum over learners of step time * (1 - discarded / tokens), over the sum over slots of T1 - max(T0, slot's first join). A
slot is a configured learner (ids below `num_slots`) or, if the number is open, every learner id that joined. A configured slot that
never joined counts from T0: a machine that never came is no saving. `goodput_alive` takes as denominator only the time in which the
slot had a joined incarnation. Clock jitter between learner and syncer can lift the ratio above 1 by parts per thousand; it is cut at 1.

**Uptime** = share of [T0, T1] that the union over learners of short gaps covers; short: at most max(3 * median step time of that
incarnation, 1 s). Where a gap lies on the tape's clock is reconstructed: the report's time less `last_step_age_s` is the end of its last
step, and gaps walk backwards from there. They are numbered: the first gap of a report starts where the one before it ended (or at the
join), so that the jitter of transmission leaves no holes. After an outage of the syncer that can be many seconds: what was told in
between arrives at once. Where a number is missing there is a hole.

References:
    Decoupled DiLoCo, arXiv 2604.21428: goodput and uptime under failures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lightning_diloco.metrics.sample import SortedSample
from lightning_diloco.protocol.records import BatchRecord, JoinRecord, LeaveRecord, ProgressRecord

__all__ = ["Activity", "ALWAYS_SHORT_S", "GAP_FACTOR", "union_length_s"]

ALWAYS_SHORT_S = 1.0
"""A gap of at most this many seconds never breaks uptime."""
GAP_FACTOR = 3.0
"""Nor does one of at most this many median step times."""
KEPT_CHOICES = 20
"""Changes of a learner's batch that the summary tells; all of them are on the tape."""

Interval = tuple[float, float]


def union_length_s(intervals: Iterable[Interval], low_s: float, high_s: float) -> float:
    """Length of the union of intervals, cut to [low_s, high_s]; empty and reversed intervals count nothing."""
    covered_s, reach_s = 0.0, low_s
    for start_s, end_s in sorted(intervals):
        start_s, end_s = max(start_s, reach_s), min(end_s, high_s)
        if end_s > start_s:
            covered_s += end_s - start_s
            reach_s = end_s
    return covered_s


@dataclass(slots=True)
class _Life:
    """One incarnation. Gaps that are short in any case are joined to runs, so memory follows time and not steps."""

    last_end_s: float | None = None
    num_gaps: int = 0
    """The number of the gap that comes next."""
    step_s: SortedSample = field(default_factory=SortedSample)
    runs: list[Interval] = field(default_factory=list)
    long_gaps: list[tuple[float, float, float]] = field(default_factory=list)

    def add(self, t_s: float, record: ProgressRecord) -> None:
        """Take in one report, told at `t_s` of the tape: its steps are walked back from the end of the last one."""
        gaps = record.step_gaps_s
        end_s = t_s - record.last_step_age_s
        start_s = end_s - sum(gaps)
        if self.last_end_s is not None and record.first_gap == self.num_gaps:
            start_s = self.last_end_s
        rest_s = sum(gaps)
        for gap_s in gaps:
            rest_s -= gap_s
            step_end_s = end_s - rest_s
            self._cover(start_s, step_end_s, gap_s)
            start_s = step_end_s
        if gaps:
            self.last_end_s, self.num_gaps = end_s, record.first_gap + len(gaps)

    def covered(self) -> list[Interval]:
        """The intervals in which this life was stepping: gaps between step ends that are no longer than its own limit."""
        limit_s = max(GAP_FACTOR * (self.step_s.median() or 0.0), ALWAYS_SHORT_S)
        return self.runs + [(start_s, end_s) for start_s, end_s, gap_s in self.long_gaps if gap_s <= limit_s]

    def _cover(self, start_s: float, end_s: float, gap_s: float) -> None:
        if gap_s > ALWAYS_SHORT_S:
            self.long_gaps.append((start_s, end_s, gap_s))
        elif self.runs and self.runs[-1][0] <= start_s <= self.runs[-1][1]:
            self.runs[-1] = (self.runs[-1][0], max(self.runs[-1][1], end_s))
        else:
            self.runs.append((start_s, end_s))


@dataclass(slots=True)
class _Learner:
    lives: dict[int, _Life] = field(default_factory=dict)
    joined: dict[int, float] = field(default_factory=dict)
    presence: list[Interval] = field(default_factory=list)
    first_join_s: float | None = None
    step_time_s: float = 0.0
    stall_s: float = 0.0
    stalls_s: SortedSample = field(default_factory=SortedSample)
    batch_size: int = 0
    batches: list[dict[str, Any]] = field(default_factory=list)


class Activity:
    """Folds join, leave and progress records."""

    def __init__(self) -> None:
        self._learners: dict[int, _Learner] = {}
        self.num_slots: int | None = None
        """Configured learners, or None where learners come as they like."""
        self.first_join_s: float | None = None
        """T0, or None before it."""

    def join(self, t_s: float, record: JoinRecord) -> None:
        """An incarnation became a member (again, if it had been taken for dead)."""
        if self.first_join_s is None:
            self.first_join_s = t_s
        learner = self._learner(record.learner_id)
        if learner.first_join_s is None:
            learner.first_join_s = t_s
        learner.joined.setdefault(record.incarnation, t_s)
        life = learner.lives.setdefault(record.incarnation, _Life())
        if life.last_end_s is None:
            life.last_end_s = t_s
        learner.batch_size = record.batch_size or learner.batch_size

    def leave(self, t_s: float, record: LeaveRecord) -> None:
        """An incarnation ended."""
        learner = self._learner(record.learner_id)
        joined_s = learner.joined.pop(record.incarnation, None)
        if joined_s is not None:
            learner.presence.append((joined_s, t_s))

    def progress(self, t_s: float, record: ProgressRecord) -> None:
        """The steps since the last report."""
        learner = self._learner(record.learner_id)
        life = learner.lives.setdefault(record.incarnation, _Life())
        life.add(t_s, record)
        paused_s = record.paused_s + (0.0,) * (len(record.step_gaps_s) - len(record.paused_s))
        step_s = [max(gap - paused, 0.0) for gap, paused in zip(record.step_gaps_s, paused_s, strict=False)]
        life.step_s.extend(step_s)
        learner.step_time_s += sum(step_s)
        learner.stalls_s.extend(record.stalls_s)
        learner.stall_s += sum(record.stalls_s)
        learner.batch_size = record.batch_size or learner.batch_size

    def chose(self, record: BatchRecord) -> None:
        """A learner has changed its batch; the first choice and the last ones are kept."""
        learner = self._learner(record.learner_id)
        learner.batch_size = record.batch_size
        learner.batches.append(
            {
                "inner_step": record.inner_step,
                "batch_size": record.batch_size,
                "accumulate": record.accumulate,
                "lr_factor": record.lr_factor,
                "reason": record.reason,
            }
        )
        if len(learner.batches) > KEPT_CHOICES:
            del learner.batches[1]

    def batches(self, learner_id: int) -> list[dict[str, Any]]:
        """What it chose and when, oldest first; empty where the batch is the loader's."""
        return list(self._learners[learner_id].batches)

    def learner_ids(self) -> list[int]:
        """Every learner that joined, sorted."""
        return sorted(m for m, learner in self._learners.items() if learner.first_join_s is not None)

    def incarnations(self, learner_id: int) -> int:
        """Lives of this learner."""
        return len(self._learners[learner_id].lives)

    def batch_size(self, learner_id: int) -> int:
        """The batch size that it reported last (0: never)."""
        return self._learners[learner_id].batch_size

    def stall_s(self, learner_id: int) -> float:
        """Training-thread time inside outer-sync code."""
        return self._learners[learner_id].stall_s

    def stall_p99_s(self, learner_id: int) -> float | None:
        """The stall that 99 % of its boundaries do not exceed (nearest rank)."""
        return self._learners[learner_id].stalls_s.quantile(0.99)

    def step_median_s(self, learner_id: int) -> float | None:
        """Median step time over all its lives."""
        return SortedSample.union(life.step_s for life in self._learners[learner_id].lives.values()).median()

    def uptime(self, end_s: float) -> float | None:
        """Share of [T0, end_s] in which at least one learner stepped, or None if that span is empty."""
        if self.first_join_s is None or end_s <= self.first_join_s:
            return None
        covered = [interval for learner in self._learners.values() for life in learner.lives.values() for interval in life.covered()]
        return min(union_length_s(covered, self.first_join_s, end_s) / (end_s - self.first_join_s), 1.0)

    def goodput(self, end_s: float, shares_kept: dict[int, float]) -> tuple[float | None, float | None]:
        """Useful step time over the time of all slots, and over the time of joined slots.

        Args:
            end_s: T1, or the present moment.
            shares_kept: per learner, 1 - discarded / tokens.

        Returns:
            `goodput` and `goodput_alive`, each in [0, 1], or None where the denominator is 0.
        """
        useful_s = sum(learner.step_time_s * shares_kept.get(m, 1.0) for m, learner in self._learners.items())
        return _share(useful_s, self._slot_time_s(end_s)), _share(useful_s, self._alive_time_s(end_s))

    def _slot_time_s(self, end_s: float) -> float:
        if self.first_join_s is None:
            return 0.0
        starts = {m: self.first_join_s for m in range(self.num_slots or 0)}
        starts |= {m: learner.first_join_s for m, learner in self._learners.items() if learner.first_join_s is not None}
        return sum(max(end_s - start_s, 0.0) for start_s in starts.values())

    def _alive_time_s(self, end_s: float) -> float:
        if self.first_join_s is None:
            return 0.0
        return sum(
            union_length_s([*learner.presence, *((joined_s, end_s) for joined_s in learner.joined.values())], self.first_join_s, end_s)
            for learner in self._learners.values()
        )

    def _learner(self, learner_id: int) -> _Learner:
        return self._learners.setdefault(learner_id, _Learner())


def _share(part: float, whole: float) -> float | None:
    return min(part / whole, 1.0) if whole > 0 else None
