"""What a peer says, where a person reads it: in a log, on a terminal, in an exception.

Whoever sends garbage must not fill the disk with it (`Complaints`), and nobody's words may forge a line, move the cursor or change colours
(`printable`). Reasons, names and details are a peer's own; so is much of what msgspec says of bytes that are no message, for it quotes
the tag or the name of the field, and a control message may have 1 MiB.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Final

__all__ = ["COMPLAIN_S", "MAX_SENTENCE", "MAX_SHOWN", "Complaints", "printable"]

COMPLAIN_S = 10.0
"""Seconds between two log lines about dropped messages."""
MAX_SHOWN: Final = 500
"""Characters of one log line."""
MAX_SENTENCE: Final = 2500
"""Characters of what a syncer says when it ends a session: longer than any that keeps to the limits of the wire."""


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """A peer's words as one line of bounded length, in which whatever is not printable is a question mark.

    Args:
        text: what it said.
        limit: characters; what is longer is cut, and ends in dots.
    """
    cut = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return "".join(c if c.isprintable() else "?" for c in cut)


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
            text: a sentence without its full stop; a peer's words in it are shown as `printable` shows them.
        """
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + COMPLAIN_S
            self._log.warning("%s (further ones are not logged for %g s)", printable(text), COMPLAIN_S)
