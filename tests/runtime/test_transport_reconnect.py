"""Connections that break, slow down and come back, through a real TCP proxy."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.transport import (
    SYNCER,
    Accept,
    ControlReceived,
    LearnerTransport,
    PayloadReceived,
    SyncerTransport,
    TransportEvent,
    TransportOptions,
)
from tests.runtime.transport_helpers import MIB, NONCE, Pair, accept_all, make_bytes
from tests.runtime.transport_proxy import TransportProxy


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


class ProxiedPair(Pair):
    """The learner of this pair reaches the syncer through two proxies."""

    def __init__(self, stack: ExitStack, **numbers: float) -> None:
        self._stack = stack
        super().__init__("tcp", **numbers)

    def add_learner(self, nonce: bytes, accept: Accept = accept_all) -> LearnerTransport:
        self.control_proxy = self._stack.enter_context(TransportProxy(_port(self.syncer.control_endpoint)))
        self.bulk_proxy = self._stack.enter_context(TransportProxy(_port(self.syncer.bulk_endpoint)))
        learner = LearnerTransport(
            f"tcp://127.0.0.1:{self.control_proxy.port}", nonce=nonce, accept=accept, context=self.context, options=self.options
        )
        learner.connect()
        learner.connect_bulk(f"tcp://127.0.0.1:{self.bulk_proxy.port}")
        self.learners[nonce] = learner
        return learner

    def until_passed(self, num_bytes: int, *, down: bool = False) -> None:
        self.until(lambda: (self.learner.stats.bytes_down if down else self.syncer.stats.bytes_up) > num_bytes)


@pytest.fixture
def pair() -> Iterator[ProxiedPair]:
    with ExitStack() as stack:
        pair = ProxiedPair(stack)
        try:
            pair.meet()
            yield pair
        finally:
            pair.close()


def test_a_payload_each_way_survives_cuts_of_bulk(pair: ProxiedPair) -> None:
    up, down = make_bytes(48 * MIB, 1), make_bytes(48 * MIB, 2)
    pair.learner.send_payload(SYNCER, b"up", up)
    pair.syncer.send_payload(NONCE, b"down", down)
    for share in (8, 24):
        pair.until_passed(share * MIB)
        pair.until_passed(share * MIB, down=True)
        pair.bulk_proxy.cut()
    pair.until(lambda: len(pair.received()) == 2 and len(pair.delivered()) == 2, limit_s=40)
    assert {e.header: bytes(e.payload) for e in pair.received()} == {b"up": up, b"down": down}
    assert pair.bulk_proxy.num_connections == 3
    assert pair.learner.stats.drops["offered_again"] >= 1


def test_a_payload_survives_cuts_of_control(pair: ProxiedPair) -> None:
    payload = make_bytes(48 * MIB)
    pair.learner.send_payload(SYNCER, b"", payload)
    for share in (8, 24):
        pair.until_passed(share * MIB)
        pair.control_proxy.cut()
    pair.until(lambda: bool(pair.delivered()), limit_s=40)
    assert [bytes(e.payload) for e in pair.received()] == [payload]


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_chunk_that_takes_longer_than_the_heartbeats_patience_gets_through(way: str) -> None:
    with ExitStack() as stack:
        pair = ProxiedPair(stack, heartbeat_interval_s=0.2, heartbeat_timeout_s=1.0)
        stack.callback(pair.close)
        pair.meet()
        pair.bulk_proxy.bytes_per_s = MIB / 1.5  # heartbeats wait behind the 1.5 s of a chunk
        payload = make_bytes(2 * MIB)
        if way == "up":
            pair.learner.send_payload(SYNCER, b"", payload)
        else:
            pair.syncer.send_payload(NONCE, b"", payload)
        pair.until(lambda: bool(pair.received()) and bool(pair.delivered()), limit_s=25)
        assert pair.bulk_proxy.num_connections == 1


@pytest.mark.parametrize("channel", ["control", "bulk"])
@pytest.mark.parametrize("end", ["cut", "given up"])
def test_what_went_with_a_connection_is_offered_again_when_it_is_back_and_not_a_resend_later(channel: str, end: str) -> None:
    with ExitStack() as stack:
        pair = ProxiedPair(stack, resend_after_s=60.0, resend_max_s=60.0)
        stack.callback(pair.close)
        pair.meet()
        payload = make_bytes(48 * MIB)
        pair.learner.send_payload(SYNCER, b"up", payload)
        pair.until_passed(8 * MIB)
        proxy = pair.control_proxy if channel == "control" else pair.bulk_proxy
        if end == "cut":
            # So long that all chunks under way are answered into the void: nothing but a new offer helps.
            proxy.cut(stay_closed=True)
            pair.steps_for(0.7)
            proxy.reopen()
        else:
            proxy.slip_in(b"\x02" + (1 << 50).to_bytes(8, "big"))  # no message: ZeroMQ ends the session and does not dial again
        pair.until(lambda: bool(pair.delivered()), limit_s=20)
        assert [bytes(e.payload) for e in pair.received()] == [payload]
        assert 1 <= pair.learner.stats.drops.get("offered_again", 0) <= 2


def test_a_learner_that_only_waits_finds_out_that_somebody_has_its_place_on_bulk() -> None:
    with ExitStack() as stack:
        pair = ProxiedPair(stack, heartbeat_interval_s=0.2, heartbeat_timeout_s=1.0)
        stack.callback(pair.close)
        pair.meet()
        pair.syncer.send_payload(NONCE, b"before", make_bytes(100))
        pair.until(lambda: len(pair.delivered()) == 1)
        with socket.create_connection(("127.0.0.1", _port(pair.syncer.bulk_endpoint)), timeout=5) as line:
            line.sendall(bytes(pair.bulk_proxy.recorded[0][:64]))
            assert line.recv(64)
            line.sendall(bytes(pair.bulk_proxy.recorded[0][64:]))
            pair.steps_for(0.3)
        pair.syncer.send_payload(NONCE, b"down", make_bytes(100))
        pair.until(lambda: len(pair.delivered()) == 2, limit_s=20)
        assert [e.header for e in pair.received()] == [b"before", b"down"]
        assert pair.bulk_proxy.num_connections == 2


def test_an_outage_of_both_sockets_loses_no_payload_and_blocks_nobody(pair: ProxiedPair) -> None:
    for proxy in (pair.control_proxy, pair.bulk_proxy):
        proxy.cut(stay_closed=True)
    pair.steps_for(0.2)
    payload = make_bytes(40 * MIB)
    pair.learner.send_payload(SYNCER, b"up", payload)
    pair.syncer.send_payload(NONCE, b"down", payload)
    longest_s = 0.0
    end_s = time.monotonic() + 1.0
    while time.monotonic() < end_s:
        start_s = time.monotonic()
        pair.syncer.send_control(NONCE, b"into the void")
        longest_s = max(longest_s, time.monotonic() - start_s)
        pair.step()
    assert pair.syncer.stats.drops["control_unsent"] > 1
    assert longest_s < 0.5
    assert pair.received() == []
    for proxy in (pair.control_proxy, pair.bulk_proxy):
        proxy.reopen()
    pair.until(lambda: len(pair.received()) == 2 and len(pair.delivered()) == 2, limit_s=40)
    assert all(e.payload == payload for e in pair.received())


def test_a_reconnected_learner_keeps_its_identity(pair: ProxiedPair) -> None:
    pair.control_proxy.cut()
    pair.until(lambda: pair.control_proxy.num_connections == 2)
    pair.learner.send_control(SYNCER, b"again")
    pair.until(lambda: bool(pair.syncer_events))
    assert pair.syncer_events == [ControlReceived(NONCE, b"again")]
    assert pair.syncer.send_control(NONCE, b"hello")
    pair.until(lambda: bool(pair.learner_events))


def test_control_passes_a_throttled_bulk_link(pair: ProxiedPair) -> None:
    pair.bulk_proxy.bytes_per_s = 10e6 / 8  # 10 Mbit/s
    pair.control_proxy.delay_s = 0.02
    pair.learner.send_payload(SYNCER, b"", make_bytes(2 * MIB))
    for k in range(5):
        pair.learner.send_control(SYNCER, b"%d" % k)
        pair.until(lambda: len(pair.syncer_events) == 1, limit_s=1.0)
        assert pair.syncer_events.pop() == ControlReceived(NONCE, b"%d" % k)
    assert pair.received() == []  # the payload takes 1.7 s
    pair.until(lambda: bool(pair.received()))
    assert pair.syncer.stats.drops.get("duplicate_chunk", 0) == 0


@pytest.mark.parametrize("channel", ["control", "bulk"])
def test_a_socket_that_has_read_what_is_no_message_is_replaced(pair: ProxiedPair, channel: str) -> None:
    # ZeroMQ ends the session of a socket that dialled, and does not dial again.
    proxy = pair.control_proxy if channel == "control" else pair.bulk_proxy
    proxy.slip_in(b"\x02" + (1 << 50).to_bytes(8, "big"))
    pair.until(lambda: pair.learner.stats.drops.get("redialled") == 1)
    payload = make_bytes(3 * MIB)
    pair.learner.send_payload(SYNCER, b"up", payload)
    pair.syncer.send_payload(NONCE, b"down", payload)
    pair.until(lambda: len(pair.delivered()) == 2)
    assert [bytes(e.payload) for e in pair.received()] == [payload] * 2
    assert proxy.num_connections == 2


def test_bits_that_turn_on_the_way_are_noticed_and_cost_nothing_but_time() -> None:
    with ExitStack() as stack:
        # A length that was damaged can make a socket wait for bytes that never come: its heartbeats find that.
        pair = ProxiedPair(stack, heartbeat_interval_s=0.3, heartbeat_timeout_s=1.0)
        stack.callback(pair.close)
        pair.meet()
        sent = [make_bytes(20_000, seed) for seed in range(12)]
        for i, payload in enumerate(sent):
            pair.learner.send_payload(SYNCER, b"%d" % i, payload)
            pair.syncer.send_payload(NONCE, b"%d" % i, payload)
            pair.learner.send_control(SYNCER, b"said %d" % i)
            pair.bulk_proxy.bits_to_turn, pair.control_proxy.bits_to_turn = 2, 1
            pair.until(lambda i=i: len(pair.delivered()) == 2 * (i + 1), limit_s=40)
        assert pair.bulk_proxy.bits_to_turn == pair.control_proxy.bits_to_turn == 0
        assert sorted(int(e.header) for e in pair.received()) == sorted([*range(12), *range(12)])
        assert all(bytes(e.payload) == sent[int(e.header)] for e in pair.received())
        said = {e.data for e in pair.syncer_events if isinstance(e, ControlReceived)}
        assert said <= {b"said %d" % i for i in range(12)}, "what is lost is lost, and nothing else was heard"


def test_a_restarted_syncer_gets_the_payload_that_its_predecessor_had_half() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    options = TransportOptions(resend_after_s=0.3, resend_max_s=2.0)
    old = SyncerTransport(accept=accept_all, context=context, options=options)
    old.bind()
    endpoints = (old.control_endpoint, old.bulk_endpoint)
    learner = LearnerTransport(endpoints[0], nonce=NONCE, accept=accept_all, context=context, options=options)
    learner.connect()
    learner.connect_bulk(endpoints[1])
    payload = make_bytes(40 * MIB)
    learner.send_payload(SYNCER, b"h", payload)
    while old.stats.bytes_up < 12 * MIB:
        assert old.poll(0.001) == [] and learner.poll(0.001) == []
    old.close()
    new = SyncerTransport(*endpoints, accept=accept_all, context=context, options=options)
    _bind_soon(new)
    end_s = time.monotonic() + 20
    received: list[TransportEvent] = []
    delivered: list[TransportEvent] = []
    while not (received and delivered):
        assert time.monotonic() < end_s, (learner.stats, new.stats)
        received += new.poll(0.001)
        delivered += learner.poll(0.001)
    assert isinstance(received[0], PayloadReceived) and received[0].payload == payload
    learner.close()
    new.close()
    context.term()


def _bind_soon(syncer: SyncerTransport) -> None:
    """The I/O thread frees the predecessor's port a moment after close() returned."""
    for _ in range(100):
        try:
            syncer.bind()
            return
        except ConfigurationError:
            time.sleep(0.02)
    syncer.bind()
