"""The transfer rules without sockets: a link that loses, doubles and reorders, and a clock that we move."""

from __future__ import annotations

import zlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diloco.runtime.transport.frames import (
    Begin,
    BulkFrame,
    Cancel,
    Chunk,
    Grant,
    Received,
    RefusalReason,
    Refused,
    decode_bulk,
    decode_reply,
    encode_frame,
)
from lightning_diloco.runtime.transport.receiving import DONE_MEMORY, MAX_DAMAGED, Delivery, IncomingTransfers
from tests.runtime.transport_link import BOOT, CHUNK, WINDOW, Link

payload_lists = st.lists(st.binary(max_size=9 * CHUNK), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(payloads=payload_lists, seed=st.integers(0, 2**32), steps=st.integers(0, 400))
def test_every_payload_is_delivered_exactly_once_and_intact(payloads: list[bytes], seed: int, steps: int) -> None:
    link = Link(seed)
    ids = [link.add(payload) for payload in payloads]
    for _ in range(steps):
        if link.random.random() < 0.5:
            link.send()
        link.disturb()
        assert link.receiver.buffer_bytes <= max(len(payload) for payload in payloads)
    link.settle()
    assert link.intact() == Counter(ids)
    assert link.ended == dict.fromkeys(ids)
    assert link.receiver.buffer_bytes == 0


@settings(max_examples=300, deadline=None)
@given(payloads=payload_lists, seed=st.integers(0, 2**32), steps=st.integers(0, 300), victim=st.integers(0, 5))
def test_a_payload_cancelled_before_it_left_is_never_delivered(payloads: list[bytes], seed: int, steps: int, victim: int) -> None:
    link = Link(seed)
    ids = [link.add(payload + b"x") for payload in payloads]  # at least one chunk each
    chosen = ids[victim % len(ids)]
    cancel_at = link.random.randrange(steps + 1)
    must_not_arrive = False
    for step in range(steps + 1):
        if step == cancel_at:
            num_chunks = -(-len(link.payloads[chosen]) // CHUNK)
            must_not_arrive = len(link.sent[chosen]) < num_chunks
            link.cancel(chosen)
        if link.random.random() < 0.5:
            link.send()
        link.disturb()
    link.settle()
    seen = link.intact()
    assert max(seen.values(), default=0) <= 1
    assert set(ids) - {chosen} <= set(seen)
    assert set(link.ended) == set(ids)
    if must_not_arrive:
        assert chosen not in seen
        assert link.ended[chosen] == "cancelled"


@settings(max_examples=100, deadline=None)
@given(size=st.integers(0, 60), seed=st.integers(0, 2**32), steps=st.integers(0, 60))
def test_the_sender_never_exceeds_the_credit(size: int, seed: int, steps: int) -> None:
    link = Link(seed)
    link.add(bytes(size))
    upto = 0
    for _ in range(steps):
        while link.send():
            pass
        upto = max([upto, *(g.upto for g in link.back if isinstance(g, Grant))])
        assert all(index < upto for index in link.sent[BOOT + 1])
        assert upto <= size // CHUNK + 1
        link.disturb()


def _offer(payload: bytes, transfer_id: int = BOOT + 1, crc: int | None = None, header: bytes = b"h") -> Begin:
    num_chunks = -(-len(payload) // CHUNK)
    return Begin(transfer_id, 1, header, len(payload), num_chunks, zlib.crc32(payload) if crc is None else crc)


def test_a_delivered_transfer_is_acknowledged_again_and_other_bytes_under_its_id_are_refused() -> None:
    link = Link()
    link.arrive(_offer(b"abc"), b"")
    link.arrive(Chunk(BOOT + 1, 0), b"abc")
    link.arrive(_offer(b"abc"), b"")
    link.arrive(Chunk(BOOT + 1, 0), b"abc")
    link.arrive(_offer(b"abd"), b"")
    assert link.back[1:] == [Received(BOOT + 1), Received(BOOT + 1), Refused(BOOT + 1, "refused")]
    assert len(link.delivered) == 1
    assert (link.drops["duplicate_begin"], link.drops["late_chunk"], link.drops["conflicting_begin"]) == (1, 1, 1)


def test_a_checksum_that_is_wrong_every_time_is_refused_and_the_answer_stays() -> None:
    link = Link()
    for _ in range(MAX_DAMAGED + 1):
        link.arrive(_offer(b"abc", crc=1), b"")
        link.arrive(Chunk(BOOT + 1, 0), b"abc")
    assert [r for r in link.back if isinstance(r, Refused)] == [Refused(BOOT + 1, "bad_checksum")] * 2
    assert [d.reason for d in link.delivered] == ["bad_checksum"]


def test_a_payload_that_was_damaged_on_the_way_is_sent_again_whole_and_delivered() -> None:
    link = Link()
    payload = bytes(range(26))
    transfer_id = link.add(payload)
    for damaged in range(MAX_DAMAGED):
        while link.send() or link.forward or link.back:
            for frame, data in link.forward:
                is_hit = isinstance(frame, Chunk) and frame.index == 3 and damaged < MAX_DAMAGED - 1
                link.arrive(frame, b"\xff" + data[1:] if is_hit else data)
            while link.back:
                link.return_(link.back.pop(0))
            link.forward.clear()
        link.now_s += 30.0  # nobody has answered: the sender's timer
    assert link.drops == {"bad_checksum": MAX_DAMAGED - 1, "offered_again": MAX_DAMAGED - 1}
    assert [bytes(d.payload or b"") for d in link.delivered] == [payload] and link.ended == {transfer_id: None}


def test_misplaced_chunks_change_nothing() -> None:
    link = Link()
    payload = bytes(range(30))
    link.arrive(_offer(payload), b"")
    link.arrive(Chunk(BOOT + 1, 0), b"toolong")
    link.arrive(Chunk(BOOT + 1, 0), b"abc")
    link.arrive(Chunk(BOOT + 1, WINDOW), payload[12:16])
    link.arrive(Chunk(BOOT + 1, 2**41), b"abcd")
    link.arrive(Chunk(BOOT + 9, 0), b"abcd")
    assert link.drops == {"chunk_of_wrong_length": 2, "chunk_beyond_credit": 2, "foreign_chunk": 1}
    for index in range(8):
        link.arrive(Chunk(BOOT + 1, index), payload[4 * index : 4 * index + 4])
        link.arrive(Chunk(BOOT + 1, index), b"????"[: len(payload[4 * index : 4 * index + 4])])  # overlaps: the first wins
    assert [bytes(d.payload or b"") for d in link.delivered] == [payload]
    assert link.drops["duplicate_chunk"] == 7


def test_an_offer_whose_chunks_do_not_add_up_is_refused() -> None:
    link = Link()
    link.arrive(Begin(BOOT + 1, 1, b"", 100, 3, 0), b"")
    assert link.back == [Refused(BOOT + 1, "refused")]
    assert link.receiver.buffer_bytes == 0


def test_an_offer_that_does_not_fit_into_memory_is_oversized() -> None:
    link = Link()
    huge = 1 << 43
    link.arrive(Begin(BOOT + 1, 1, b"", huge, huge // CHUNK, 0), b"")
    assert link.back == [Refused(BOOT + 1, "oversized")]


@pytest.mark.parametrize(("verdict", "reason"), [(False, "refused"), ("oversized", "oversized"), ("whatever", "refused")])
def test_nothing_is_allocated_without_consent(verdict: bool | str, reason: RefusalReason) -> None:
    receiver = IncomingTransfers(accept=lambda h, n: verdict, count=lambda w: None, window_chunks=WINDOW, chunk_bytes=CHUNK)
    reaction = receiver.on_begin(_offer(b"abcdefgh"), 0.0)
    assert (reaction.reply, receiver.buffer_bytes) == (Refused(BOOT + 1, reason), 0)
    assert reaction.delivery == Delivery(b"h", None, reason)
    assert receiver.is_blank


def test_the_memory_of_ended_transfers_is_bounded_and_still_refuses_what_fell_out_of_it() -> None:
    link = Link()
    for k in range(1, DONE_MEMORY + 10):
        link.arrive(_offer(b"", BOOT + k), b"")
    assert len(link.delivered) == DONE_MEMORY + 9
    link.arrive(_offer(b"", BOOT + 1), b"")
    assert len(link.delivered) == DONE_MEMORY + 9
    assert link.drops["stale_begin"] == 1


def test_a_forged_acknowledgement_of_an_unsent_payload_ends_nothing() -> None:
    link = Link()
    transfer_id = link.add(b"abc")
    link.return_(Received(transfer_id))
    link.return_(Grant(transfer_id, 1, 0, 1))
    assert link.ended == {}
    link.settle()
    assert link.ended == {transfer_id: None}


def test_a_forged_grant_is_counted_and_moves_nothing() -> None:
    link = Link()
    transfer_id = link.add(bytes(20))
    while link.send():
        pass
    for grant in (Grant(transfer_id, 1, 0, 6), Grant(transfer_id, 1, 3, 2), Grant(transfer_id, 9, 0, 5)):
        link.return_(grant)
    assert link.drops["malformed_grant"] == 3
    assert link.sent[transfer_id] == set()


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=80))
def test_decoders_never_raise(data: bytes) -> None:
    if (bulk := decode_bulk(data)) is not None:
        assert decode_bulk(encode_frame(bulk)) == bulk
    if (reply := decode_reply(data)) is not None:
        assert decode_reply(encode_frame(reply)) == reply


def test_decoders_refuse_every_field_outside_its_limits() -> None:
    good = encode_frame(_offer(b"abc"))
    assert decode_bulk(good) == _offer(b"abc")
    bad: list[BulkFrame] = [
        Begin(-1, 1, b"", 0, 0, 0),
        Begin(1, 0, b"", 0, 0, 0),
        Begin(1, 1, bytes(65537), 0, 0, 0),
        Begin(1, 1, b"", -1, 0, 0),
        Begin(1, 1, b"", 0, 0, 1 << 32),
        Chunk(1, -1),
        Cancel(1 << 63),
    ]
    assert [decode_bulk(encode_frame(frame)) for frame in bad] == [None] * len(bad)
    assert [decode_bulk(good[:cut]) for cut in range(len(good))] == [None] * len(good)
    assert decode_bulk(good + b"\x00") is None
    assert decode_bulk(b"\x91" * 100_000) is None
    assert decode_bulk(encode_frame(Received(1))) is None
    assert decode_reply(encode_frame(Cancel(1))) is None
    assert decode_reply(encode_frame(Refused(1, "because"))) is None  # type: ignore[arg-type]
