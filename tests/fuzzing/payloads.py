"""Payloads as a hostile sender would send them: values that are no numbers, and chunks that do not fit together."""

from __future__ import annotations

import random
import struct
from functools import cache

from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.transport.frames import CHUNK_BYTES, Begin, BulkFrame, Cancel, Chunk, count_chunks, encode_frame

Parts = tuple[bytes, ...]
"""The parts of one message of the bulk socket."""

FLOATS = {"nan": float("nan"), "inf": float("inf"), "huge": 3e38, "large": 1e7, "sound": 1e-4, "zeros": 0.0}

WAYS = (
    *("plain",) * 12,
    *("shuffled", "doubled", "lost", "short", "long", "overlapping", "beyond", "foreign"),
    *("cancelled", "again", "conflicting", "false count", "announced", "less", "more", "bad crc"),
)
"""How the chunks of a payload come."""


@cache
def payload_of(values: str, size: int) -> bytes:
    """Bytes of float32 values: all of them sound, or some of them not."""
    if values == "noise":
        return random.Random(size).randbytes(size)
    odd, sound = struct.pack("<f", FLOATS[values]), struct.pack("<f", FLOATS["sound"])
    count = size // 4
    if values in ("nan", "inf"):
        return sound * (count // 2) + odd + sound * (count - count // 2 - 1)
    return odd * count


def frames_of(dice: random.Random, header: bytes, values: str, size: int) -> tuple[int, tuple[Parts, ...]]:
    """The id and the messages of one payload; `size` is what its header asks for."""
    way = dice.choice(WAYS)
    size = max(0, size + {"less": -dice.choice((1, 4, 1 << 20)), "more": dice.choice((1, 4, 1 << 20))}.get(way, 0))
    payload = payload_of(values, -(-size // 4) * 4)[:size]
    transfer_id = dice.getrandbits(31) << 32 | dice.choice((0, 1, 2**32 - 1))
    total = dice.choice((2**30, 2**40, 2**62)) if way == "announced" else size
    num_chunks = min(2**42 - 1, count_chunks(total) + (dice.choice((-1, 1, 2**40)) if way == "false count" and total else 0))
    crc = crc32(payload) ^ (way == "bad crc")
    begin = Begin(transfer_id, dice.choice((1, 1, 2, 2**32 - 1)), header, total, num_chunks, crc)
    chunks = [(i, payload[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]) for i in range(count_chunks(size))]
    frames: list[tuple[BulkFrame, bytes | None]] = [
        (begin, None),
        *((Chunk(transfer_id, i), data) for i, data in _disorder(dice, way, chunks)),
    ]
    where = dice.randrange(1, len(frames) + 1)
    if way == "foreign":
        frames = [(Chunk(transfer_id ^ 1, 0), payload[:100]), *frames]
    elif way == "cancelled":
        frames.insert(where, (Cancel(transfer_id), None))
    elif way == "again":
        frames.insert(where, (Begin(transfer_id, 3, header, total, num_chunks, crc), None))
    elif way == "conflicting":
        frames.insert(where, (Begin(transfer_id, 2, header, total, num_chunks, crc ^ 1), None))
    return transfer_id, tuple((encode_frame(f),) if data is None else (encode_frame(f), data) for f, data in frames)


def _disorder(dice: random.Random, way: str, chunks: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    if not chunks:
        return chunks
    which = dice.randrange(len(chunks))
    index, data = chunks[which]
    match way:
        case "bad crc" if dice.random() < 0.7:
            return 3 * chunks  # it may come again, but not for ever
        case "shuffled":
            dice.shuffle(chunks)
        case "doubled":
            chunks.insert(dice.randrange(which + 1, len(chunks) + 1), (index, bytes(len(data))))
        case "lost":
            del chunks[which]
        case "short":
            chunks[which] = index, data[: dice.randrange(len(data))]
        case "long":
            chunks[which] = index, (data + b"more" * 8)[: CHUNK_BYTES - 1]
        case "overlapping":
            # The bytes of two neighbours in the place of one, and the other one after it.
            chunks.insert(which, (index, (data[len(data) // 2 :] + chunks[(which + 1) % len(chunks)][1])[:CHUNK_BYTES]))
        case "beyond":
            chunks.insert(which, (dice.choice((len(chunks), len(chunks) + 7, 2**42 - 1)), data))
    return chunks
