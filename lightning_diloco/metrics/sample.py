"""A growing sample with exact median and quantiles.

Values are kept sorted between two questions. Appending a few new values to a sorted list and sorting again is close to linear
(the sort finds the two runs), so asking every few seconds stays cheap for millions of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["SortedSample"]


class SortedSample:
    """Numbers in any order of arrival; quantiles by nearest rank, the median as the mean of the middle two."""

    __slots__ = ("_is_sorted", "_values")

    def __init__(self) -> None:
        self._values: list[float] = []
        self._is_sorted = True

    @classmethod
    def union(cls, samples: Iterable[SortedSample]) -> SortedSample:
        """One sample with the values of several."""
        whole = cls()
        for sample in samples:
            whole.extend(sample._values)
        return whole

    def extend(self, values: Iterable[float]) -> None:
        """Add values."""
        self._values.extend(values)
        self._is_sorted = False

    def median(self) -> float | None:
        """The middle value, or the mean of the two in the middle; None if empty."""
        values = self._sorted()
        if not values:
            return None
        middle = len(values) // 2
        return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2

    def quantile(self, share: float) -> float | None:
        """The smallest value that at least `share` (in (0, 1]) of the values do not exceed; None if empty."""
        values = self._sorted()
        return values[math.ceil(share * len(values)) - 1] if values else None

    def _sorted(self) -> list[float]:
        if not self._is_sorted:
            self._values.sort()
            self._is_sorted = True
        return self._values
