"""The norm gate: refuse a contribution whose size is out of all proportion, by its own figures and running statistics only.

A gate that compared the members of a round with each other would make one member's fate depend on who else is late. The statistics include
refused contributions: otherwise a gate that was once too tight would never open again.
"""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["NormGate"]

WINDOW = 33
"""Norms per step that are remembered for each fragment."""
WARMUP = 8
"""Norms that must have been seen before the gate can close."""


class NormGate:
    """Running median of one fragment's contribution norm per inner step.

    Args:
        factor: refuse above this many times the median; None lets everything pass.
    """

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._seen: deque[float] = deque(maxlen=WINDOW)

    def admits(self, norm: float, steps: int) -> bool:
        """Whether a contribution of `steps` inner steps and this norm passes; takes it into the statistics in any case."""
        per_step = norm / steps
        limit = None if self._factor is None or len(self._seen) < WARMUP else self._factor * median(self._seen)
        self._seen.append(per_step)
        return limit is None or limit == 0.0 or per_step <= limit
