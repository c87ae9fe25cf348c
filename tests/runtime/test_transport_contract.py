"""One contract suite for the transport, over tcp and in-process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_diloco.errors import ConfigurationError, LocalProtocolError
from lightning_diloco.runtime.transport import (
    CHUNK_BYTES,
    MAX_CONTROL_BYTES,
    MAX_HEADER_BYTES,
    SYNCER,
    ControlReceived,
    LearnerTransport,
    PayloadDelivered,
    PayloadFailed,
    PayloadReceived,
    PayloadRefused,
    SyncerTransport,
    TransportOptions,
)
from lightning_diloco.runtime.transport.frames import Begin, Chunk, Grant, Received, Refused
from lightning_diloco.runtime.transport.receiving import MAX_DAMAGED
from tests.runtime.transport_helpers import MIB, NONCE, Pair, RawPeer, accept_all, make_bytes

SIZES = {"empty": 0, "one_byte": 1, "one_chunk": CHUNK_BYTES, "5.5_chunks": 11 * CHUNK_BYTES // 2, "32_MiB": 32 * MIB}


@pytest.fixture(params=["tcp", "inproc"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(kind: str) -> Iterator[Pair]:
    pair = Pair(kind)
    pair.meet()
    yield pair
    pair.close()


def test_control_passes_both_ways(pair: Pair) -> None:
    assert pair.learner.send_control(SYNCER, b"question")
    pair.until(lambda: bool(pair.syncer_events))
    assert pair.syncer_events == [ControlReceived(NONCE, b"question")]
    assert pair.syncer.send_control(NONCE, bytes(MAX_CONTROL_BYTES))
    pair.until(lambda: bool(pair.learner_events))
    assert pair.learner_events == [ControlReceived(SYNCER, bytes(MAX_CONTROL_BYTES))]


def test_control_keeps_its_order(pair: Pair) -> None:
    sent = [b"%d" % number for number in range(500)]
    for data in sent:
        assert pair.learner.send_control(SYNCER, data)
    pair.until(lambda: len(pair.syncer_events) == 500)
    assert [event.data for event in pair.syncer_events if isinstance(event, ControlReceived)] == sent


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_payload_arrives_intact(pair: Pair, size: int, way: str) -> None:
    payload = make_bytes(size)
    if way == "up":
        transfer_id = pair.learner.send_payload(SYNCER, b"head", payload)
        expected, end = NONCE, PayloadDelivered(SYNCER, transfer_id)
    else:
        transfer_id = pair.syncer.send_payload(NONCE, b"head", payload)
        expected, end = SYNCER, PayloadDelivered(NONCE, transfer_id)
    pair.until(lambda: bool(pair.delivered()))
    assert pair.delivered() == [end]
    (event,) = pair.received()
    assert (event.peer, event.header, event.payload.nbytes) == (expected, b"head", size)
    assert event.payload == payload
    assert not event.payload.readonly and event.payload.format == "B"
    for stats in (pair.learner.stats, pair.syncer.stats):
        assert (stats.bytes_up, stats.bytes_down) == ((size, 0) if way == "up" else (0, size))
        assert stats.drops == {}


def test_typed_memory_can_be_sent(pair: Pair) -> None:
    pair.learner.send_payload(SYNCER, b"", memoryview(bytearray(8)).cast("f"))
    pair.until(lambda: bool(pair.received()))
    assert pair.received()[0].payload == bytes(8)


def test_many_payloads_and_control_messages_arrive_in_order(pair: Pair) -> None:
    sizes = [(37 * k * k * 1009) % (3 * MIB) for k in range(12)]
    other_nonce = b"learner-number-1"
    other = pair.add_learner(other_nonce)
    for k, size in enumerate(sizes):
        for learner in (pair.learner, other):
            learner.send_payload(SYNCER, b"%d" % k, make_bytes(size, k))
            assert learner.send_control(SYNCER, b"%d" % k)
        pair.syncer.send_payload(NONCE, b"%d" % k, make_bytes(size, k))
    pair.until(lambda: len(pair.delivered()) == 36 and len(pair.received()) == 36)
    for peer in (NONCE, other_nonce, SYNCER):
        events = pair.learner_events if peer == SYNCER else pair.syncer_events
        payloads = [e for e in events if isinstance(e, PayloadReceived) and e.peer == peer]
        assert [e.header for e in payloads] == [b"%d" % k for k in range(12)]
        assert all(e.payload == make_bytes(size, k) for k, (e, size) in enumerate(zip(payloads, sizes, strict=True)))
    for peer in (NONCE, other_nonce):
        control = [e.data for e in pair.syncer_events if isinstance(e, ControlReceived) and e.peer == peer]
        assert control == [b"%d" % k for k in range(12)]


def test_control_overtakes_a_payload_that_was_queued_before_it(pair: Pair) -> None:
    pair.learner.send_payload(SYNCER, b"", make_bytes(32 * MIB))
    pair.until(lambda: pair.syncer.stats.bytes_up > 0)
    assert pair.learner.send_control(SYNCER, b"urgent")
    pair.until(lambda: bool(pair.syncer_events))
    assert pair.syncer_events[0] == ControlReceived(NONCE, b"urgent")
    assert pair.syncer.stats.bytes_up < 32 * MIB
    pair.until(lambda: bool(pair.received()))


def test_an_oversized_payload_is_refused_before_a_byte_of_it_is_sent(kind: str) -> None:
    offers = []

    def accept(peer: bytes, header: bytes, total_bytes: int) -> bool | str:
        offers.append((header, total_bytes))
        return "oversized" if total_bytes > MIB else header == b"good"

    pair = Pair(kind, accept=accept)
    try:
        ids = [pair.learner.send_payload(SYNCER, *what) for what in ((b"good", bytes(MIB + 1)), (b"bad", b"x"), (b"good", b"y"))]
        pair.until(lambda: len(pair.learner_events) == 3 and len(pair.syncer_events) == 3)
        assert pair.learner_events == [
            PayloadFailed(SYNCER, ids[0], "oversized"),
            PayloadFailed(SYNCER, ids[1], "refused"),
            PayloadDelivered(SYNCER, ids[2]),
        ]
        assert pair.syncer_events[:2] == [PayloadRefused(NONCE, b"good", "oversized"), PayloadRefused(NONCE, b"bad", "refused")]
        assert offers == [(b"good", MIB + 1), (b"bad", 1), (b"good", 1)]
        assert pair.learner.stats.bytes_up == 1
    finally:
        pair.close()


def test_an_accept_that_raises_refuses(kind: str) -> None:
    def accept(peer: bytes, header: bytes, total_bytes: int) -> bool:
        raise KeyError(header)

    pair = Pair(kind, accept=accept)
    try:
        transfer_id = pair.learner.send_payload(SYNCER, b"", b"x")
        pair.until(lambda: bool(pair.learner_events))
        assert pair.learner_events == [PayloadFailed(SYNCER, transfer_id, "refused")]
        assert pair.syncer.stats.drops == {"accept_failed": 1}
    finally:
        pair.close()


def test_a_payload_that_changes_on_its_way_is_refused_at_both_ends(pair: Pair) -> None:
    payload = bytearray(make_bytes(24 * MIB))
    transfer_id = pair.learner.send_payload(SYNCER, b"h", payload)
    pair.until(lambda: pair.learner.stats.bytes_up > 0)
    payload[-1] ^= 1
    pair.until(lambda: bool(pair.learner_events and pair.syncer_events))
    assert pair.learner_events == [PayloadFailed(SYNCER, transfer_id, "bad_checksum")]
    assert pair.syncer_events == [PayloadRefused(NONCE, b"h", "bad_checksum")]


def test_a_wrong_checksum_is_refused_again_when_offered_again(pair: Pair) -> None:
    raw = RawPeer(pair, b"raw-peer-nonce-0")
    for attempt in range(1, MAX_DAMAGED + 1):
        raw.say(Begin(5, attempt, b"h", 3, 1, 12345))
        assert raw.hear() == Grant(5, attempt, 0, 1)  # links turn bits: it may come again, from its beginning
        raw.say(Chunk(5, 0), b"abc")
    raw.say(Begin(5, 9, b"h", 3, 1, 12345))
    assert [raw.hear(), raw.hear()] == [Refused(5, "bad_checksum")] * 2
    assert pair.syncer_events == [PayloadRefused(b"raw-peer-nonce-0", b"h", "bad_checksum")]


def test_the_same_transfer_twice_is_acknowledged_twice_and_delivered_once(pair: Pair) -> None:
    raw = RawPeer(pair, b"raw-peer-nonce-0")
    begin = Begin(5, 1, b"h", 3, 1, 0x352441C2)  # crc32 of b"abc"
    for forget in (False, False, True):
        if forget:
            pair.syncer.forget(raw.nonce)
        raw.say(begin)
        reply = raw.hear()
        if isinstance(reply, Grant):
            raw.say(Chunk(5, 0), b"abc")
            reply = raw.hear()
        assert reply == Received(5)
    assert [(e.header, bytes(e.payload)) for e in pair.received()] == [(b"h", b"abc")]


def test_a_cancelled_payload_is_not_delivered_and_the_next_one_is(pair: Pair) -> None:
    first = pair.learner.send_payload(SYNCER, b"first", make_bytes(32 * MIB))
    second = pair.learner.send_payload(SYNCER, b"second", b"x")
    third = pair.learner.send_payload(SYNCER, b"third", b"y")
    pair.until(lambda: pair.syncer.stats.bytes_up > 0)
    assert pair.learner.cancel(SYNCER, first)
    assert pair.learner.cancel(SYNCER, second)
    assert not pair.learner.cancel(SYNCER, first)
    pair.until(lambda: bool(pair.received()) and len(pair.learner_events) == 3)
    assert [event.header for event in pair.received()] == [b"third"]
    assert pair.learner_events == [
        PayloadFailed(SYNCER, first, "cancelled"),
        PayloadFailed(SYNCER, second, "cancelled"),
        PayloadDelivered(SYNCER, third),
    ]


def test_forgetting_a_peer_frees_what_it_half_sent_and_what_was_queued_to_it(pair: Pair) -> None:
    raw = RawPeer(pair, b"raw-peer-nonce-0")
    raw.say(Begin(5, 1, b"h", 8 * MIB, 8, 0))
    assert raw.hear() == Grant(5, 1, 0, 8)
    assert pair.syncer._incoming.buffer_bytes == 8 * MIB
    transfer_id = pair.syncer.send_payload(raw.nonce, b"", b"x")
    pair.syncer.forget(raw.nonce)
    assert pair.syncer._incoming.buffer_bytes == 0
    pair.until(lambda: bool(pair.syncer_events))
    assert pair.syncer_events == [PayloadFailed(raw.nonce, transfer_id, "forgotten")]
    raw.say(Begin(5, 2, b"h", 8 * MIB, 8, 0))  # it wakes up and offers the same again
    assert raw.hear() == Grant(5, 2, 0, 8)


def test_a_half_sent_payload_of_a_silent_peer_is_freed_in_time(kind: str) -> None:
    pair = Pair(kind, abandon_after_s=0.5)
    try:
        RawPeer(pair, b"raw-peer-nonce-0").say(Begin(5, 1, b"h", 8 * MIB, 8, 0))
        pair.until(lambda: pair.syncer._incoming.buffer_bytes == 8 * MIB)
        pair.until(lambda: pair.syncer._incoming.buffer_bytes == 0)
        assert pair.syncer.stats.drops == {"abandoned": 1}
    finally:
        pair.close()


def test_an_unknown_peer_costs_a_count_and_its_payload_waits_for_it(pair: Pair) -> None:
    late = b"learner-number-2"
    assert not pair.syncer.send_control(late, b"lost")
    assert pair.syncer.stats.drops == {"control_unsent": 1}
    transfer_id = pair.syncer.send_payload(late, b"h", b"kept")
    pair.steps_for(0.1)
    pair.add_learner(late)
    pair.until(lambda: bool(pair.received()) and bool(pair.delivered()))
    assert pair.delivered() == [PayloadDelivered(late, transfer_id)]


def test_payloads_to_others_pass_an_unreachable_one(pair: Pair) -> None:
    pair.syncer.send_payload(b"nobody-has-this!", b"", make_bytes(4 * MIB))
    pair.syncer.send_payload(NONCE, b"h", make_bytes(4 * MIB))
    pair.until(lambda: bool(pair.received()))
    assert [event.header for event in pair.received()] == [b"h"]


def test_payloads_queued_before_bulk_is_dialled_are_sent_afterwards(kind: str) -> None:
    pair = Pair(kind)
    try:
        early = LearnerTransport(
            pair.syncer.control_endpoint, nonce=b"early-learner-00", accept=accept_all, context=pair.context, options=pair.options
        )
        early.connect()
        pair.learners[b"early-learner-00"] = early
        early.send_payload(SYNCER, b"h", b"x")
        pair.steps_for(0.1)
        assert pair.received() == []
        early.connect_bulk(pair.syncer.bulk_endpoint)
        early.connect_bulk(pair.syncer.bulk_endpoint)
        pair.until(lambda: bool(pair.received()) and bool(pair.delivered()))
    finally:
        pair.close()


def test_wake_from_another_thread_ends_a_poll_at_once(pair: Pair) -> None:
    for transport in (pair.syncer, pair.learner):
        for _ in range(100_000):
            transport.wake()  # far beyond the pipe's capacity: must not block
        transport.poll(0)
        timer = threading.Timer(0.05, transport.wake)
        start_s = time.monotonic()
        timer.start()
        assert transport.poll(30.0) == []
        assert time.monotonic() - start_s < 10.0
        timer.join()


def test_poll_returns_after_its_timeout_when_nothing_happens(pair: Pair) -> None:
    start_s = time.monotonic()
    assert pair.syncer.poll(0.1) == []
    assert time.monotonic() - start_s >= 0.09


def test_the_caller_is_told_what_cannot_be_sent(pair: Pair) -> None:
    with pytest.raises(LocalProtocolError, match="1048577 bytes"):
        pair.learner.send_control(SYNCER, bytes(MAX_CONTROL_BYTES + 1))
    with pytest.raises(LocalProtocolError, match="65537 bytes"):
        pair.learner.send_payload(SYNCER, bytes(MAX_HEADER_BYTES + 1), b"")
    with pytest.raises(LocalProtocolError, match="SYNCER"):
        pair.learner.send_control(NONCE, b"")
    with pytest.raises(LocalProtocolError, match="nonce"):
        pair.syncer.send_payload(b"short", b"", b"")
    with pytest.raises(LocalProtocolError, match="contiguous"):
        pair.learner.send_payload(SYNCER, b"", memoryview(b"abcd")[::2])


def test_a_transport_works_only_between_opening_and_closing(pair: Pair) -> None:
    fresh = LearnerTransport(pair.syncer.control_endpoint, nonce=NONCE, accept=accept_all, context=pair.context)
    fresh.wake()
    with pytest.raises(LocalProtocolError, match="connect"):
        fresh.poll(0)
    with pytest.raises(LocalProtocolError, match="bound already"):
        pair.syncer.bind()
    with pytest.raises(LocalProtocolError, match="connected already"):
        pair.learner.connect()
    pair.learner.close()
    pair.learner.close()
    pair.learner.wake()
    del pair.learners[NONCE]
    with pytest.raises(LocalProtocolError, match="not open"):
        pair.learner.poll(0)
    with pytest.raises(LocalProtocolError, match="closed"):
        pair.learner._open("tcp://127.0.0.1:1")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(st.binary(max_size=300), max_size=5), payloads=st.lists(st.binary(max_size=3000), max_size=4))
def test_any_bytes_pass_unchanged(pair: Pair, messages: list[bytes], payloads: list[bytes]) -> None:
    pair.syncer_events.clear()
    for message in messages:
        assert pair.learner.send_control(SYNCER, message)
    for payload in payloads:
        pair.learner.send_payload(SYNCER, payload, payload)
    pair.until(lambda: len(pair.syncer_events) == len(messages) + len(payloads))
    assert [e.data for e in pair.syncer_events if isinstance(e, ControlReceived)] == messages
    assert [(e.header, bytes(e.payload)) for e in pair.received()] == [(payload, payload) for payload in payloads]


@pytest.mark.parametrize("kind", ["tcp"])
def test_closing_leaves_no_thread_and_no_descriptor(kind: str) -> None:
    def census() -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), threading.active_count()

    def life() -> None:
        syncer = SyncerTransport(accept=accept_all)
        syncer.bind()
        learner = LearnerTransport(syncer.control_endpoint, nonce=NONCE, accept=accept_all)
        learner.connect()
        learner.connect_bulk(syncer.bulk_endpoint)
        learner.send_payload(SYNCER, b"", make_bytes(20 * MIB))
        while not syncer.stats.bytes_up:
            learner.poll(0.01)
            syncer.poll(0.01)
        learner.close()  # in the middle of a transfer
        syncer.close()

    life()
    before = census()
    for _ in range(3):
        life()
    assert census() == before


def test_constructors_open_nothing() -> None:
    before = os.listdir("/proc/self/fd")
    SyncerTransport(accept=accept_all).close()
    LearnerTransport("tcp://127.0.0.1:1", nonce=NONCE, accept=accept_all).close()
    assert os.listdir("/proc/self/fd") == before


def test_bad_addresses_and_numbers_are_the_callers_fault() -> None:
    with pytest.raises(ConfigurationError, match="shared zmq.Context"):
        SyncerTransport("inproc://x", accept=accept_all).bind()
    with pytest.raises(ConfigurationError, match="15 bytes"):
        LearnerTransport("tcp://127.0.0.1:1", nonce=bytes(15), accept=accept_all)
    for numbers in ({"window_chunks": 0}, {"resend_after_s": 9.0, "resend_max_s": 1.0}, {"close_linger_s": -1.0}):
        with pytest.raises(ConfigurationError, match=next(iter(numbers))):
            TransportOptions(**numbers)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    first, second = (SyncerTransport(accept=accept_all, context=context) for _ in range(2))
    with pytest.raises(LocalProtocolError, match="bind"):
        _ = first.control_endpoint
    first.bind()
    second._wanted = (first.control_endpoint, first.bulk_endpoint)
    with pytest.raises(ConfigurationError, match="cannot listen"):
        second.bind()
    second._wanted = ("tcp://127.0.0.1:0", first.bulk_endpoint)
    with pytest.raises(ConfigurationError, match="cannot listen"):
        second.bind()
    with pytest.raises(LocalProtocolError, match="not open"):
        second.poll(0)
    second._wanted = ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0")
    second.bind()
    assert second.poll(0) == []
    bad = LearnerTransport("no-address", nonce=NONCE, accept=accept_all, context=context)
    with pytest.raises(ConfigurationError, match="cannot dial"):
        bad.connect()
    for transport in (first, second, bad):
        transport.close()
    context.term()
