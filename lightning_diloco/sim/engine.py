"""A deterministic discrete-event engine: callbacks on a virtual clock.

**Contract.** `schedule` puts a callback at a time; `run` calls them in the order of (time, priority, sequence), where sequence is the order
in which they were scheduled: of two at one time and priority the one that was scheduled first runs first. `now_s` is the time of the
callback that is running; it never falls, and a callback may be scheduled at the present time (it runs after those of its priority that
wait there already) but not before it. Nothing here reads a clock, draws a random number or depends on the order of a set or on `id`, so
one program gives one sequence of calls, on every machine.

What a callback raises passes through `run`; the callback counts as done, and `run` may be called again.

There is no cancelling: whoever schedules something that may become pointless looks, when called, whether it still is wanted. That keeps an
entry a tuple, the heap exact, and the engine small.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from lightning_diloco.errors import ConfigurationError

__all__ = ["Callback", "Engine"]

Callback = Callable[[], object]
"""What is called; its result is ignored."""


class Engine:
    """A heap of callbacks and a clock.

    Example:
        >>> engine, seen = Engine(), []
        >>> engine.schedule(lambda: seen.append("later"), at_s=2.0)
        >>> engine.schedule(lambda: seen.append("sooner"), delay_s=1.0)
        >>> engine.run(), seen
        (2.0, ['sooner', 'later'])
    """

    __slots__ = ("_heap", "_is_stopped", "_sequence", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        """Virtual time in seconds."""
        self._heap: list[tuple[float, int, int, Callback]] = []
        self._sequence = 0
        self._is_stopped = False

    def __len__(self) -> int:
        """Callbacks that wait."""
        return len(self._heap)

    @property
    def num_scheduled(self) -> int:
        """Callbacks scheduled so far."""
        return self._sequence

    def schedule(self, callback: Callback, *, at_s: float | None = None, delay_s: float = 0.0, priority: int = 0) -> None:
        """Call `callback` at a time, or after a delay.

        Args:
            callback: takes nothing; its result is ignored.
            at_s: virtual time in seconds, not before `now_s` (None: `delay_s` from now).
            delay_s: seconds from now, at least 0; not used with `at_s`.
            priority: of callbacks at one time the smaller one runs first.

        Raises:
            ConfigurationError: the time is in the past, infinite, or no number.
        """
        time_s = self.now_s + delay_s if at_s is None else at_s
        if not self.now_s <= time_s < math.inf:
            raise ConfigurationError(f"time={time_s!r} s: must be finite and not before the present, {self.now_s!r} s. Schedule it later.")
        heapq.heappush(self._heap, (time_s, priority, self._sequence, callback))
        self._sequence += 1

    def stop(self) -> None:
        """Let `run` return when the present callback has returned; what waits is kept."""
        self._is_stopped = True

    def run(self, until_s: float = math.inf) -> float:
        """Call what is due until nothing waits, `stop` is called, or the next callback lies after `until_s`.

        Args:
            until_s: virtual time in seconds; callbacks at exactly this time still run.

        Returns:
            `now_s`: the time of the last callback, or `until_s` if that stopped it.
        """
        heap, pop, self._is_stopped = self._heap, heapq.heappop, False
        while heap and not self._is_stopped:
            if heap[0][0] > until_s:
                self.now_s = max(self.now_s, until_s)
                break
            self.now_s, _, _, callback = pop(heap)
            callback()
        return self.now_s
