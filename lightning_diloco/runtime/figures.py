"""What a learner measures about itself: gaps between ends of steps, pauses, and the time spent in outer-sync code.

The training thread appends, the background thread takes everything that has come since the last report. Appending to and popping from a
deque are atomic, so no lock is needed.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

__all__ = ["Figures", "StepTimes"]

MAX_STEPS_PER_REPORT = 4096
MAX_WAITING = 16 * MAX_STEPS_PER_REPORT
"""Steps that wait for a report; above that (the background thread has died) the oldest are forgotten."""


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


class StepTimes:
    """Times of the inner steps since the last report."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float, float]] = deque(maxlen=MAX_WAITING)
        self._taken: list[tuple[float, float, float, float]] = []
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

    def take(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], float]:
        """Gaps, paused parts, stalls since the last call (seconds, to the microsecond), and the age of the end of the last of them."""
        taken: list[tuple[float, float, float, float]] = []
        while self._steps and len(taken) < MAX_STEPS_PER_REPORT:
            taken.append(self._steps.popleft())
        if taken:
            # Of the last step in this report: one that has ended meanwhile belongs to the next report's walk back in time.
            self._reported_end_s = taken[-1][3]
        age_s = 0.0 if self._reported_end_s is None else max(0.0, time.monotonic() - self._reported_end_s)
        self._taken = taken
        columns = [tuple(round(step[i], 6) for step in taken) for i in range(3)]
        return columns[0], columns[1], columns[2], age_s

    def give_back(self) -> None:
        """The report of the last `take` was not sent: its steps belong to the next one, the newest of them if there is no room for all."""
        # A full deque would push out steps at its other end, the newest ones, and what is left would not be in one piece.
        room = MAX_WAITING - len(self._steps)
        self._steps.extendleft(reversed(self._taken[-room:] if room > 0 else []))
        self._taken = []
