"""What is known of a link: up, down since when, and a row of refusals; and what a learner makes of a row."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from lightning_diloco.protocol.messages import JoinRefused
from lightning_diloco.runtime.client_options import ClientOptions
from lightning_diloco.runtime.keys import SiteKeys
from lightning_diloco.runtime.link_care import REFUSED_HEARTBEATS, REFUSED_S, LinkCare
from lightning_diloco.runtime.transport import LearnerTransport, SyncerTransport
from lightning_diloco.runtime.transport.links import LinkWatch
from tests.runtime.job_helpers import CONFIG, until
from tests.runtime.test_blocked_bulk import shut_port
from tests.runtime.transport_proxy import TransportProxy

HERE = "tcp://127.0.0.1:1"


class Monitor:
    """Stands for the socket's monitor: says what a test has put in."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def look(self) -> list[str]:
        words, self.words = self.words, []
        return words

    def close(self) -> None:
        pass


@pytest.fixture
def monitor() -> Monitor:
    return Monitor()


@pytest.fixture
def link(monitor) -> LinkWatch:
    link = LinkWatch()
    link.follow(monitor, HERE, 0.0)
    return link


def hear(link: LinkWatch, monitor: Monitor, now_s: float, *words: str) -> float:
    monitor.words = list(words)
    link.look(now_s)
    return link.refused_s


def test_a_link_is_down_since_it_was_dialled_or_lost_and_another_socket_changes_nothing_of_that(link, monitor):
    assert (link.is_up, link.was_up, link.down_since_s) == (False, False, 0.0)
    hear(link, monitor, 1.0, "handshake", "down")
    link.follow(Monitor(), HERE, 2.0)
    assert (link.is_up, link.was_up, link.down_since_s, link.failed) == (False, False, 0.0, {"handshake"})
    link.follow(monitor, HERE, 3.0)
    hear(link, monitor, 4.0, "up")
    assert (link.is_up, link.was_up, link.down_since_s, link.failed) == (True, True, math.inf, set())
    hear(link, monitor, 5.0, "down")
    link.follow(monitor, HERE, 6.0)
    assert (link.is_up, link.was_up, link.down_since_s) == (False, True, 5.0)
    link.follow(monitor, "tcp://127.0.0.1:2", 7.0)
    assert (link.is_up, link.was_up, link.down_since_s, link.failed) == (False, False, 7.0, set())


def test_a_connection_is_back_when_one_was_lost_whatever_socket_has_it(link, monitor):
    hear(link, monitor, 1.0, "down", "again", "up")
    assert link.times_back == 0, "nothing was lost before the first one"
    hear(link, monitor, 2.0, "down", "again", "down", "again", "up")
    assert link.times_back == 1
    hear(link, monitor, 3.0, "down")
    link.follow(monitor, HERE, 4.0)
    hear(link, monitor, 5.0, "up")
    assert link.times_back == 2, "the socket was given up"
    link.follow(monitor, HERE, 6.0)
    hear(link, monitor, 7.0, "up")
    assert link.times_back == 3, "it took no message, and nothing was said of its connection"
    link.follow(monitor, "tcp://127.0.0.1:2", 8.0)
    hear(link, monitor, 9.0, "up")
    assert link.times_back == 3, "nothing was lost at this address"


def test_within_one_process_a_link_is_up_at_once(link):
    link.follow(None, "inproc://x", 1.0)
    assert (link.is_up, link.was_up, link.down_since_s) == (True, True, math.inf)


def test_a_socket_that_does_not_say_that_it_dials_again_is_given_up(link, monitor):
    for words, is_given_up in ((["up"], False), (["down"], True), (["again"], False), (["unknown_key", "down"], True), (["up"], False)):
        hear(link, monitor, 1.0, *words)
        assert link.is_given_up == is_given_up
    hear(link, monitor, 1.0, "down")
    link.follow(monitor, HERE, 2.0)
    assert not link.is_given_up


@pytest.mark.parametrize("breaks", ["up", "other_syncer", "no_keys", "a pause"])
def test_a_row_of_refusals_grows_until_something_else_happens(link, monitor, breaks):
    assert [hear(link, monitor, t, "unknown_key", "down") for t in (10.0, 12.5, 21.0)] == [0.0, 2.5, 11.0]
    assert hear(link, monitor, 25.0, "handshake", "down", "again") == 11.0, "a link that was cut says nothing of the key"
    assert hear(link, monitor, 30.0) == 11.0
    if breaks == "a pause":
        assert hear(link, monitor, 31.5) == 0.0
    else:
        assert hear(link, monitor, 30.5, breaks) == 0.0
    assert [hear(link, monitor, t, "unknown_key") for t in (32.0, 34.0)] == [0.0, 2.0]


def test_a_thread_that_stood_still_breaks_no_row(link, monitor):
    hear(link, monitor, 10.0, "unknown_key")
    assert hear(link, monitor, 40.0, "unknown_key", "down") == 30.0


# ---- what a learner makes of it -------------------------------------------------------------------------------------------------


def care_of(control: LinkWatch, *, keys: SiteKeys | None, heartbeat_s: float = 0.2) -> LinkCare:
    transport: Any = SimpleNamespace(control_link=control, bulk_link=LinkWatch())
    return LinkCare(transport, ClientOptions(endpoint=HERE, config=dataclasses.replace(CONFIG, heartbeat_s=heartbeat_s), keys=keys))


def first_refusal_s(care: LinkCare, link: LinkWatch, monitor: Monitor, heard_s: float = 0.0, **options: Any) -> float | None:
    """The second in which a learner ends whose key is refused every two seconds, from 1 to 119; None: it does not."""
    for second in range(1, 120):
        hear(link, monitor, float(second), *(["unknown_key", "down"] if second % 2 else []))
        refusal = care.tick(float(second), heard_s, **{"is_joined": True, **options})
        if refusal is not None:
            assert isinstance(refusal, JoinRefused) and refusal.reason == "key_revoked"
            assert "The key of this site was revoked" in refusal.detail and KEYS.public.hex() in refusal.detail
            return float(second)
    return None


KEYS = SiteKeys(public=b"p" * 32, secret=b"s" * 32, syncer=b"y" * 32)


def test_a_key_that_is_refused_for_long_with_no_word_of_the_syncer_is_a_revoked_one(link, monitor):
    assert first_refusal_s(care_of(link, keys=KEYS), link, monitor) == 1.0 + REFUSED_S


def test_long_heartbeats_and_a_late_word_make_it_longer(link, monitor):
    assert first_refusal_s(care_of(link, keys=KEYS, heartbeat_s=5.0), link, monitor) == 1.0 + REFUSED_HEARTBEATS * 5.0
    another = LinkWatch()
    another.follow(monitor, HERE, 0.0)
    assert first_refusal_s(care_of(another, keys=KEYS), another, monitor, heard_s=20.0) == 20.0 + REFUSED_S


@pytest.mark.parametrize("options", [{"keys": None}, {"keys": KEYS, "is_joined": False}], ids=["no keys", "joining"])
def test_without_keys_or_before_the_join_a_refusal_ends_nobody(link, monitor, options):
    assert first_refusal_s(care_of(link, keys=options.pop("keys")), link, monitor, **options) is None


def test_silence_alone_ends_nobody(link, monitor):
    care = care_of(link, keys=KEYS)
    assert [care.tick(float(second), 0.0, is_joined=True) for second in range(200)] == [None] * 200


# ---- real sockets ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def syncer() -> Iterator[SyncerTransport]:
    syncer = SyncerTransport(accept=lambda *_: True)
    syncer.bind()
    yield syncer
    syncer.close()


def test_a_socket_that_zeromq_has_given_up_is_replaced_though_it_takes_messages(syncer):
    """After a refusal it now and then does, into a queue that nobody empties; here it is said of a socket that is well."""
    learner = LearnerTransport(syncer.control_endpoint, nonce=b"n" * 16, accept=lambda *_: True)
    learner.connect()
    learner.connect_bulk(syncer.bulk_endpoint)

    def both_up() -> bool:
        return not syncer.poll(0.02) and not learner.poll(0.02) and learner.control_link.is_up and learner.bulk_link.is_up

    until(both_up)
    before = learner._control, learner._bulk
    for link in (learner.control_link, learner.bulk_link):
        link.take("down", time.monotonic())
    assert all(sock is not None and sock.poll(0, zmq.POLLOUT) for sock in before)
    until(both_up, 6.0)
    assert learner.stats.drops["redialled"] == 2 and learner._control is not before[0] and learner._bulk is not before[1]
    learner.close()


@pytest.mark.slow
def test_a_port_that_a_firewall_opens_again_is_found_within_seconds(syncer):
    """Left to itself the operating system asks after 1, 3, 7, 15, 31, 63 s (Linux since 6.5: 1, 2, 3, 4, 5, 7, 11, 19, 35, 67 s)."""
    learner = LearnerTransport(syncer.control_endpoint, nonce=b"n" * 16, accept=lambda *_: True)
    with shut_port("dropped") as port:
        learner.connect()
        learner.connect_bulk(f"tcp://127.0.0.1:{port.getsockname()[1]}")
        end_s = time.monotonic() + 20.5
        while time.monotonic() < end_s:
            syncer.poll(0.02)
            learner.poll(0.02)
        assert learner.control_link.is_up and not learner.bulk_link.is_up and learner.bulk_link.failed == set()
        with TransportProxy(int(syncer.bulk_endpoint.rpartition(":")[2]), listener=port.dup()):
            until(lambda: not learner.poll(0.02) and not syncer.poll(0.02) and learner.bulk_link.is_up, 8.0)
            learner.close()
