"""Keys on real sockets: who is let in, who is not, who is shut out, and that whoever is refused changes nothing."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from lightning_diloco.errors import DiLoCoError, SyncerUnavailableError
from lightning_diloco.protocol.messages import JoinRefused, Progress
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from lightning_diloco.runtime.keys import SiteKeys, admit
from lightning_diloco.runtime.transport import SYNCER, ControlReceived, KeyRevoked, LearnerTransport, SyncerTransport
from lightning_diloco.runtime.transport.gate import MAX_PEERS_PER_KEY
from tests.runtime.job_helpers import CONFIG, Background, make_module, running_job, train, until, whole_life
from tests.runtime.job_raw_peer import RawPeer
from tests.runtime.key_helpers import Keys, transport_with
from tests.runtime.transport_proxy import TransportProxy
from tests.tape_checker import load_tape


@contextmanager
def listening(keys: Keys | None) -> Iterator[SyncerTransport]:
    """A syncer's transport alone."""
    syncer = SyncerTransport(accept=lambda *_: True, keys=None if keys is None else keys.syncer)
    syncer.bind()
    try:
        yield syncer
    finally:
        syncer.close()


@contextmanager
def dialling(endpoint: str, keys: SiteKeys | None, nonce: bytes = b"n" * 16) -> Iterator[LearnerTransport]:
    learner = LearnerTransport(endpoint, nonce=nonce, accept=lambda *_: True, configure=None if keys is None else keys.configure)
    learner.connect()
    try:
        yield learner
    finally:
        learner.close()


def heard(syncer: SyncerTransport, wait_s: float = 0.0) -> list[Any]:
    """Everything that has arrived until the wait is over."""
    events, end_s = [], time.monotonic() + wait_s
    while (left_s := end_s - time.monotonic()) > 0 or not events:
        events += syncer.poll(max(0.0, min(left_s, 0.1)))
        if left_s <= 0:
            break
    return events


def hear(syncer: SyncerTransport, kind: type, limit_s: float = 10.0) -> Any:
    found: list[Any] = []

    def arrived() -> bool:
        found.extend(event for event in syncer.poll(0.05) if isinstance(event, kind))
        return bool(found)

    until(arrived, limit_s)
    return found[0]


# ---- refused at the door --------------------------------------------------------------------------------------------------------


def test_strangers_are_refused_counted_logged_once_and_change_nothing(keys, tmp_path, run_dir, caplog):
    other = Keys(tmp_path / "other")
    strangers = {
        "no key": None,
        "not admitted": keys.site("stranger", is_admitted=False),
        "of another job": other.site("paris", syncer=keys.public),
        "for another syncer": other.site("oslo"),
    }
    paris = keys.site("lyon")
    with running_job(run_dir, "tcp", keys=keys.syncer) as job:
        client = job.client(0, keys=paris)
        client.join()
        train(client, 20)
        until(lambda: job.machine.job.ledger.tokens(0) == 20 * 16)
        before = (job.machine.job.ledger.tokens(0), [m.learner_id for m in job.machine.job.members.present()])
        stats = job.service._transport.stats
        peers = {name: RawPeer(job.endpoint, make_module(1), CONFIG, transport=transport_with(k)) for name, k in strangers.items()}
        try:
            for peer in peers.values():
                peer.transport.connect_bulk(job.service.bulk_endpoint)
                peer.hello(learner_id=1)
                peer.offer(b"anything", b"x" * 1000)
            until(lambda: {"unknown_key", "other_syncer"} <= stats.drops.keys() and {"no_keys", "handshake"} & stats.drops.keys())
            for _ in range(4):
                for peer in peers.values():
                    peer.poll(0.05)
            links = [link for peer in peers.values() for link in (peer.transport.control_link, peer.transport.bulk_link)]

            def were_refused_at_both_doors() -> bool:
                for peer in peers.values():
                    peer.poll(0.02)
                return all(link.failed for link in links) and stats.drops.get("unknown_key", 0) >= 4

            until(were_refused_at_both_doors)
            assert not any(link.was_up for link in links)
            # A handshake that fails says nothing of the job.
            assert [name for name, peer in peers.items() if peer.heard or peer.published] == []
        finally:
            for peer in peers.values():
                peer.transport.close()
        assert (job.machine.job.ledger.tokens(0), [m.learner_id for m in job.machine.job.members.present()]) == before
        train(client, 20)
        client.leave("limit")
        summary = job.finish()
    assert summary["tokens"] == summary["tokens_merged"] == 40 * 16 and [x["learner_id"] for x in summary["learners"]] == [0]
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("gate")]
    for words in (" is not admitted (lightning-diloco keygen", "does not open with this syncer's key"):
        assert 1 <= sum(words in line for line in lines) <= 2, lines
    assert len(lines) < sum(stats.drops.values())
    (counted,) = [line for line in lines if line.startswith("Refused in all: ")]
    assert f"unknown_key {stats.drops['unknown_key']}" in counted


def test_a_site_that_is_admitted_meanwhile_comes_in(keys):
    late = keys.site("late", is_admitted=False)
    with listening(keys) as syncer, dialling(syncer.control_endpoint, late) as learner:
        until(lambda: not syncer.poll(0.02) and "unknown_key" in syncer.stats.drops)
        admit(keys.folder, "late", late.public.hex())

        def arrives() -> bool:
            learner.send_control(SYNCER, b"here")
            learner.poll(0.02)
            return any(isinstance(event, ControlReceived) for event in syncer.poll(0.02))

        until(arrives)
        assert syncer.stats.drops["unknown_key"] >= 1


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("none", "Pass keys=DIR with the folder that lightning-diloco keygen makes"),
        ("stranger", "does not admit this site's key: run lightning-diloco keygen DIR --admit NAME"),
        ("wrong syncer", "its key is not the one in this site's syncer.key"),
        ("syncer without", "start the syncer with --keys DIR"),
    ],
)
def test_a_learner_whose_keys_do_not_fit_ends_with_a_sentence(keys, tmp_path, which, words):
    site = {
        "none": None,
        "stranger": keys.site("stranger", is_admitted=False),
        "wrong syncer": Keys(tmp_path / "other").site("paris"),
        "syncer without": keys.site("paris"),
    }[which]
    with listening(None if which == "syncer without" else keys) as syncer:
        options = ClientOptions(endpoint=syncer.control_endpoint, config=CONFIG, join_timeout_s=1.5, keys=site)
        with pytest.raises(SyncerUnavailableError) as caught:
            LearnerClient(make_module(), options).join()
    assert words in str(caught.value) and f"No syncer answered at {syncer.control_endpoint} for 1.5 s." in str(caught.value)
    assert (which == "stranger") == (site is not None and site.public.hex() in str(caught.value))


@pytest.mark.parametrize("channel", ["control", "bulk"])
def test_what_was_recorded_and_is_played_back_is_refused(keys, channel):
    site = keys.site("paris")
    with listening(keys) as syncer:
        port = urlsplit(syncer.control_endpoint if channel == "control" else syncer.bulk_endpoint).port
        assert port is not None
        with TransportProxy(port) as proxy:
            if channel == "control":
                with dialling(f"tcp://127.0.0.1:{proxy.port}", site) as learner:
                    learner.send_control(SYNCER, b"a word that is said once")
                    assert hear(syncer, ControlReceived).data == b"a word that is said once"
            else:
                with dialling(syncer.control_endpoint, site) as learner:
                    learner.connect_bulk(f"tcp://127.0.0.1:{proxy.port}")
                    learner.send_payload(SYNCER, b"", b"a word that is said once")
                    until(lambda: [*learner.poll(0.02), *syncer.poll(0.02)] and syncer.stats.payloads_received == 1)
            until(lambda: len(proxy.recorded[0]) > 500)
            record = bytes(proxy.recorded[0])
        assert b"a word that is said once" not in record and b"n" * 16 not in record
        before = (syncer.stats.control_received, syncer.stats.bytes_up, syncer.stats.payloads_received)
        # In one piece, and in the pieces of a handshake: greeting, HELLO, INITIATE, the rest.
        for cuts in ([0, len(record)], [0, 64, 266, 523, len(record)]):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
                for start, end in zip(cuts, cuts[1:], strict=False):
                    line.sendall(record[start:end])
                    heard(syncer, 0.3)
                line.settimeout(10)
                assert _is_hung_up_on(line)
        heard(syncer, 0.6)
        assert (syncer.stats.control_received, syncer.stats.bytes_up, syncer.stats.payloads_received) == before
        assert syncer.stats.drops["other_syncer"] + syncer.stats.drops.get("handshake", 0) >= 2


# ---- shut out -------------------------------------------------------------------------------------------------------------------


def test_a_revoked_site_is_lost_at_once_and_what_it_says_is_dropped(keys, run_dir, caplog):
    paris, oslo = keys.site("paris"), keys.site("oslo")
    with running_job(run_dir, "tcp", keys=keys.syncer) as job:
        good = job.client(0, keys=paris)
        good.join()
        train(good, 10)
        with RawPeer(job.endpoint, good._module, CONFIG, transport=transport_with(oslo)) as peer:
            peer.join(1)
            peer.step(1, 16)
            until(lambda: any(m.learner_id == 1 and m.inner_step == 1 for m in job.machine.job.members.joined()))
            keys.revoke("oslo")
            said = peer.hear(JoinRefused, reason="key_revoked")
            assert "revoked" in said.detail
            peer.heard.clear()  # what was asked of it before
            until(lambda: job.machine.job.members.by_id(1) is None)
            drops = job.service._transport.stats.drops
            before = drops.get("revoked_key", 0)  # what was under way
            for number in range(2, 7):
                peer.say(Progress(inner_step=number, tokens=16 * number))
            until(lambda: drops.get("revoked_key", 0) == before + 5)
            with dialling(job.endpoint, oslo) as another:
                until(lambda: not another.poll(0.02) and another.failed_handshakes == {"unknown_key"})
            peer.poll_for(0.3)
            assert [m for m in peer.heard if not isinstance(m, JoinRefused)] == []
            until(lambda: drops.get("unknown_key", 0) >= 1)
            assert job.machine.job.ledger.tokens(1) == 16
        train(good, 10)
        good.leave("limit")
        summary = job.finish()
    assert {x["learner_id"]: x["tokens"] for x in summary["learners"]} == {0: 320, 1: 16}
    assert summary["discarded_by_reason"]["died"] == 16
    leaves = [(line["learner_id"], line["reason"]) for line in load_tape(run_dir / "tape.jsonl") if line["event"] == "leave"]
    assert (1, "died") in leaves
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("gate")]
    assert sum("The key of site oslo is revoked; 1 processes" in line for line in lines) == 1
    assert sum("A message from" in line and "is revoked" in line for line in lines) == 1


def test_the_next_message_after_a_revocation_is_dropped(keys):
    site = keys.site("paris")
    with listening(keys) as syncer, dialling(syncer.control_endpoint, site) as learner:
        for number in range(20):
            learner.send_control(SYNCER, b"before %d" % number)
        before: list[Any] = []
        until(lambda: before.extend(syncer.poll(0.02)) or len(before) == 20)
        assert {type(event) for event in before} == {ControlReceived} and heard(syncer, 0.6) == []  # the folder is looked at meanwhile
        keys.revoke("paris")
        for number in range(5):
            learner.send_control(SYNCER, b"after %d" % number)
        events = []
        until(lambda: events.extend(syncer.poll(0.02)) or syncer.stats.drops.get("revoked_key") == 5)
        assert events == [KeyRevoked(b"n" * 16)]


def test_a_learner_whose_key_is_revoked_ends_with_a_sentence_and_the_others_go_on(keys, run_dir):
    sites = [keys.site("paris"), keys.site("oslo")]
    with running_job(run_dir, "tcp", keys=keys.syncer) as job:
        clients = [job.client(i, make_module(0), keys=site) for i, site in enumerate(sites)]
        lives = [Background(lambda client=client: whole_life(client, 1000)) for client in clients]
        until(lambda: len(job.machine.job.members.joined()) == 2)
        keys.revoke("oslo")
        until(lambda: clients[1].fenced is not None)
        assert "key_revoked: The key of this site was revoked" in str(clients[1].fenced)
        assert isinstance(clients[1].fenced, DiLoCoError)
        for life in lives:
            life.result()
        summary = job.finish()
    assert summary["learners"][0]["tokens"] == 1000 * 16 and summary["learners"][0]["discarded"] == 0
    assert summary["learners"][1]["tokens"] < 1000 * 16


def test_a_file_that_becomes_unreadable_or_another_key_revokes_too(keys):
    site = keys.site("paris")
    path = keys.syncer.admitted / "paris.key"
    text = path.read_text()
    for change in (
        lambda: path.write_text("garbage"),
        lambda: path.write_text("12" * 32 + "\n"),
        lambda: path.rename(path.with_suffix(".old")),
    ):
        path.write_text(text)
        with listening(keys) as syncer, dialling(syncer.control_endpoint, site) as learner:
            learner.send_control(SYNCER, b"first")
            assert hear(syncer, ControlReceived).peer == b"n" * 16
            change()
            assert hear(syncer, KeyRevoked) == KeyRevoked(b"n" * 16)
            learner.send_control(SYNCER, b"second")
            until(
                lambda: not [e for e in syncer.poll(0.02) if isinstance(e, ControlReceived)] and syncer.stats.drops.get("revoked_key") == 1
            )


def test_nobody_speaks_in_the_name_of_another_sites_process(keys):
    paris, oslo = keys.site("paris"), keys.site("oslo")
    with listening(keys) as syncer, dialling(syncer.control_endpoint, paris) as learner:
        learner.send_control(SYNCER, b"mine")
        hear(syncer, ControlReceived)
        with dialling(syncer.control_endpoint, oslo) as thief:
            thief.send_control(SYNCER, b"not mine")
            until(lambda: not syncer.poll(0.02) and bool(syncer.stats.drops.get("foreign_key")))
            assert syncer.stats.drops["foreign_key"] == 1


def test_the_memory_of_processes_is_bounded_for_each_site(keys):
    paris, oslo = keys.site("paris"), keys.site("oslo")
    with listening(keys) as syncer:
        gate = syncer._gate
        assert gate is not None
        with dialling(syncer.control_endpoint, oslo) as learner:
            learner.send_control(SYNCER, b"x")
            hear(syncer, ControlReceived)
        for number in range(MAX_PEERS_PER_KEY + 10):
            assert gate.admits(number.to_bytes(16, "big"), _Frame(paris.public))
        assert len(gate._key_of) == MAX_PEERS_PER_KEY + 1
        assert gate._key_of[b"n" * 16] == _Frame(oslo.public).get("User-Id")


# ---- the door itself ------------------------------------------------------------------------------------------------------------


def test_who_connects_and_says_nothing_is_hung_up_on(keys, monkeypatch):
    monkeypatch.setattr("lightning_diloco.runtime.transport.gate._HANDSHAKE_MS", 300)
    with listening(keys) as syncer:
        port = urlsplit(syncer.control_endpoint).port
        with socket.create_connection(("127.0.0.1", port), timeout=15) as mute:
            assert _is_hung_up_on(mute)  # ZeroMQ itself would wait for 30 s, twice the patience here


def test_the_door_opens_again_when_the_thread_that_answers_has_ended(keys, caplog):
    site = keys.site("paris")
    with listening(keys) as syncer, dialling(syncer.control_endpoint, site) as learner:
        for number in range(2):
            _end_authenticator(syncer)
            until(lambda: not syncer.poll(0.02) and syncer._gate._authenticator.is_alive())
            with dialling(syncer.control_endpoint, site, nonce=bytes([number]) * 16) as another:
                another.send_control(SYNCER, b"through the new one")
                assert hear(syncer, ControlReceived).peer == bytes([number]) * 16
        learner.send_control(SYNCER, b"as before")
        hear(syncer, ControlReceived)
    assert sum("another one takes its place" in record.getMessage() for record in caplog.records) == 1


def test_a_transport_whose_answering_thread_has_ended_closes(keys):
    with listening(keys) as syncer:
        _end_authenticator(syncer)
        closing = Background(syncer.close)
        closing.result(10)
        assert closing.is_done


# ---- links that break -----------------------------------------------------------------------------------------------------------


def test_a_socket_that_is_replaced_has_its_keys_too(keys):
    site = keys.site("paris")
    with listening(keys) as syncer:
        port = urlsplit(syncer.control_endpoint).port
        assert port is not None
        with TransportProxy(port) as proxy, dialling(f"tcp://127.0.0.1:{proxy.port}", site) as learner:
            learner.send_control(SYNCER, b"before")
            hear(syncer, ControlReceived)
            proxy.slip_in(b"\x00\x05hello")  # what no end of an encrypted connection has said

            def arrives() -> bool:
                learner.send_control(SYNCER, b"after")
                learner.poll(0.02)
                return any(isinstance(e, ControlReceived) and e.data == b"after" for e in syncer.poll(0.02)) and proxy.num_connections > 1

            until(arrives)


def _end_authenticator(syncer: SyncerTransport) -> None:
    authenticator = syncer._gate._authenticator
    authenticator.pipe.send(b"TERMINATE")
    authenticator.thread.join(10)
    assert not authenticator.is_alive()


class _Frame:
    """The property that ZeroMQ attaches to a message."""

    def __init__(self, public: bytes) -> None:
        from zmq.utils import z85

        self._key = z85.encode(public).decode()

    def get(self, name: str) -> str:
        return self._key


def _is_hung_up_on(sock: socket.socket) -> bool:
    """Whether the other end closes or resets the connection before the socket's patience ends."""
    try:
        while sock.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True
