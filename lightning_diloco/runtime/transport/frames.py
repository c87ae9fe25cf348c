"""The frames of the transport: their fields, their limits and their bytes.

Two sockets join a learner to the syncer. The *bulk* socket carries, from the sender of a payload to its receiver, `Begin`,
`Chunk` (followed by one raw part with the bytes) and `Cancel`, in this order of sending; and now and then a learner's `Alive`.
The *control* socket carries the user's messages and, from the receiver of a payload back to its sender, `Grant`, `Received` and
`Refused`: a credit must not queue behind the payload that waits for it. One leading byte tells the user's control messages from
frames of ours.

Every frame and every message ends with the CRC-32 of what stands before it (`seal`): a bit that was turned on the way costs that
message, which is then as good as lost, and both ends live with lost ones. Without it one bit of an id or a counter could be
believed: a `Begin` whose id had grown made its receiver take all later payloads of that sender for stale ones, for ever.

Bytes from the network are hostile: the decoders here return None for anything that is not exactly one of the frames with
every field inside its limits, and never raise.

A **transfer id** is ``boot << 32 | counter``. ``boot`` is drawn anew by every transport object, so that a restarted syncer
never meets the receiver's memory of its predecessor's ids; ``counter`` grows with every payload, so that of two ids of one
boot the larger one is the later one.

References: arXiv 2604.21428 leaves the wire open; the rules are those of the protocol's section "The wire".
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from lightning_diloco.runtime.checksum import crc32

__all__ = [
    "BULK_PREFIX",
    "CHUNK_BYTES",
    "CONTROL_PREFIX",
    "FRAME_KIND",
    "MAX_CONTROL_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_MESSAGE_BYTES",
    "NONCE_BYTES",
    "SEAL_BYTES",
    "USER_KIND",
    "Alive",
    "Begin",
    "BulkFrame",
    "Cancel",
    "Chunk",
    "Grant",
    "Received",
    "RefusalReason",
    "Refused",
    "ReplyFrame",
    "count_chunks",
    "decode_bulk",
    "decode_reply",
    "encode_frame",
    "parse_routing_id",
    "seal",
    "unseal",
]

CHUNK_BYTES: Final = 1 << 20
"""Bytes of one chunk; the last chunk of a payload may be shorter. 1 MiB is where ZeroMQ's throughput is flat."""

MAX_CONTROL_BYTES: Final = 1 << 20
"""The longest control message of the user, in bytes."""

MAX_HEADER_BYTES: Final = 1 << 16
"""The longest header of a payload, in bytes."""

NONCE_BYTES: Final = 16
"""Length of the nonce of a learner's process; it names the peer on both sockets."""

CONTROL_PREFIX: Final = b"c"
"""First byte of the routing id of a control socket; the nonce follows."""

BULK_PREFIX: Final = b"b"
"""First byte of the routing id of a bulk socket; the nonce follows."""

USER_KIND: Final = b"\x01"
"""First byte of a control message of the user."""

FRAME_KIND: Final = b"\x02"
"""First byte of a transport frame on the control socket."""

SEAL_BYTES: Final = 4
"""Length of the checksum at the end of every frame and message."""

MAX_MESSAGE_BYTES: Final = MAX_CONTROL_BYTES + len(USER_KIND) + SEAL_BYTES
"""The longest message of the user as it travels."""

RefusalReason = Literal["bad_checksum", "oversized", "refused"]
"""Why a receiver refuses a payload for good."""

_Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 42)]
_Attempt = Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]
_Crc = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Header = Annotated[bytes, msgspec.Meta(max_length=MAX_HEADER_BYTES)]


class Begin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="begin", tag_field="k"):
    """A payload is offered; no chunk follows before the receiver's grant.

    Args:
        transfer_id: identity of the payload, see the module's docstring.
        attempt: 1 for the first offer, one more for every repetition; grants echo it.
        header: the user's description of the payload, opaque here.
        total_bytes: length of the payload.
        num_chunks: chunks of `CHUNK_BYTES` that hold it.
        crc: zlib.crc32 of the whole payload.
    """

    transfer_id: _Id
    attempt: _Attempt
    header: _Header
    total_bytes: _Id
    num_chunks: _Count
    crc: _Crc


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="chunk", tag_field="k"):
    """One chunk; the raw bytes are the next part of the same message.

    Args:
        transfer_id: the payload that it belongs to.
        index: its place, from 0.
    """

    transfer_id: _Id
    index: _Count


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cancel", tag_field="k"):
    """The sender gave the payload up; the receiver frees its buffer and never delivers it.

    Args:
        transfer_id: the payload that was given up.
    """

    transfer_id: _Id


class Alive(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="alive", tag_field="k"):
    """Nothing but bytes: it shows ZeroMQ at the other end whether anybody there still takes what this connection brings."""


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="grant", tag_field="k"):
    """Credit of the receiver.

    Args:
        transfer_id: the payload that the credit is for.
        attempt: of the newest `Begin` that the receiver has seen.
        have: chunks held without a gap from index 0; a repeated attempt goes on from here.
        upto: chunks with an index below this one may be sent.
    """

    transfer_id: _Id
    attempt: _Attempt
    have: _Count
    upto: _Count


class Received(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="received", tag_field="k"):
    """End-to-end acknowledgement: the whole payload is there, its checksum is right, it was delivered.

    Args:
        transfer_id: the payload that was delivered.
    """

    transfer_id: _Id


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused", tag_field="k"):
    """The payload is refused for good.

    Args:
        transfer_id: the payload that was refused.
        reason: one of `RefusalReason`.
    """

    transfer_id: _Id
    reason: RefusalReason


BulkFrame = Begin | Chunk | Cancel | Alive
"""Frames of the bulk socket, from the sender of a payload; an `Alive` belongs to no payload."""

ReplyFrame = Grant | Received | Refused
"""Frames of the control socket, from the receiver of a payload."""

_encoder = msgspec.msgpack.Encoder()
_bulk_decoder = msgspec.msgpack.Decoder(BulkFrame)
_reply_decoder = msgspec.msgpack.Decoder(ReplyFrame)
_DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)


def seal(data: bytes) -> bytes:
    """Add the checksum."""
    return data + crc32(data).to_bytes(SEAL_BYTES, "little")


def unseal(data: bytes | memoryview) -> memoryview | None:
    """What stands before the checksum, or None when it is not the checksum of that."""
    view = memoryview(data)
    body, checksum = view[:-SEAL_BYTES], view[-SEAL_BYTES:]
    return body if len(view) >= SEAL_BYTES and crc32(body) == int.from_bytes(checksum, "little") else None


def encode_frame(frame: BulkFrame | ReplyFrame) -> bytes:
    """Encode one frame as msgpack, sealed."""
    return seal(_encoder.encode(frame))


def decode_bulk(data: bytes | memoryview) -> BulkFrame | None:
    """Decode a frame of the bulk socket; None when the bytes are not one."""
    body = unseal(data)
    if body is None:
        return None
    try:
        frame: BulkFrame = _bulk_decoder.decode(body)
    except _DECODE_ERRORS:
        return None
    return frame


def decode_reply(data: bytes | memoryview) -> ReplyFrame | None:
    """Decode a transport frame of the control socket; None when the bytes are not one."""
    body = unseal(data)
    if body is None:
        return None
    try:
        frame: ReplyFrame = _reply_decoder.decode(body)
    except _DECODE_ERRORS:
        return None
    return frame


def count_chunks(total_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Return how many chunks hold a payload.

    Args:
        total_bytes: length of the payload.
        chunk_bytes: length of a full chunk.
    """
    return -(-total_bytes // chunk_bytes)


def parse_routing_id(routing_id: bytes, prefix: bytes) -> bytes | None:
    """Return the nonce in a routing id, or None when it has not the form of this socket.

    Args:
        routing_id: as reported by the ROUTER socket.
        prefix: `CONTROL_PREFIX` or `BULK_PREFIX`.
    """
    if len(routing_id) != len(prefix) + NONCE_BYTES or not routing_id.startswith(prefix):
        return None
    return routing_id[len(prefix) :]
