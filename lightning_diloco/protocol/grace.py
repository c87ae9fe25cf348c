"""The adaptive grace window: how long a quorum waits for the others without costing anybody anything.

    slack = tau * step_time - (quorum_time + sync_time)
    window = clip(gamma * slack, 0, grace_cap_steps * step_time)

All three times are exponential moving averages: step_time of the fastest active learner, quorum_time from a round's opening to the
contribution that made the quorum, sync_time = merge plus the slowest delivery to a learner. Before the first measurements the
window is its cap: too long a wait delays one merge, too short a one loses a member.

References:
    Decoupled DiLoCo, arXiv 2604.21428, equation 3. The averaging constant is not published: our choice.
"""

from __future__ import annotations

__all__ = ["GraceWindow", "MovingAverage"]

SMOOTHING = 0.2
"""Weight of the newest measurement."""


class MovingAverage:
    """Exponential moving average; None before the first measurement."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, measurement_s: float) -> None:
        """Take in one measurement in seconds."""
        self.value = measurement_s if self.value is None else self.value + SMOOTHING * (measurement_s - self.value)


class GraceWindow:
    """The three averages and the window that follows from them.

    Args:
        overlap_steps: tau, in inner steps.
        grace_fraction: gamma, in [0, 1).
        grace_cap_steps: upper limit in inner steps.
    """

    def __init__(self, *, overlap_steps: int, grace_fraction: float, grace_cap_steps: float) -> None:
        self._tau = overlap_steps
        self._gamma = grace_fraction
        self._cap_steps = grace_cap_steps
        self.quorum = MovingAverage()
        self.sync = MovingAverage()

    def window_s(self, step_time_s: float | None, quorum_s: float | None = None) -> float:
        """Seconds to wait after the quorum; 0 if no step time is known or the slack is used up.

        Args:
            step_time_s: of the fastest active learner.
            quorum_s: this round's own time to its quorum where the average does not apply.
        """
        if step_time_s is None:
            return 0.0
        quorum_s = (self.quorum.value or 0.0) if quorum_s is None else quorum_s
        slack_s = self._tau * step_time_s - quorum_s - (self.sync.value or 0.0)
        return min(max(self._gamma * slack_s, 0.0), self._cap_steps * step_time_s)
