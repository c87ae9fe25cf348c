"""The receiving half of a transfer, without a socket and without a clock.

One `IncomingTransfers` per peer, with at most one payload in assembly. Memory: one payload buffer, allocated only after the
``accept`` callback agreed to its header and size, and what the peer may have under way, `window_chunks` chunks. Chunks are
written to their place in the buffer, in any order inside the granted window; the checksum follows the gapless prefix. The buffer's memory
is used again when nobody holds a view of it any more (`runtime/blocks.py`). It is not cleared: every byte was written before a payload is
delivered, or it is not.

Delivery is idempotent: what became of the last `DONE_MEMORY` transfers is remembered, and a repeated offer gets the same
answer and no second delivery. An id below the newest accepted one of the same boot belongs to a transfer that its sender has
ended (the sender has one on the wire): it is ignored. An offer with a new id replaces the payload in assembly.

A payload that is complete and does not have its checksum was damaged on the way, or its sender is wrong. It is taken once more under
the same id, from its first chunk, when its sender offers it again; after `MAX_DAMAGED` such times it is refused for good.

Garbage is counted by name and changes nothing: chunks of other transfers, beyond the credit, of the wrong length, twice.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from lightning_diloco.runtime.blocks import Blocks
from lightning_diloco.runtime.checksum import crc32

from .frames import (
    CHUNK_BYTES,
    Begin,
    Cancel,
    Chunk,
    Grant,
    Received,
    RefusalReason,
    Refused,
    ReplyFrame,
    count_chunks,
)

__all__ = ["DONE_MEMORY", "MAX_DAMAGED", "AcceptPayload", "Delivery", "IncomingTransfers", "Reaction"]

_LOGGER = logging.getLogger(__name__)

DONE_MEMORY: Final = 256
"""How many ended transfers are remembered per peer, to answer a repeated offer as the first one."""

MAX_DAMAGED: Final = 3
"""How often a payload may arrive without its checksum: links do that once in a long while, a sender that is wrong does it every time."""

AcceptPayload = Callable[[bytes, int], bool | str]
"""Decides on (header, total_bytes): True, False (refused), or "oversized" / "refused"."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A payload that is complete, or that was refused.

    Args:
        header: as the sender gave it.
        payload: the bytes, writable, owned by whoever holds this view, a slice of it or a tensor on it; None when refused.
        reason: why it was refused; None when delivered.
    """

    header: bytes
    payload: memoryview | None
    reason: RefusalReason | None


@dataclass(frozen=True, slots=True)
class Reaction:
    """What a frame leads to.

    Args:
        reply: to be sent to the peer on control, if any.
        delivery: to be told to the user, if any.
    """

    reply: ReplyFrame | None = None
    delivery: Delivery | None = None


_NOTHING = Reaction()


@dataclass(slots=True)
class _Assembly:
    """The payload in assembly."""

    begin: Begin
    attempt: int
    buffer: memoryview
    held: bytearray  # one byte per chunk
    last_heard_s: float
    prefix: int = 0  # chunks held without a gap from 0
    crc: int = 0  # of the prefix
    upto: int = 0
    damaged: int = 0  # times that it was complete and did not have its checksum


@dataclass(frozen=True, slots=True)
class _Done:
    """How a transfer ended; the fingerprint tells a repetition from other bytes under the same id."""

    fingerprint: tuple[int, int, int]
    reply: ReplyFrame | None


@dataclass(slots=True)
class _Memory:
    """The ended transfers of a peer, oldest first, at most `DONE_MEMORY`."""

    done: OrderedDict[int, _Done] = field(default_factory=OrderedDict)

    def add(self, transfer_id: int, done: _Done) -> None:
        """Remember how a transfer ended and drop the oldest memory when there are too many."""
        self.done[transfer_id] = done
        while len(self.done) > DONE_MEMORY:
            self.done.popitem(last=False)


class IncomingTransfers:
    """What one peer sends to us.

    Args:
        accept: asked once per offer, before anything is allocated.
        count: called with a word for each frame that was ignored.
        window_chunks: how many chunks beyond the gapless prefix the peer may send.
        chunk_bytes: length of a full chunk; other than the default only in tests.
        memory: where payload buffers come from; None: blocks of its own.
    """

    def __init__(
        self,
        *,
        accept: AcceptPayload,
        count: Callable[[str], None],
        window_chunks: int,
        chunk_bytes: int = CHUNK_BYTES,
        memory: Blocks | None = None,
    ) -> None:
        self._accept = accept
        self._count = count
        self._window_chunks = window_chunks
        self._chunk_bytes = chunk_bytes
        self._buffers = Blocks() if memory is None else memory
        self._assembly: _Assembly | None = None
        self._memory = _Memory()
        self._newest_id = -1

    @property
    def is_blank(self) -> bool:
        """True when no offer of the peer was ever accepted: there is nothing worth keeping."""
        return self._newest_id < 0

    @property
    def progress(self) -> tuple[int, int] | None:
        """(transfer id, chunks held without a gap) of the payload in assembly, or None."""
        return None if self._assembly is None else (self._assembly.begin.transfer_id, self._assembly.prefix)

    @property
    def buffer_bytes(self) -> int:
        """Bytes allocated for the payload in assembly."""
        return 0 if self._assembly is None else len(self._assembly.buffer)

    def on_begin(self, begin: Begin, now_s: float) -> Reaction:
        """Take an offer.

        Args:
            begin: as decoded from the bulk socket.
            now_s: the caller's clock in seconds.
        """
        done = self._memory.done.get(begin.transfer_id)
        if done is not None:
            return self._answer_again(begin, done)
        assembly = self._assembly
        if assembly is not None and assembly.begin.transfer_id == begin.transfer_id:
            return self._resume(assembly, begin, now_s)
        if begin.transfer_id >> 32 == self._newest_id >> 32 and begin.transfer_id < self._newest_id:
            self._count("stale_begin")
            return _NOTHING
        if assembly is not None:
            self._count("superseded")  # its sender has moved on; a Cancel was lost
            self._assembly = None
        reason = self._judge(begin)
        if reason is not None:
            return self._refuse(begin, reason)
        try:
            buffer = self._buffers.view(begin.total_bytes)
            held = bytearray(begin.num_chunks)
        except (MemoryError, OverflowError):
            self._count("no_memory")
            return self._refuse(begin, "oversized")
        self._newest_id = begin.transfer_id
        self._assembly = _Assembly(begin, begin.attempt, buffer, held, now_s)
        if begin.num_chunks == 0:
            return self._finish(self._assembly)
        return Reaction(reply=self._grant(self._assembly))

    def on_chunk(self, chunk: Chunk, data: memoryview, now_s: float) -> Reaction:
        """Take one chunk.

        Args:
            chunk: its identity.
            data: its bytes; copied.
            now_s: the caller's clock in seconds.
        """
        assembly = self._assembly
        if assembly is None or assembly.begin.transfer_id != chunk.transfer_id:
            self._count("late_chunk" if chunk.transfer_id in self._memory.done else "foreign_chunk")
            return _NOTHING
        if chunk.index >= assembly.upto:
            self._count("chunk_beyond_credit")
            return _NOTHING
        if assembly.held[chunk.index]:
            self._count("duplicate_chunk")
            return _NOTHING
        start = chunk.index * self._chunk_bytes
        end = min(start + self._chunk_bytes, assembly.begin.total_bytes)
        if len(data) != end - start:
            self._count("chunk_of_wrong_length")
            return _NOTHING
        assembly.buffer[start:end] = data
        assembly.held[chunk.index] = 1
        assembly.last_heard_s = now_s
        if not self._extend_prefix(assembly):
            return _NOTHING
        if assembly.prefix == assembly.begin.num_chunks:
            return self._finish(assembly)
        return Reaction(reply=self._grant(assembly))

    def on_cancel(self, cancel: Cancel) -> None:
        """Free the buffer of a transfer that its sender gave up, and remember that it must not come again.

        Args:
            cancel: as decoded from the bulk socket.
        """
        assembly = self._assembly
        if assembly is None or assembly.begin.transfer_id != cancel.transfer_id:
            self._count("late_cancel")
            return
        self._assembly = None
        self._memory.add(cancel.transfer_id, _Done(_fingerprint(assembly.begin), None))

    def abandon(self) -> None:
        """Free the payload in assembly, if any; a repeated offer starts it anew."""
        if self._assembly is not None:
            self._assembly = None
            self._count("abandoned")

    def abandon_silent(self, before_s: float) -> None:
        """Free the payload in assembly when nothing of it has arrived since a moment.

        Args:
            before_s: that moment on the caller's clock.
        """
        if self._assembly is not None and self._assembly.last_heard_s < before_s:
            self.abandon()

    def _judge(self, begin: Begin) -> RefusalReason | None:
        if begin.num_chunks != count_chunks(begin.total_bytes, self._chunk_bytes):
            self._count("malformed_begin")
            return "refused"
        try:
            verdict = self._accept(begin.header, begin.total_bytes)
        except Exception:  # a header is the peer's bytes: parsing it may fail and must cost that peer only
            _LOGGER.exception("the accept callback failed for a payload of %d bytes; it is refused", begin.total_bytes)
            self._count("accept_failed")
            return "refused"
        if verdict is True:
            return None
        return "oversized" if verdict == "oversized" else "refused"

    def _refuse(self, begin: Begin, reason: RefusalReason) -> Reaction:
        """Refuse an offer; not remembered, so that strangers occupy no memory: a repetition is judged again."""
        return Reaction(Refused(begin.transfer_id, reason), Delivery(begin.header, None, reason))

    def _answer_again(self, begin: Begin, done: _Done) -> Reaction:
        if done.fingerprint != _fingerprint(begin):
            self._count("conflicting_begin")
            return Reaction(reply=Refused(begin.transfer_id, "refused"))
        self._count("duplicate_begin")
        return Reaction(reply=done.reply)

    def _resume(self, assembly: _Assembly, begin: Begin, now_s: float) -> Reaction:
        if _fingerprint(assembly.begin) != _fingerprint(begin):
            self._count("conflicting_begin")
            return Reaction(reply=Refused(begin.transfer_id, "refused"))
        assembly.attempt = max(assembly.attempt, begin.attempt)
        assembly.last_heard_s = now_s
        return Reaction(reply=self._grant(assembly))

    def _grant(self, assembly: _Assembly) -> Grant:
        assembly.upto = min(assembly.begin.num_chunks, assembly.prefix + self._window_chunks)
        return Grant(assembly.begin.transfer_id, assembly.attempt, assembly.prefix, assembly.upto)

    def _extend_prefix(self, assembly: _Assembly) -> bool:
        end = assembly.held.find(0, assembly.prefix)
        if end < 0:
            end = assembly.begin.num_chunks
        if end == assembly.prefix:
            return False
        fresh = assembly.buffer[assembly.prefix * self._chunk_bytes : end * self._chunk_bytes]
        assembly.crc = crc32(fresh, assembly.crc)
        assembly.prefix = end
        return True

    def _finish(self, assembly: _Assembly) -> Reaction:
        begin = assembly.begin
        reply: ReplyFrame
        if assembly.crc != begin.crc:
            self._count("bad_checksum")
            assembly.damaged += 1
            if assembly.damaged < MAX_DAMAGED:
                # No answer: its sender hears nothing, offers it again, and is told that nothing is held.
                assembly.held[:] = bytes(begin.num_chunks)
                assembly.prefix = assembly.crc = 0
                return _NOTHING
        self._assembly = None
        if assembly.crc != begin.crc:
            reply = Refused(begin.transfer_id, "bad_checksum")
            delivery = Delivery(begin.header, None, "bad_checksum")
        else:
            reply = Received(begin.transfer_id)
            delivery = Delivery(begin.header, assembly.buffer, None)
        self._memory.add(begin.transfer_id, _Done(_fingerprint(begin), reply))
        return Reaction(reply, delivery)


def _fingerprint(begin: Begin) -> tuple[int, int, int]:
    return begin.total_bytes, begin.crc, crc32(begin.header)
