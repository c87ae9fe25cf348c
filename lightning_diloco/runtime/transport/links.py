"""One link that a learner dials, control or bulk: whether there is a connection, since when there is none, and how it was turned away.

A link outlives its sockets: one that ZeroMQ has given up is replaced by another for the same address. It is **up** from a handshake that
succeeded (messages can pass then, however slowly) until that connection is lost. So a link that is slow is up, and one whose port a
firewall shuts never is. When it is lost ZeroMQ dials again, or **gives the socket up** (after a refusal, or bytes that are not its
protocol) and says nothing.

A **row of refusals**: the other end refuses this site's key at every attempt that gets so far. A connection, an end that is no such
syncer, or `_ROW_GAP_S` without a refusal (nobody listens any more) break the row; a handshake that was cut off does not. A refused socket
is dialled again about every two seconds (`LearnerTransport`), so a row has several refusals in ten seconds.

What a refusal is worth: whoever can answer in the syncer's place can forge it, for ZeroMQ takes that word of CURVE's handshake
unencrypted, and before the other end has shown its key.

Belongs to the transport's thread; attributes without underscore may be read from any.
"""

from __future__ import annotations

import math
from typing import Final

from .handshakes import HandshakeWatch

__all__ = ["LinkWatch"]

_ROW_GAP_S: Final = 10.0


class LinkWatch:
    """What is known of one link."""

    def __init__(self) -> None:
        self.endpoint: str | None = None
        """What is dialled; None before the first call of `follow`."""
        self.is_up = False
        self.was_up = False
        """Whether it has been up at this address."""
        self.down_since_s = math.inf
        """Monotonic time since which it is not up; infinite while it is, and before it is dialled."""
        self.is_given_up = False
        """Whether ZeroMQ does not dial again, as far as it has said until now: it says so a moment after the connection is lost."""
        self.failed: set[str] = set()
        """What went wrong since it was up, as `HandshakeWatch` calls it."""
        self.times_back = 0
        """How often a connection that was lost was there again: what was on its way meanwhile may be lost."""
        self._is_lost = False
        self.refused_s = 0.0
        """From the first to the last refusal of the row that goes on; 0 without one."""
        self._refused_since_s = self._refused_last_s = math.nan
        self._watch: HandshakeWatch | None = None

    def follow(self, watch: HandshakeWatch | None, endpoint: str, now_s: float) -> None:
        """Another socket is dialled.

        Args:
            watch: of that socket; None within one process, where a link is up at once.
            endpoint: what it dials; the same one as before goes on with what is known.
            now_s: this moment, in seconds.
        """
        self.look(now_s)
        self.close()
        self._watch = watch
        self._is_lost = endpoint == self.endpoint and (self._is_lost or self.is_up)
        if endpoint != self.endpoint:
            self.endpoint, self.was_up, self.down_since_s = endpoint, False, math.inf
            self.failed.clear()
        self.is_up, self.is_given_up = watch is None, False
        if watch is None:
            self.was_up, self.down_since_s = True, math.inf
        else:
            self.down_since_s = min(self.down_since_s, now_s)

    def look(self, now_s: float) -> None:
        """Take what the socket's monitor has told since the last look."""
        words = [] if self._watch is None else self._watch.look()
        for word in words:
            self.take(word, now_s)
        if "unknown_key" not in words and now_s - self._refused_last_s > _ROW_GAP_S:
            self._break_row()

    def take(self, word: str, now_s: float) -> None:
        """Something has happened.

        Args:
            word: as `HandshakeWatch` calls it.
            now_s: when it was seen, in seconds.
        """
        if word == "again":
            self.is_given_up = False
        elif word == "down":
            self._is_lost |= self.is_up
            self.is_up, self.is_given_up = False, True
            self.down_since_s = min(self.down_since_s, now_s)
        elif word == "up":
            self.is_up, self.was_up, self.is_given_up = True, True, False
            self.times_back += self._is_lost
            self._is_lost, self.down_since_s = False, math.inf
            self.failed.clear()
            self._break_row()
        else:
            self.failed.add(word)
            if word == "unknown_key":
                self._refused(now_s)
            elif word != "handshake":
                self._break_row()

    def close(self) -> None:
        """Stop watching; before the socket is closed. Idempotent."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    def _refused(self, now_s: float) -> None:
        if math.isnan(self._refused_since_s):
            self._refused_since_s = now_s
        self._refused_last_s = now_s
        self.refused_s = now_s - self._refused_since_s

    def _break_row(self) -> None:
        self._refused_since_s = self._refused_last_s = math.nan
        self.refused_s = 0.0
