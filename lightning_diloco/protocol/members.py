"""Who takes part: sessions, incarnations, and when a learner is active (PROTOCOL.md sections 1, 4, 5).

A learner is *active* when it has joined, holds all fragments, its step counter moves (a heartbeat alone is not life), it is not paused,
and it has not been silent past a round's deadline since its counter last moved. Only active learners are pulled, count for the quorum
and pace the rounds. A live learner's id is refused to another nonce unless the newcomer shows the takeover token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median_low
from typing import Literal

from lightning_diloco.protocol.grace import MovingAverage

__all__ = ["Member", "Membership", "Stage"]

Stage = Literal["waiting", "founding", "receiving", "joined", "gone"]
"""waiting: for somebody else's founding; founding: sends the founding state; receiving: full transfers are on their way;
joined: a member; gone: left, died or fenced."""

STILL_STEPS = 10
"""A counter that has not moved for so many of its own step times (at least `STILL_S`) is not life."""
STILL_S = 10.0


@dataclass(slots=True)
class Member:
    """One incarnation of one learner, as the syncer knows it."""

    learner_id: int
    incarnation: int
    session: str
    stage: Stage
    device: str = ""
    batch_size: int = 0
    tokens_per_step: int = 0
    inner_step: int = 0
    tokens: int = 0
    last_advance_s: float = 0.0
    last_heard_s: float = 0.0
    is_paused: bool = False
    is_silent: bool = False
    is_admitted: bool = False
    step_time: MovingAverage = field(default_factory=MovingAverage)
    snapshot_step: dict[int, int] = field(default_factory=dict)

    def advance(self, inner_step: int, tokens: int, now_s: float) -> None:
        """Take in the learner's running totals; a smaller one is an old message."""
        self.last_heard_s = now_s
        if inner_step <= self.inner_step:
            return
        if self.inner_step > 0:
            self.step_time.add((now_s - self.last_advance_s) / (inner_step - self.inner_step))
        self.inner_step, self.tokens = inner_step, max(tokens, self.tokens)
        self.last_advance_s = now_s
        self.is_silent = False

    def is_active(self, now_s: float) -> bool:
        """Whether it is pulled and counts for the quorum."""
        if self.stage != "joined" or self.is_paused or self.is_silent or self.inner_step == 0:
            return False
        return now_s - self.last_advance_s <= self.still_after_s

    @property
    def still_after_s(self) -> float:
        """Seconds without an inner step after which this learner is not active."""
        return max(STILL_S, STILL_STEPS * (self.step_time.value or 0.0))

    def has_work(self, fragment_id: int) -> bool:
        """Whether it did an inner step since its last snapshot of this fragment."""
        return self.inner_step > self.snapshot_step.get(fragment_id, 0)


class Membership:
    """All members by learner id and by session; ended incarnations stay known as numbers only."""

    def __init__(self) -> None:
        self._by_id: dict[int, Member] = {}
        self._by_session: dict[str, Member] = {}
        self._next_incarnation: dict[int, int] = {}
        self._fenced: dict[str, int] = {}

    def add(self, learner_id: int, session: str, stage: Stage) -> Member:
        """A new incarnation of this id; an earlier one must have been removed."""
        incarnation = self._next_incarnation.get(learner_id, 0)
        self._next_incarnation[learner_id] = incarnation + 1
        member = Member(learner_id, incarnation, session, stage)
        self._by_id[learner_id] = self._by_session[session] = member
        return member

    def remove(self, member: Member, *, fenced: bool) -> None:
        """End an incarnation; a fenced session is remembered and stays out."""
        member.stage = "gone"
        self._by_id.pop(member.learner_id, None)
        self._by_session.pop(member.session, None)
        if fenced:
            self._fenced[member.session] = member.learner_id
            while len(self._fenced) > 1024:
                self._fenced.pop(next(iter(self._fenced)))

    def of(self, session: str) -> Member | None:
        """The present incarnation behind this session."""
        return self._by_session.get(session)

    def by_id(self, learner_id: int) -> Member | None:
        """The present incarnation of this learner."""
        return self._by_id.get(learner_id)

    def is_fenced(self, session: str) -> bool:
        """Whether another process took this session's id."""
        return session in self._fenced

    def free_id(self) -> int:
        """The smallest id that nobody ever had."""
        learner_id = 0
        while learner_id in self._next_incarnation:
            learner_id += 1
        return learner_id

    def joined(self) -> list[Member]:
        """All members that hold all fragments, by id."""
        return [m for _, m in sorted(self._by_id.items()) if m.stage == "joined"]

    def present(self) -> list[Member]:
        """All incarnations that have not ended, by id."""
        return [m for _, m in sorted(self._by_id.items())]

    def active(self, now_s: float) -> list[Member]:
        """All active members, by id."""
        return [m for m in self.joined() if m.is_active(now_s)]

    def job_step(self, now_s: float) -> int:
        """The job's inner step: the median of the active learners' (0 if there is none)."""
        steps = [m.inner_step for m in self.active(now_s)]
        return median_low(steps) if steps else 0

    def step_time_s(self, now_s: float) -> float | None:
        """Step time of the fastest active learner."""
        times = [m.step_time.value for m in self.active(now_s) if m.step_time.value is not None]
        return min(times) if times else None
