"""A set of whole numbers, kept as few spans: what is free, done, or handed out of an epoch's samples.

Spans are half-open, sorted, disjoint, and never touch (two that do are one). So memory follows the number of gaps, not of samples.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

__all__ = ["Spans"]


class Spans:
    """A set of whole numbers.

    Args:
        start: first number in it.
        stop: first number after it; an empty set if it is not above `start`.
    """

    __slots__ = ("_starts", "_stops", "size")

    def __init__(self, start: int = 0, stop: int = 0) -> None:
        self._starts: list[int] = [start] if stop > start else []
        self._stops: list[int] = [stop] if stop > start else []
        self.size = max(0, stop - start)
        """How many numbers are in it."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Its spans (start, stop), lowest first."""
        return zip(self._starts, self._stops, strict=True)

    def __len__(self) -> int:
        """How many spans it has."""
        return len(self._starts)

    def add(self, start: int, stop: int) -> None:
        """Put the numbers from `start` to below `stop` in."""
        if stop <= start:
            return
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self.size += stop - start - sum(self._stops[first:last]) + sum(self._starts[first:last])
        self._starts[first:last], self._stops[first:last] = [start], [stop]

    def remove(self, start: int, stop: int) -> None:
        """Take the numbers from `start` to below `stop` out."""
        if stop <= start:
            return
        first, last = bisect_right(self._stops, start), bisect_left(self._starts, stop)
        if first >= last:
            return
        kept = [(self._starts[first], start), (stop, self._stops[last - 1])]
        kept = [(a, b) for a, b in kept if a < b]
        self.size += sum(b - a for a, b in kept) - sum(self._stops[first:last]) + sum(self._starts[first:last])
        self._starts[first:last], self._stops[first:last] = [a for a, _ in kept], [b for _, b in kept]

    def overlap(self, start: int, stop: int) -> list[tuple[int, int]]:
        """What of the numbers from `start` to below `stop` is in it, as spans."""
        first, last = bisect_right(self._stops, start), bisect_left(self._starts, stop)
        return [(max(start, a), min(stop, b)) for a, b in zip(self._starts[first:last], self._stops[first:last], strict=True)]

    def first(self, count: int) -> tuple[int, int]:
        """The lowest span, cut to at most `count` numbers. The set must not be empty."""
        return self._starts[0], min(self._stops[0], self._starts[0] + count)
