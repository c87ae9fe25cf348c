"""Who takes part: sessions, incarnations, and when a learner is active (PROTOCOL.md sections 1, 4, 5).

A learner is *active* when it has joined, holds all fragments, its step counter moves (a heartbeat alone is not life), it is not paused,
and it has not been silent past a round's deadline: then its counter must move and it must answer again. Only
active learners are pulled, count for the quorum and pace the rounds. A live learner's id is refused to another nonce unless the
newcomer shows the takeover token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median_low
from typing import Literal

from lightning_diloco.protocol.grace import MovingAverage
from lightning_diloco.protocol.identity import LeaveReason

__all__ = ["GIVEN_UP_S", "MAX_IDS", "MAX_JOINING", "SILENT_HEARTBEATS", "SILENT_S", "Member", "Membership", "Stage"]

Stage = Literal["waiting", "founding", "receiving", "joined", "gone"]
"""waiting: for somebody else's founding; founding: sends the founding state; receiving: full transfers are on their way;
joined: a member; gone: left, died or fenced."""

STILL_STEPS = 10
"""A counter that has not moved for so many of its own step times (at least `STILL_S`) is not life."""
STILL_S = 10.0
SILENT_S = 10.0
SILENT_HEARTBEATS = 10
"""Where no supervisor says who is gone: a process that was not heard for so long (the longer of both) may be replaced, and the last
one that leaves does not wait for it."""
GIVEN_UP_S = 60.0
"""And one that was not heard for so long (ten heartbeats at least) is dead: it does not hold up a join or the end of a job."""
MAX_IDS = 2000
"""Learner ids of one job. Every version names each learner that is merged in it, and a payload's header has 64 KiB."""
MAX_JOINING = 256
"""Processes that are not members yet."""
MAX_ENDED = 1024
"""Ended sessions that are remembered."""


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
    life: int = 0
    joined_at_step: int = 0
    inner_step: int = 0
    tokens: int = 0
    last_advance_s: float | None = None
    last_heard_s: float = 0.0
    is_paused: bool = False
    is_leaving: bool = False
    is_silent: bool = False
    has_moved: bool = False
    has_answered: bool = False
    is_admitted: bool = False
    is_founder: bool = False
    is_ready: bool = False
    taped_tokens: int = 0
    num_gaps: int = 0
    clock_offset_s: float | None = None
    step_time: MovingAverage = field(default_factory=MovingAverage)
    snapshot_step: dict[int, int] = field(default_factory=dict)
    num_states: dict[int, int] = field(default_factory=dict)

    def advance(self, inner_step: int, tokens: int, now_s: float) -> None:
        """Take in the learner's running totals; a smaller one is an old message."""
        self.last_heard_s = now_s
        if inner_step <= self.inner_step:
            return
        if self.inner_step > 0 and self.last_advance_s is not None:
            self.step_time.add((now_s - self.last_advance_s) / (inner_step - self.inner_step))
        self.inner_step, self.tokens = inner_step, max(tokens, self.tokens)
        self.last_advance_s = now_s
        self.has_moved = True
        self._speak_again()

    def delay_s(self, clock_s: float, now_s: float) -> float:
        """How long a report that was sent at `clock_s` of the learner's clock was on its way, against the quickest one so far."""
        if clock_s == 0.0:
            return 0.0
        offset_s = now_s - clock_s
        self.clock_offset_s = offset_s if self.clock_offset_s is None else min(self.clock_offset_s, offset_s)
        return offset_s - self.clock_offset_s

    def answered(self) -> None:
        """It showed that nothing of it is stuck on the bulk channel."""
        self.has_answered = True
        self._speak_again()

    def fall_silent(self) -> None:
        """A round's deadline passed without its answer: it is not active until its counter moves and it answers."""
        self.is_silent, self.has_moved, self.has_answered = True, False, False

    def _speak_again(self) -> None:
        if self.has_moved and self.has_answered:
            self.is_silent = False

    def unheard_s(self, now_s: float) -> float:
        """Seconds since the last sign of life of any kind."""
        return now_s - self.last_heard_s

    def is_active(self, now_s: float) -> bool:
        """Whether it is pulled and counts for the quorum."""
        if self.stage != "joined" or self.is_paused or self.is_silent or self.inner_step == 0:
            return False
        return not self.is_still(now_s)

    def is_still(self, now_s: float) -> bool:
        """Whether its step counter has stopped without a word."""
        quiet_s = 0.0 if self.last_advance_s is None else now_s - self.last_advance_s
        return quiet_s > STILL_S and not self.is_paused and quiet_s > self.still_after_s

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
        self._ordered: list[Member] = []
        self._by_session: dict[str, Member] = {}
        self._next_incarnation: dict[int, int] = {}
        self._ended: dict[str, LeaveReason] = {}
        self._job_step = 0

    def add(self, learner_id: int, session: str, stage: Stage) -> Member:
        """A new incarnation of this id; an earlier one must have been removed."""
        incarnation = self._next_incarnation.get(learner_id, 0)
        self._next_incarnation[learner_id] = incarnation + 1
        member = Member(learner_id, incarnation, session, stage)
        self._by_id[learner_id] = self._by_session[session] = member
        self._order()
        return member

    def restore(self, member: Member, next_incarnation: int) -> None:
        """Put an incarnation back that a syncer before this one has known."""
        self._next_incarnation[member.learner_id] = max(next_incarnation, self._next_incarnation.get(member.learner_id, 0))
        self._by_id[member.learner_id] = self._by_session[member.session] = member
        self._order()

    def seen(self, learner_id: int, next_incarnation: int) -> None:
        """An id that had lives before this syncer started."""
        self._next_incarnation[learner_id] = max(next_incarnation, self._next_incarnation.get(learner_id, 0))

    def next_incarnation(self, learner_id: int) -> int:
        """The number of this id's next life."""
        return self._next_incarnation.get(learner_id, 0)

    def restore_ended(self, sessions: Mapping[str, LeaveReason]) -> None:
        """Sessions whose incarnations had ended: they stay out."""
        for session, reason in sessions.items():
            self._remember_end(session, reason)

    def set_job_step(self, step: int) -> None:
        """How far the job is, while nobody is active who knows it better."""
        self._job_step = step

    def remove(self, member: Member, reason: LeaveReason) -> None:
        """End an incarnation; its session is remembered and stays out: its account is closed."""
        if self.joined() == [member]:
            # The only one that knows how far the job is.
            self._job_step = member.joined_at_step + member.inner_step
        member.stage = "gone"
        self._by_id.pop(member.learner_id, None)
        self._by_session.pop(member.session, None)
        self._order()
        self._remember_end(member.session, reason)

    def _remember_end(self, session: str, reason: LeaveReason) -> None:
        self._ended[session] = reason
        while len(self._ended) > MAX_ENDED:
            self._ended.pop(next(iter(self._ended)))

    def _order(self) -> None:
        # Every event asks for the members in order; they come and go rarely.
        self._ordered = [m for _, m in sorted(self._by_id.items())]

    def of(self, session: str) -> Member | None:
        """The present incarnation behind this session."""
        return self._by_session.get(session)

    def by_id(self, learner_id: int) -> Member | None:
        """The present incarnation of this learner."""
        return self._by_id.get(learner_id)

    def end_of(self, session: str) -> LeaveReason | None:
        """Why this session's incarnation ended, or None for one that has not, or that was never seen."""
        return self._ended.get(session)

    def free_id(self, limit: int) -> int | None:
        """The smallest id that nobody ever had; if all `limit` ids were used, the smallest one that nobody has now, or None.

        A new life of an old id is safe: it goes on with its seqs, its ledger and its `merged_through`. But the place in the data that goes
        with an id is repeated, so an id that nobody had comes first.
        """
        unused = (i for i in range(limit) if i not in self._next_incarnation)
        return next(unused, next((i for i in range(limit) if i not in self._by_id), None))

    def joined(self) -> list[Member]:
        """All members that hold all fragments, by id."""
        return [m for m in self._ordered if m.stage == "joined"]

    def present(self) -> list[Member]:
        """All incarnations that have not ended, by id."""
        return list(self._ordered)

    def active(self, now_s: float) -> list[Member]:
        """All active members, by id."""
        return [m for m in self._ordered if m.is_active(now_s)]

    def job_step(self, now_s: float) -> int:
        """The job's inner step: the median of the active learners', or of all members while none is, or the last known one without any."""
        steps = [m.joined_at_step + m.inner_step for m in self.active(now_s) or self.joined()]
        if steps:
            self._job_step = median_low(steps)
        return self._job_step

    def step_time_s(self, now_s: float) -> float | None:
        """Step time of the fastest active learner."""
        times = [m.step_time.value for m in self.active(now_s) if m.step_time.value is not None]
        return min(times) if times else None
