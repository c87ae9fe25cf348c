"""One epoch of leased data: which of its positions are free, done, or were trained by lives that have ended (see `leases`)."""

from __future__ import annotations

from lightning_diloco.protocol.spans import Spans

__all__ = ["Epoch"]

MAX_LISTED = 64
"""Ranges of an epoch that are listed as trained twice; the count is exact beyond it."""


class Epoch:
    """The positions of one epoch, all of them free at first.

    Args:
        num_samples: how many there are.
    """

    def __init__(self, num_samples: int) -> None:
        self.free = Spans(0, num_samples)
        self.done = Spans()
        self.before = Spans()
        self.assumed = Spans()
        self.twice = 0
        self.again = 0
        self.unsure = 0
        self.listed = Spans()

    def finish(self, start: int, stop: int) -> None:
        """A life has reported these positions as done."""
        for a, b in [*self.done.overlap(start, stop), *self.before.overlap(start, stop)]:
            self._repeat(a, b)
        self.before.remove(start, stop)
        self.assumed.remove(start, stop)
        self.free.remove(start, stop)
        self.done.add(start, stop)

    def train_before(self, start: int, stop: int) -> None:
        """A life that has ended, or is about to, has trained these and had not reported them."""
        done = self.done.overlap(start, stop)
        for a, b in [*done, *self.before.overlap(start, stop)]:
            self._repeat(a, b)
        self.before.add(start, stop)
        for a, b in done:
            self.before.remove(a, b)

    def _repeat(self, start: int, stop: int) -> None:
        self.twice += stop - start
        if len(self.listed) < MAX_LISTED:
            self.listed.add(start, stop)
