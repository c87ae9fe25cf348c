"""The batch size at which a step takes the time that is wanted, found by trying.

Over sizes, the time of a step is close to a + c s: what does not depend on the size (launching, the optimizer), and what does. The search
measures the present size (median of a few steps), fits the line through what it has measured, and goes to the size whose time is nearest to
the target. With one size measured a is taken for 0, which moves too little and never too much when sizes fall, and too far when they
grow: growth is at most fourfold until a second size is known.

**Hysteresis.** A size stays while its time is within a tolerance of the target (5 % while searching, 10 % once it has settled, over more
steps), and is left only for one whose predicted time is clearly nearer. Sizes are whole numbers, so the nearest one may be further from the
target than the tolerance; then it stays as well.

A measured time that differs from what the same size took before says that the device has changed (another process, heat): what other
sizes took is forgotten.

**No memory.** A size that did not fit is never tried again, nor a larger one.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

__all__ = ["SizeSearch"]

WINDOW = 8
"""Steps that a size is measured for while searching."""
SETTLED_WINDOW = 32
SKIPPED = 1
"""Steps after a change that are not counted: new shapes are planned and allocated for."""
TOLERANCE = 0.05
SETTLED_TOLERANCE = 0.10
CLEARLY = 0.02
"""By how much another size must be nearer to the target."""
MAX_GROWTH = 4
MAX_DISTANCE = 64.0
"""Times as long or as short: a target beyond is not followed."""
CHANGED = 0.15


class SizeSearch:
    """Finds one learner's size.

    Args:
        size: to begin with, samples of a batch, at least 1.
        ceiling: most that fit, at least 1.
    """

    def __init__(self, *, size: int, ceiling: int) -> None:
        self.size = min(size, ceiling)
        """To be used from the next batch that is drawn."""
        self.ceiling = ceiling
        self._is_settled = False
        self._times: deque[float] = deque(maxlen=SETTLED_WINDOW)
        self._known: dict[int, float] = {}
        self._skip = SKIPPED

    def observe(self, size: int, step_s: float) -> None:
        """A step has ended.

        Args:
            size: of the batches that it trained; another one than the present (drawn ahead by workers) says nothing.
            step_s: seconds since the end of the step before, pauses left out.
        """
        if size != self.size:
            return
        if self._skip:
            self._skip -= 1
            return
        self._times.append(max(step_s, 1e-9))

    def decide(self, target_s: float) -> int:
        """The size to use from now on.

        Args:
            target_s: wanted seconds of a step, above 0.

        Returns:
            The present size if there is no reason, or not yet, to change it.
        """
        needed, tolerance = (SETTLED_WINDOW, SETTLED_TOLERANCE) if self._is_settled else (WINDOW, TOLERANCE)
        if len(self._times) < needed:
            return self.size
        now_s = median(self._times)
        if _distance(now_s, target_s) > math.log(MAX_DISTANCE):
            return self.size  # no target for this device: it may come from one that has lied, or stood still
        before_s = self._known.get(self.size)
        if before_s is not None and abs(now_s / before_s - 1) > CHANGED:
            self._known.clear()
        self._known[self.size] = now_s
        distance = _distance(now_s, target_s)
        best = self.size if distance <= tolerance else self._nearest(target_s)
        if best == self.size or _distance(self._predict(best), target_s) > distance - CLEARLY:
            self._is_settled = True
            return self.size
        return self._change(best)

    def failed(self, size: int) -> int:
        """A batch of this size did not fit; returns the size to use from now on."""
        self.ceiling = max(1, min(self.ceiling, size - 1))
        return self._change(max(1, min(self.size, size // 2)))

    def _change(self, size: int) -> int:
        self.size, self._skip, self._is_settled = size, SKIPPED, False
        self._times.clear()
        return size

    def _nearest(self, target_s: float) -> int:
        offset_s, per_sample_s = self._line()
        wanted = (target_s - offset_s) / per_sample_s
        top = self.ceiling if len(self._known) > 1 else min(self.ceiling, MAX_GROWTH * self.size)
        sizes = {min(top, max(1, size)) for size in (int(wanted), int(wanted) + 1)}
        return min(sorted(sizes), key=lambda size: _distance(self._predict(size), target_s))

    def _predict(self, size: int) -> float:
        offset_s, per_sample_s = self._line()
        return self._known.get(size, offset_s + per_sample_s * size)

    def _line(self) -> tuple[float, float]:
        """The a and c of the line through the present size and all that is known, a at least 0."""
        here_s = self._known[self.size]
        others = {size: time_s for size, time_s in self._known.items() if size != self.size}
        if others:
            # Through the present point, by least squares: it is the newest, and the one to go on from.
            moments = sum((size - self.size) ** 2 for size in others)
            slope = sum((size - self.size) * (time_s - here_s) for size, time_s in others.items()) / moments
            if 0 < slope * self.size <= here_s:
                return here_s - slope * self.size, slope
        return 0.0, here_s / self.size


def _distance(time_s: float, target_s: float) -> float:
    """How far a time is from the target, as a ratio: half of it is as far as twice of it."""
    return abs(math.log(time_s / target_s))
