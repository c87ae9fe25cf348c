"""What `Transport.poll` returns.

``peer`` is the nonce of a learner's process on the syncer's side and `SYNCER` on the learner's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .frames import RefusalReason

__all__ = [
    "SYNCER",
    "ControlReceived",
    "KeyRevoked",
    "PayloadDelivered",
    "PayloadFailed",
    "PayloadReceived",
    "PayloadRefused",
    "TransportEvent",
]

SYNCER: Final = b""
"""The only peer of a learner."""


@dataclass(frozen=True, slots=True)
class ControlReceived:
    """A control message has arrived.

    Args:
        peer: who sent it.
        data: its bytes, at most 1 MiB.
    """

    peer: bytes
    data: bytes


@dataclass(frozen=True, slots=True)
class PayloadReceived:
    """A payload has arrived whole, its checksum is right, and its sender has been told.

    Args:
        peer: who sent it.
        header: as the sender gave it.
        payload: its bytes, writable; the receiver of this event owns them.
    """

    peer: bytes
    header: bytes
    payload: memoryview


@dataclass(frozen=True, slots=True)
class PayloadRefused:
    """A peer's payload was refused, and its sender has been told.

    Args:
        peer: who sent it.
        header: as the sender gave it; None where it is not known.
        reason: "bad_checksum", "oversized" or "refused".
    """

    peer: bytes
    header: bytes | None
    reason: RefusalReason


@dataclass(frozen=True, slots=True)
class PayloadDelivered:
    """A payload of ours was delivered at the other end.

    Args:
        peer: who received it.
        transfer_id: as returned by `send_payload`.
    """

    peer: bytes
    transfer_id: int


@dataclass(frozen=True, slots=True)
class PayloadFailed:
    """A payload of ours was given up; its bytes may be reused.

    Args:
        peer: who should have received it.
        transfer_id: as returned by `send_payload`.
        reason: "bad_checksum", "oversized" or "refused" (the receiver's word), "cancelled" or "forgotten" (ours).
    """

    peer: bytes
    transfer_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class KeyRevoked:
    """The key with which a peer came is not admitted any more: nothing of it is taken from here on.

    Args:
        peer: who is shut out.
    """

    peer: bytes


TransportEvent = ControlReceived | PayloadReceived | PayloadRefused | PayloadDelivered | PayloadFailed | KeyRevoked
"""Everything that `Transport.poll` may return."""
