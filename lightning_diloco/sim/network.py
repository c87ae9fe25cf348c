"""One learner's wire: control messages with a latency, payloads one after the other at a bandwidth, and cuts of both.

A control message arrives `latency_s` after it was sent. A payload starts when the one before it has been sent, takes bytes / bandwidth, and
arrives `latency_s` after its last byte left. During a cut nothing leaves: a message waits for its end, and a payload on its
way goes on afterwards where it stopped. Order is kept on each of the four channels.
"""

from __future__ import annotations

from lightning_diloco.sim.engine import Callback, Engine
from lightning_diloco.sim.options import Cut, Link

__all__ = ["Wire"]


class Wire:
    """A link on the virtual clock.

    Args:
        engine: the clock.
        link: latency and bandwidths.
        cuts: when it carries nothing, by time.
    """

    def __init__(self, engine: Engine, link: Link, cuts: list[Cut]) -> None:
        self._engine = engine
        self._link = link
        self._cuts = [(cut.at_s, cut.at_s + cut.for_s) for cut in cuts]
        self._up_free_s = 0.0
        self._down_free_s = 0.0

    def opens_s(self) -> float:
        """Now, or the end of the present cut."""
        return self._through(self._engine.now_s, 0.0) if self._cuts else self._engine.now_s

    def control(self, deliver: Callback) -> None:
        """Send a control message, in either direction."""
        self._engine.schedule(deliver, at_s=self.opens_s() + self._link.latency_s)

    def up(self, num_bytes: int, deliver: Callback) -> float:
        """Send a payload to the syncer.

        Returns:
            The time at which its last byte has left.
        """
        self._up_free_s = self._through(max(self._engine.now_s, self._up_free_s), num_bytes / self._link.up_bytes_per_s)
        self._engine.schedule(deliver, at_s=self._up_free_s + self._link.latency_s)
        return self._up_free_s

    def down(self, num_bytes: int, deliver: Callback) -> None:
        """Send a payload to the learner."""
        self._down_free_s = self._through(max(self._engine.now_s, self._down_free_s), num_bytes / self._link.down_bytes_per_s)
        self._engine.schedule(deliver, at_s=self._down_free_s + self._link.latency_s)

    def _through(self, start_s: float, duration_s: float) -> float:
        """The end of what takes so long from there on, with nothing done during cuts."""
        for cut_s, mended_s in self._cuts:
            if mended_s <= start_s:
                continue
            if cut_s <= start_s:
                start_s = mended_s
            elif start_s + duration_s > cut_s:
                duration_s += mended_s - cut_s
            else:
                break
        return start_s + duration_s
