"""What a learner measures about itself: gaps between ends of steps, pauses, and the time spent in outer-sync code.

The training thread appends, the background thread takes. Appending to and popping from a deque are atomic, so no lock is needed. What was
taken stays until the syncer says that it is on the tape: a report may be lost with a connection, or with a syncer that is killed, and each
one tells all steps again of which that is not known. They are numbered, so the syncer knows which ones it has.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

__all__ = ["Figures", "StepTimes", "TakenSteps"]

MAX_STEPS_PER_REPORT = 4096
MAX_WAITING = 16 * MAX_STEPS_PER_REPORT
"""Steps that wait to be confirmed; above that (there is no syncer for long) the oldest are forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a user may want to see while training.

    `merges`: of fragments of parameters, received since the join; those of running statistics are left out, as in ``summary.json``.
    `participation`: share of the versions received since the join that contain a contribution of this learner (None before the first).
    `staleness_versions`: mean over the last contributions of the versions between a contribution's base and the one that it went into.
    """

    merges: int
    participation: float | None
    staleness_versions: float
    stall_s: float
    inner_steps: int
    tokens: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True)
class TakenSteps:
    """The oldest steps that are not confirmed: the number of the first (from 0 at the join), gaps, paused parts, stalls; seconds."""

    first: int
    gaps_s: tuple[float, ...]
    paused_s: tuple[float, ...]
    stalls_s: tuple[float, ...]
    age_s: float
    """Since the end of the last of them; of the last one ever taken if there are none."""


class StepTimes:
    """Times of the inner steps that the syncer does not have on its tape."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float, float]] = deque(maxlen=MAX_WAITING)
        self._unconfirmed: list[tuple[float, float, float, float]] = []
        self._first = 0
        self._reported_end_s: float | None = None
        self._last_end_s: float | None = None
        self._paused_s = 0.0
        self._pause_began_s: float | None = None
        self.stall_s = 0.0

    def start(self) -> None:
        """The join is complete: the first gap begins."""
        self._last_end_s = self._reported_end_s = time.monotonic()

    def pause(self, is_paused: bool) -> None:
        """Validation or a checkpoint begins or ends."""
        now_s = time.monotonic()
        if is_paused:
            self._pause_began_s = now_s if self._pause_began_s is None else self._pause_began_s
        elif self._pause_began_s is not None:
            self._paused_s += now_s - self._pause_began_s
            self._pause_began_s = None

    def step(self, stall_s: float) -> None:
        """An inner step ended; `stall_s` of it passed in outer-sync code."""
        now_s = time.monotonic()
        gap_s = now_s - (self._last_end_s if self._last_end_s is not None else now_s)
        self._steps.append((gap_s, min(self._paused_s, gap_s), stall_s, now_s))
        self._last_end_s, self._paused_s = now_s, 0.0
        self.stall_s += stall_s

    @property
    def is_full(self) -> bool:
        """Whether a report should be sent before its time."""
        return len(self._steps) >= MAX_STEPS_PER_REPORT

    def take(self, *, is_heard: bool = True) -> TakenSteps:
        """What a report tells; to the microsecond.

        Args:
            is_heard: whether the syncer answers; if not there are none, and they wait.
        """
        waiting = self._unconfirmed
        while self._steps:
            waiting.append(self._steps.popleft())
        if len(waiting) > MAX_WAITING:
            self._drop(len(waiting) - MAX_WAITING)
        taken = waiting[:MAX_STEPS_PER_REPORT] if is_heard else []
        if taken:
            # Of the last step in this report: one that has ended meanwhile belongs to the next report's walk back in time.
            self._reported_end_s = taken[-1][3]
        age_s = 0.0 if self._reported_end_s is None else max(0.0, time.monotonic() - self._reported_end_s)
        columns = [tuple(round(step[i], 6) for step in taken) for i in range(3)]
        return TakenSteps(self._first, columns[0], columns[1], columns[2], age_s)

    def confirm(self, num_steps: int) -> None:
        """So many steps since the join are on the tape."""
        self._drop(min(num_steps - self._first, len(self._unconfirmed)))

    def _drop(self, count: int) -> None:
        if count > 0:
            del self._unconfirmed[:count]
            self._first += count
