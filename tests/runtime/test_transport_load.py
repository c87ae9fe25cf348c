"""Latency of control under full bulk load, and memory behind a reader that is stuck; the syncer is a process of its own."""

from __future__ import annotations

import time

import psutil
import pytest

from lightning_diloco.runtime.transport import SYNCER
from tests.runtime.transport_helpers import MIB, Pair, make_bytes
from tests.runtime.transport_measure import joined, measure_under_load


def test_one_poll_goes_on_as_long_as_there_is_work() -> None:
    pair = Pair("tcp")
    pair.meet()
    pair.learner.send_payload(SYNCER, b"", bytes(64 * MIB))
    pair.learner.poll(0.5)  # 32 turns of hashing, and the offer
    pair.syncer.poll(0.5)
    assert pair.syncer._incoming.buffer_bytes == 64 * MIB
    pair.close()


@pytest.mark.process
def test_control_answers_within_50_ms_under_bulk_load_both_ways() -> None:
    measured = measure_under_load(300)
    assert len(measured.round_trips_s) == 300
    assert min(measured.bytes_up, measured.bytes_down) >= 64 * MIB
    assert measured.quantile_s(0.99) < 0.05, str(measured)


@pytest.mark.process
def test_a_stuck_reader_holds_one_payload_buffer_and_the_credit() -> None:
    with joined("stuck") as (process, learner):
        peer = psutil.Process(process.pid)
        before = peer.memory_info().rss
        for _ in range(3):
            learner.send_payload(SYNCER, b"up", bytes(64 * MIB))
        while not learner.stats.bytes_up:
            learner.poll(0.1)
        assert process.stdout is not None and process.stdout.readline() == "stuck\n"
        end_s = time.monotonic() + 2.0
        while time.monotonic() < end_s:
            learner.poll(0.1)
        # Its last turn may have taken 2 chunks and granted them anew: 8 of credit + 2 in the buffer.
        assert 8 * MIB <= learner.stats.bytes_up <= 10 * MIB
        assert peer.memory_info().rss - before <= (64 + 8 + 8) * MIB  # buffer, credit, allocator and socket buffers


def test_learners_are_served_in_turn() -> None:
    pair = Pair("inproc")  # no network thread between them: what differs here is the order in which the syncer sends
    others = [pair.add_learner(b"learner-number-%d" % k) for k in (1, 2)]
    pair.meet()
    payload = make_bytes(32 * MIB)
    for nonce in pair.learners:
        pair.syncer.send_payload(nonce, b"", payload)
    pair.until(lambda: bool(pair.received()))
    assert min(learner.stats.bytes_down for learner in [pair.learner, *others]) > 16 * MIB  # one after the other they would have nothing
    pair.until(lambda: len(pair.received()) == 3)
    pair.close()
