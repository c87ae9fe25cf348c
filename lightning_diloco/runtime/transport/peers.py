"""The incoming transfers of all peers, and how long the memory of a peer is kept.

A peer occupies memory only after one of its offers was accepted, so strangers cost nothing. A forgotten peer keeps its short
memory of delivered ids, so that it does not deliver twice when it wakes up; at most `MAX_FORGOTTEN` peers, oldest out first.

All peers share the memory of payloads: `buffers` keeps what one has used for the next, for as long as payloads come.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from lightning_diloco.runtime.blocks import Blocks

from .frames import Alive, Begin, BulkFrame, Chunk
from .receiving import IncomingTransfers, Reaction

__all__ = ["MAX_FORGOTTEN", "Accept", "IncomingPeers"]

MAX_FORGOTTEN: Final = 256
"""How many forgotten peers are remembered."""

KEEP_S: Final = 60.0
"""Memory that no payload was written to for so long goes back to the operating system."""

Accept = Callable[[bytes, bytes, int], bool | str]
"""Decides on an offered payload (peer, header, total_bytes) before memory is allocated: True, or False, or a reason."""


class IncomingPeers:
    """One `IncomingTransfers` per peer.

    Args:
        accept: asked once per offer.
        count: called with a word for each frame that was ignored.
        window_chunks: credit per peer.
        abandon_after_s: a half-received payload that makes no progress for so long is freed.
    """

    def __init__(self, *, accept: Accept, count: Callable[[str], None], window_chunks: int, abandon_after_s: float) -> None:
        self._accept = accept
        self._count = count
        self._window_chunks = window_chunks
        self._abandon_after_s = abandon_after_s
        self._present: dict[bytes, IncomingTransfers] = {}
        self._forgotten: OrderedDict[bytes, IncomingTransfers] = OrderedDict()
        self._last_offer_s = -math.inf
        self.buffers = Blocks()
        """Memory of payloads in assembly, and of those that were delivered and are still held by somebody."""

    @property
    def buffer_bytes(self) -> int:
        """Bytes allocated for payloads in assembly, all peers together."""
        return sum(incoming.buffer_bytes for incoming in self._present.values())

    def progress(self, peer: bytes) -> tuple[int, int] | None:
        """(transfer id, chunks held without a gap) of this peer's payload in assembly, or None.

        Args:
            peer: who sends it.
        """
        incoming = self._present.get(peer)
        return None if incoming is None else incoming.progress

    @property
    def num_peers(self) -> int:
        """Peers that occupy memory, the forgotten ones included."""
        return len(self._present) + len(self._forgotten)

    def on_frame(self, peer: bytes, frame: BulkFrame, data: memoryview, now_s: float) -> Reaction:
        """Take a frame of the bulk socket.

        Args:
            peer: who sent it.
            frame: as decoded.
            data: the raw bytes of a `Chunk`, else empty.
            now_s: the caller's clock in seconds.
        """
        if isinstance(frame, Alive):
            return Reaction()
        incoming = self._present.get(peer) or self._forgotten.get(peer) or self._new(peer)
        reaction = Reaction()
        if isinstance(frame, Begin):
            self._last_offer_s = now_s
            reaction = incoming.on_begin(frame, now_s)
        elif isinstance(frame, Chunk):
            reaction = incoming.on_chunk(frame, data, now_s)
        else:
            incoming.on_cancel(frame)
        if incoming.buffer_bytes or (peer not in self._forgotten and not incoming.is_blank):
            self._forgotten.pop(peer, None)
            self._present[peer] = incoming
        return reaction

    def forget(self, peer: bytes) -> None:
        """Free the payload in assembly of a peer that is gone.

        Args:
            peer: who is gone.
        """
        incoming = self._present.pop(peer, None)
        if incoming is not None:
            incoming.abandon()
            self._forgotten[peer] = incoming
            while len(self._forgotten) > MAX_FORGOTTEN:
                self._forgotten.popitem(last=False)

    def expire(self, now_s: float) -> None:
        """Free payloads in assembly that nothing was added to for too long, and memory that is kept for nobody.

        Args:
            now_s: the caller's clock in seconds.
        """
        for incoming in self._present.values():
            incoming.abandon_silent(now_s - self._abandon_after_s)
        if now_s > self._last_offer_s + KEEP_S:
            self.buffers.trim()

    def clear(self) -> None:
        """Free everything."""
        self._present.clear()
        self._forgotten.clear()
        self.buffers.trim()

    def _new(self, peer: bytes) -> IncomingTransfers:
        return IncomingTransfers(
            accept=lambda header, total_bytes: self._accept(peer, header, total_bytes),
            count=self._count,
            window_chunks=self._window_chunks,
            memory=self.buffers,
        )
