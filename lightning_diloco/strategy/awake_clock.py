"""A clock for patience with another process, which stands still while this one does.

Whatever has stopped this process (Ctrl-Z, a debugger, a machine that was suspended) may have stopped the other one too, and both go on at
once: by any other clock its time would be over before it can do anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["AwakeClock"]

_LONGEST_S = 1.0
"""Between two askings at most so much passes; whoever waits asks several times a second."""


class AwakeClock:
    """Seconds since it was made in which somebody asked for them.

    Args:
        clock: seconds that pass in any case.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked_s = clock()
        self._awake_s = 0.0

    def now_s(self) -> float:
        """Seconds so far."""
        asked_s, self._asked_s = self._asked_s, self._clock()
        self._awake_s += min(self._asked_s - asked_s, _LONGEST_S)
        return self._awake_s
