"""The sending half of a transfer, without a socket and without a clock.

One `OutgoingTransfers` per peer. Payloads wait in a FIFO and at most one is on the wire. Its life:

1. *hashing*: the checksum is computed a few chunks at a time (`hash_some`), so that a large payload never holds up control.
2. *offered*: `Begin` has gone out; nothing more is sent before the receiver grants credit.
3. *granted*: chunks below ``upto`` go out; every grant moves ``upto``.
4. *ended* by exactly one of: received, refused, cancelled, forgotten.

Without progress (no grant that moves ``have``, no end) for ``resend_after_s``, doubled at each miss up to ``resend_max_s``,
the payload is offered again under the same id with the next attempt number. The grant that echoes this attempt says how many
chunks the receiver holds without a gap, and sending goes on from there: from 0, that is the whole payload, where the receiver
lost its state. Because the repeated `Begin` travels behind the chunks that were sent before it, its grant is exact when no
connection broke: a timer that fired too early on a slow link costs a pause and no byte.

The caller does the I/O: `peek` says what to send, `mark_sent` that the socket took it, `mark_blocked` that it did not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lightning_diloco.runtime.checksum import crc32

from .frames import CHUNK_BYTES, Begin, Cancel, Chunk, Grant, Received, ReplyFrame, count_chunks

__all__ = ["Ended", "OutgoingFrame", "OutgoingTransfers"]

_BLOCKED_MIN_S = 0.02
_BLOCKED_MAX_S = 1.0


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one outgoing transfer.

    Args:
        transfer_id: which one.
        reason: None when the receiver acknowledged it, otherwise why it failed.
    """

    transfer_id: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class OutgoingFrame:
    """What should be sent next.

    Args:
        frame: the frame for the bulk socket.
        data: the raw bytes that go with a `Chunk`, None for the other frames.
    """

    frame: Begin | Chunk | Cancel
    data: memoryview | None = None


@dataclass(slots=True)
class _Transfer:
    """One payload and how far it is."""

    transfer_id: int
    header: bytes
    payload: memoryview
    num_chunks: int
    crc: int = 0
    hashed: int = 0  # chunks that the checksum covers so far
    attempt: int = 1
    was_offered: bool = False  # any attempt's Begin has left
    is_offered: bool = False  # this attempt's Begin has left
    is_granted: bool = False  # and was answered
    next_index: int = 0
    upto: int = 0
    have: int = 0
    misses: int = 0
    last_progress_s: float = 0.0


class OutgoingTransfers:
    """The FIFO of payloads for one peer.

    Args:
        count: called with a word for each frame of the peer that was ignored.
        resend_after_s: seconds without progress after which the payload is offered again.
        resend_max_s: the longest such wait, reached by doubling.
        chunk_bytes: length of a full chunk; other than the default only in tests.
    """

    def __init__(self, *, count: Callable[[str], None], resend_after_s: float, resend_max_s: float, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._count = count
        self._resend_after_s = resend_after_s
        self._resend_max_s = resend_max_s
        self._chunk_bytes = chunk_bytes
        self._queue: deque[_Transfer] = deque()
        self._cancel: Cancel | None = None
        self._blocked_s = 0.0
        self._blocked_until_s: float | None = None

    @property
    def is_idle(self) -> bool:
        """True when nothing is queued, on the wire or to be cancelled."""
        return not self._queue and self._cancel is None

    @property
    def pending_ids(self) -> list[int]:
        """The transfers that have not ended, oldest first."""
        return [transfer.transfer_id for transfer in self._queue]

    def enqueue(self, transfer_id: int, header: bytes, payload: memoryview) -> None:
        """Queue a payload behind those that wait.

        Args:
            transfer_id: larger than all earlier ids of this boot.
            header: opaque bytes, at most 64 KiB.
            payload: contiguous bytes (format "B"); must not change before the transfer has ended.
        """
        self._queue.append(_Transfer(transfer_id, header, payload, count_chunks(len(payload), self._chunk_bytes)))

    def hash_some(self, max_chunks: int) -> int:
        """Advance the checksum of the payload at the head.

        Args:
            max_chunks: how many chunks may be hashed now.

        Returns:
            The number of chunks hashed; 0 when the checksum is complete or nothing is queued.
        """
        if not self._queue:
            return 0
        head = self._queue[0]
        end = min(head.num_chunks, head.hashed + max_chunks)
        done = end - head.hashed
        if done:
            head.crc = crc32(head.payload[head.hashed * self._chunk_bytes : end * self._chunk_bytes], head.crc)
            head.hashed = end
        return done

    def peek(self, now_s: float) -> OutgoingFrame | None:
        """Return what should be sent now, or None; the same answer until a mark or a frame changes the state.

        Args:
            now_s: the caller's clock in seconds.
        """
        if self._blocked_until_s is not None and now_s < self._blocked_until_s:
            return None
        if self._cancel is not None:
            return OutgoingFrame(self._cancel)
        if not self._queue:
            return None
        head = self._queue[0]
        if head.hashed < head.num_chunks:
            return None
        if not head.is_offered:
            return OutgoingFrame(Begin(head.transfer_id, head.attempt, head.header, len(head.payload), head.num_chunks, head.crc))
        if head.is_granted and head.next_index < head.upto:
            start = head.next_index * self._chunk_bytes
            return OutgoingFrame(Chunk(head.transfer_id, head.next_index), head.payload[start : start + self._chunk_bytes])
        return None

    def mark_sent(self, now_s: float) -> None:
        """Say that the socket took what `peek` returned.

        Args:
            now_s: the caller's clock in seconds.
        """
        self._blocked_s = 0.0
        self._blocked_until_s = None
        if self._cancel is not None:
            self._cancel = None
            return
        head = self._queue[0]
        if head.is_offered:
            head.next_index += 1
        else:
            head.is_offered = head.was_offered = True
            head.last_progress_s = now_s

    def mark_blocked(self, now_s: float) -> None:
        """Say that the peer is not reachable or its queue is full: nothing is offered for a while (20 ms, doubled up to 1 s).

        Args:
            now_s: the caller's clock in seconds.
        """
        self._blocked_s = min(_BLOCKED_MAX_S, max(_BLOCKED_MIN_S, 2 * self._blocked_s))
        self._blocked_until_s = now_s + self._blocked_s

    def unblock(self) -> None:
        """Something was heard from the peer: try again at once."""
        self._blocked_s = 0.0
        self._blocked_until_s = None

    def offer_again(self) -> None:
        """Make the offer again at once, and the next wait a short one: it may have gone with a connection, or with another process."""
        self.unblock()
        if self._queue and self._queue[0].is_offered:
            self._repeat(self._queue[0])
            self._queue[0].misses = 0

    def on_time(self, now_s: float) -> None:
        """Offer the payload again when it made no progress for too long.

        Args:
            now_s: the caller's clock in seconds.
        """
        deadline_s = self._resend_deadline_s()
        if deadline_s is None or now_s < deadline_s:
            return
        self._repeat(self._queue[0])

    def _repeat(self, head: _Transfer) -> None:
        head.attempt += 1
        head.misses += 1
        head.is_offered = head.is_granted = False
        self._count("offered_again")

    def deadline_s(self) -> float | None:
        """Return when `on_time` or `peek` should be asked again although nothing arrived; None when never."""
        if self._blocked_until_s is not None and not self.is_idle:
            return self._blocked_until_s
        return self._resend_deadline_s()

    def on_reply(self, frame: ReplyFrame, now_s: float) -> Ended | None:
        """Take a frame of the receiver.

        Args:
            frame: as decoded from the control socket.
            now_s: the caller's clock in seconds.

        Returns:
            The end of the transfer at the head, if this frame ended it.
        """
        self.unblock()
        head = self._queue[0] if self._queue else None
        if head is None or not head.was_offered or frame.transfer_id != head.transfer_id:
            self._count("late_reply")  # ordinary after a repetition, and all that a forged id can cause
            return None
        if isinstance(frame, Grant):
            self._on_grant(head, frame, now_s)
            return None
        self._queue.popleft()
        return Ended(head.transfer_id, None if isinstance(frame, Received) else frame.reason)

    def cancel(self, transfer_id: int) -> Ended | None:
        """Give a payload up; no chunk of it is sent from now on.

        Args:
            transfer_id: which one.

        Returns:
            Its end, or None when it is not pending (any more).
        """
        for position, transfer in enumerate(self._queue):
            if transfer.transfer_id == transfer_id:
                del self._queue[position]
                if transfer.was_offered:
                    self._cancel = Cancel(transfer_id)  # only the head can have been offered: one slot is enough
                return Ended(transfer_id, "cancelled")
        return None

    def _resend_deadline_s(self) -> float | None:
        if not self._queue or not self._queue[0].is_offered:
            return None
        head = self._queue[0]
        return head.last_progress_s + min(self._resend_max_s, self._resend_after_s * (1 << min(head.misses, 32)))

    def _on_grant(self, head: _Transfer, grant: Grant, now_s: float) -> None:
        if not grant.have <= grant.upto <= head.num_chunks or grant.attempt > head.attempt:
            self._count("malformed_grant")
            return
        moved = grant.have > head.have
        if grant.attempt == head.attempt and head.is_offered:
            if not head.is_granted:
                head.is_granted = True
                head.next_index = head.have = grant.have
                # Credit of an earlier attempt is gone: all of it at once would fill the socket.
                head.upto = grant.upto
                head.last_progress_s = now_s
            head.upto = max(head.upto, grant.upto)
        if moved:
            # A grant for an earlier attempt moves no credit, but it shows that chunks arrive: the timer was too early.
            head.have = max(head.have, grant.have)
            head.misses = 0
            head.last_progress_s = now_s
