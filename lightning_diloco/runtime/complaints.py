"""Log lines about what a peer sends: whoever sends garbage must not fill the disk with it."""

from __future__ import annotations

import logging
import math
import time

__all__ = ["COMPLAIN_S", "Complaints"]

COMPLAIN_S = 10.0
"""Seconds between two log lines about dropped messages."""


class Complaints:
    """Warnings of one kind, at most one in `COMPLAIN_S`.

    Args:
        log: where they go.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._next_s = -math.inf

    def add(self, what: str, why: object) -> None:
        """Warn that a message was dropped, unless that was said a moment ago.

        Args:
            what: which one.
            why: the rule that it broke.
        """
        self.say(f"{what} was dropped: {why}")

    def say(self, text: str) -> None:
        """Warn of something else, unless that was said a moment ago.

        Args:
            text: a sentence without its full stop.
        """
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + COMPLAIN_S
            self._log.warning("%s (further ones are not logged for %g s)", text, COMPLAIN_S)
