"""Raw sockets that follow no rule: nothing is raised, nothing is delivered, all is counted, honest peers are served."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from lightning_diloco.runtime.transport import MAX_CONTROL_BYTES, SYNCER, LearnerTransport
from lightning_diloco.runtime.transport.frames import Alive, Begin, Cancel, Chunk, Grant, Received, Refused, encode_frame, seal, unseal
from tests.runtime.transport_helpers import MIB, NONCE, Pair, RawPeer, accept_all

EVIL = b"evil-peer-nonce!"


@pytest.fixture(params=["tcp", "inproc"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(request.param, accept=lambda peer, header, total_bytes: total_bytes <= 64 * MIB)
    pair.meet()
    yield pair
    pair.close()


def _is_still_served(pair: Pair) -> None:
    """The honest learner sends and receives; nobody else delivered anything."""
    pair.syncer_events.clear()
    pair.learner.send_payload(SYNCER, b"honest", b"up")
    pair.syncer.send_payload(NONCE, b"honest", b"down")
    pair.until(lambda: len(pair.received()) == 2 and len(pair.delivered()) == 2)
    assert {(e.peer, bytes(e.payload)) for e in pair.received()} == {(NONCE, b"up"), (SYNCER, b"down")}


def _drops_become(pair: Pair, expected: dict[str, int]) -> None:
    pair.until(lambda: pair.syncer.stats.drops == expected, limit_s=5.0)


def test_garbage_on_control_is_counted(pair: Pair) -> None:
    raw = RawPeer(pair, EVIL)
    garbage = [
        [b""],
        [b"\x00"],
        [b"\x03hello"],
        [b"\x02"],
        [b"\x02\xff\xff"],
        [b"\x02" + seal(b"\x91" * 50_000)],
        [b"\x02" + encode_frame(Begin(1, 1, b"", 0, 0, 0))],
        [b"\x02" + seal(msgspec.msgpack.encode({"k": "grant", "transfer_id": 1, "attempt": 1, "have": 0, "upto": 1, "more": 1}))],
        [b"\x02" + seal(msgspec.msgpack.encode({"k": "grant", "transfer_id": "1", "attempt": 1, "have": 0, "upto": 1}))],
        [seal(b"\x01two"), seal(b"\x01parts")],
        [b"\x01"] * 1000,
    ]
    for parts in garbage:
        raw.control.send_multipart(parts)
    for frame in (Grant(1, 1, 0, 2**41), Received(1), Refused(1, "refused")):
        raw.control.send(b"\x02" + encode_frame(frame))
    _drops_become(pair, {"malformed_control": len(garbage), "late_reply": 3})
    assert pair.syncer_events == []
    _is_still_served(pair)


def test_garbage_on_bulk_is_counted(pair: Pair) -> None:
    raw = RawPeer(pair, EVIL)
    begin = encode_frame(Begin(1, 1, b"", 3, 1, 0))
    chunk = encode_frame(Chunk(1, 0))
    garbage = [
        [b""],
        [b"garbage"],
        [begin[:-1]],
        [begin + b"\x00"],
        [begin, b"extra"],
        [chunk],
        [chunk, b"abc", b"more"],
        [encode_frame(Begin(1, 1, bytes(70_000), 3, 1, 0))],
        [encode_frame(Begin(-5, 1, b"", 3, 1, 0))],
        [encode_frame(Begin(1, 0, b"", 3, 1, 0))],
        [encode_frame(Received(1))],
        [seal(b"\xc1")] * 500,
        [seal(b"\x91" * 50_000)],
    ]
    for parts in garbage:
        raw.bulk.send_multipart(parts)
    raw.say(Chunk(7, 0), b"abc")
    raw.say(Cancel(7))
    _drops_become(pair, {"malformed_bulk": len(garbage), "foreign_chunk": 1, "late_cancel": 1})
    assert pair.syncer._incoming.num_peers == 0
    assert pair.syncer_events == []
    _is_still_served(pair)


def test_chunks_that_are_truncated_oversized_overlapping_or_beyond_credit_deliver_nothing(pair: Pair) -> None:
    raw = RawPeer(pair, EVIL)
    raw.say(Begin(9, 1, b"", 20 * MIB, 20, 0))
    assert raw.hear() == Grant(9, 1, 0, 8)
    raw.say(Chunk(9, 0), bytes(MIB - 1))
    raw.say(Chunk(9, 0), b"")
    raw.say(Chunk(9, 8), bytes(MIB))
    raw.say(Chunk(9, 19), bytes(MIB))
    raw.say(Chunk(9, 20), bytes(MIB))
    raw.say(Chunk(9, 1), bytes(MIB))
    raw.say(Chunk(9, 1), b"\xff" * MIB)
    _drops_become(pair, {"chunk_of_wrong_length": 2, "chunk_beyond_credit": 3, "duplicate_chunk": 1})
    assert pair.syncer_events == []
    assert pair.syncer._incoming.buffer_bytes == 20 * MIB
    _is_still_served(pair)


def test_strangers_that_are_refused_occupy_no_memory(pair: Pair) -> None:
    for k in range(50):
        raw = RawPeer(pair, b"stranger-%07d" % k)
        raw.say(Begin(1, 1, b"", 1 << 40, 1 << 20, 0))
        assert raw.hear() == Refused(1, "refused")
    assert pair.syncer._incoming.num_peers == 0
    assert len(pair.syncer_events) == 50
    _is_still_served(pair)


@pytest.mark.parametrize("routing_id", [None, b"x", b"b" + bytes(15), b"c" + bytes(17), b"B" + bytes(16), b"c" * 255])
def test_a_malformed_identity_is_counted(pair: Pair, routing_id: bytes | None) -> None:
    pair.dial_raw(pair.syncer.control_endpoint, routing_id).send(seal(b"\x01hello"))
    bulk = pair.dial_raw(pair.syncer.bulk_endpoint, routing_id)
    bulk.send_multipart([encode_frame(Begin(1, 1, b"", 0, 0, 0))])
    _drops_become(pair, {"malformed_identity": 2})
    assert pair.syncer_events == []
    _is_still_served(pair)


def test_an_identity_of_the_other_channel_is_malformed(pair: Pair) -> None:
    pair.dial_raw(pair.syncer.control_endpoint, b"b" + EVIL).send(seal(b"\x01hello"))
    pair.dial_raw(pair.syncer.bulk_endpoint, b"c" + EVIL).send(encode_frame(Begin(1, 1, b"", 0, 0, 0)))
    _drops_become(pair, {"malformed_identity": 2})
    assert pair.syncer_events == []
    _is_still_served(pair)


def test_one_peers_frames_do_not_touch_another_peers_transfers(pair: Pair) -> None:
    payload = bytes(30 * MIB)
    transfer_id = pair.learner.send_payload(SYNCER, b"honest", payload)
    pair.until(lambda: pair.syncer.stats.bytes_up > 0)
    raw = RawPeer(pair, EVIL)
    raw.say(Chunk(transfer_id, 29), b"\xff" * MIB)
    raw.say(Cancel(transfer_id))
    for frame in (Received(transfer_id), Refused(transfer_id, "refused")):
        raw.control.send(b"\x02" + encode_frame(frame))
    pair.until(lambda: bool(pair.delivered()))
    assert pair.received()[0].payload == payload
    pair.until(lambda: sum(pair.syncer.stats.drops.values()) == 4)


def test_a_newer_connection_takes_an_identity_over(pair: Pair) -> None:
    for _ in range(2):
        raw = RawPeer(pair, EVIL)
        raw.say(Begin(1, 1, b"", 0, 0, 0))
        assert raw.hear() == Received(1)
        raw.control.send(seal(b"\x01hello"))
        pair.until(lambda: bool(pair.syncer_events))
        pair.syncer_events.clear()
    assert pair.syncer.send_control(EVIL, b"to the newer one")
    assert raw.control.poll(2000)
    assert raw.control.recv() == seal(b"\x01to the newer one")


def test_too_long_control_messages_deliver_nothing(pair: Pair) -> None:
    raw = RawPeer(pair, EVIL)
    # Beyond what the same message would have on an encrypted link.
    raw.control.send(seal(b"\x01" + bytes(MAX_CONTROL_BYTES + 1000)))
    if pair.syncer.control_endpoint.startswith("tcp"):
        pair.steps_for(0.2)
        assert pair.syncer.stats.drops == {}  # the connection is cut at the announced length, nothing is read
    else:
        _drops_become(pair, {"oversized_control": 1})
    _is_still_served(pair)
    assert all(getattr(event, "peer", None) != EVIL for event in pair.syncer_events)


def test_a_turned_bit_costs_a_frame_or_a_message_and_is_believed_nowhere(pair: Pair) -> None:
    raw = RawPeer(pair, EVIL)
    frame, message = encode_frame(Begin(1, 1, b"hh", 3, 1, 9)), seal(b"\x01hello")
    for bit in range(8 * len(frame)):
        raw.bulk.send(_turned(frame, bit))
    for bit in range(8, 8 * len(message)):  # the first byte tells messages from frames
        raw.control.send(_turned(message, bit))
    _drops_become(pair, {"malformed_bulk": 8 * len(frame), "damaged_control": 8 * len(message) - 8})
    assert pair.syncer_events == [] and pair.syncer._incoming.num_peers == 0
    _is_still_served(pair)


def _turned(data: bytes, bit: int) -> bytes:
    turned = bytearray(data)
    turned[bit // 8] ^= 1 << bit % 8
    return bytes(turned)


def test_random_frames_raise_nothing_and_deliver_nothing(pair: Pair) -> None:
    raw = RawPeer(pair, EVIL)
    rng = random.Random(1)
    templates = [encode_frame(f) for f in (Begin(1, 1, b"hh", 3, 1, 9), Chunk(1, 0), Cancel(1), Alive(), Grant(1, 1, 0, 1), Received(1))]
    for k in range(600):
        inner = bytearray(unseal(rng.choice(templates)) or b"")
        for _ in range(rng.randrange(4)):
            inner[rng.randrange(len(inner))] = rng.randrange(256)
        frame = seal(bytes(inner))  # past the checksum, to what it protects
        parts = [frame] + [rng.randbytes(rng.randrange(9)) for _ in range(rng.randrange(3))]
        raw.bulk.send_multipart(parts)
        raw.control.send(b"\x02" + frame)
        if k % 20 == 0:
            pair.step()
    _is_still_served(pair)
    assert all(getattr(event, "peer", None) == NONCE for event in pair.syncer_events if not hasattr(event, "reason"))


def test_a_learner_survives_a_syncer_that_talks_garbage() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    control, bulk = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    for sock in (control, bulk):
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.bind("tcp://127.0.0.1:0")
    learner = LearnerTransport(control.getsockopt_string(zmq.LAST_ENDPOINT), nonce=NONCE, accept=accept_all, context=context)
    learner.connect()
    learner.connect_bulk(bulk.getsockopt_string(zmq.LAST_ENDPOINT))
    transfer_id = learner.send_payload(SYNCER, b"h", b"abc")
    while not bulk.poll(0):
        learner.poll(0.01)
    assert learner.send_control(SYNCER, b"hello") and control.recv_multipart() == [b"c" + NONCE, seal(b"\x01hello")]
    control.send_multipart([b"c" + NONCE, b"\x02" + encode_frame(Grant(transfer_id, 1, 0, 2**41))])
    control.send_multipart([b"c" + NONCE, b"\x02" + encode_frame(Received(transfer_id + 1))])
    control.send_multipart([b"c" + NONCE, b"junk", b"junk"])
    bulk.send_multipart([b"b" + NONCE, b"junk"])
    bulk.send_multipart([b"b" + NONCE])
    bulk.send_multipart([b"b" + NONCE, encode_frame(Begin(1, 1, b"", 3, 1, zlib.crc32(b"abc")))])
    for _ in range(50):
        assert learner.poll(0.01) == []
    assert learner.stats.drops.pop("malformed_bulk") in (1, 2)  # a ROUTER may swallow an empty message
    assert learner.stats.drops == {"malformed_grant": 1, "late_reply": 1, "malformed_control": 1}
    learner.close()
    control.close()
    bulk.close()
    context.term()
