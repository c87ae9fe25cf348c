"""Payloads of a learner on their way: the same one is never there twice.

Whoever asks again and again and takes nothing must not fill the memory. What is on its way ends with an event of the transport, and goes
once more after that if it was asked for meanwhile: the syncer may have had it and lost it. Lives on the background thread.
"""

from __future__ import annotations

from lightning_diloco.runtime.transport import SYNCER, LearnerTransport

__all__ = ["Outbox"]


class Outbox:
    """What is on its way to the syncer.

    Args:
        transport: of this learner.
    """

    def __init__(self, transport: LearnerTransport) -> None:
        self._transport = transport
        self._on_way: dict[int, bytes] = {}
        self._again: dict[bytes, memoryview] = {}

    def send(self, header: bytes, payload: memoryview) -> None:
        """Send a payload, now or when the same one that is on its way has ended."""
        if self.is_on_way(header):
            self._again[header] = payload
        else:
            self._on_way[self._transport.send_payload(SYNCER, header, payload)] = header

    def is_on_way(self, header: bytes) -> bool:
        """Whether the payload with this header is sent, or waits to be, at this moment."""
        return header in self._on_way.values()

    def ended(self, transfer_id: int) -> None:
        """The transport is done with this one, delivered or not."""
        header = self._on_way.pop(transfer_id, None)
        payload = None if header is None else self._again.pop(header, None)
        if header is not None and payload is not None:
            self.send(header, payload)
