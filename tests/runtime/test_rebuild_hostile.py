"""The question round of `--rebuild`, on real sockets: who may speak, what is believed, and what it costs."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.outer import buffer_of, pack_static, parts_of
from lightning_diloco.outer.static import static_bytes
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import (
    PROTOCOL_VERSION,
    Describe,
    Description,
    Envelope,
    FoundingStatic,
    Ping,
    Pong,
    WhoAreYou,
)
from lightning_diloco.runtime import rebuilding
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.keys import SiteKeys, SyncerKeys
from lightning_diloco.runtime.rebuilding import Rebuilding
from lightning_diloco.runtime.transport import SyncerTransport
from tests.runtime.job_helpers import CONFIG, make_module, until
from tests.runtime.job_raw_peer import RawPeer
from tests.runtime.key_helpers import Keys, transport_with
from tests.tape_checker import load_tape

OURS = Envelope("job", "line", 3, 1)


class Question:
    """A rebuilding on a thread of its own."""

    def __init__(self, run_dir: Path, keys: SyncerKeys | None = None) -> None:
        self.run_dir = run_dir
        self.transport = SyncerTransport("tcp://127.0.0.1:0", None, accept=lambda *x: self.rebuilding.accept(*x), keys=keys)
        self.transport.bind()
        self.rebuilding = Rebuilding(self.transport, token="secret", num_slots=None)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.rebuilding.run(self.run_dir)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def ended(self) -> BaseException | None:
        self.thread.join(20)
        assert not self.thread.is_alive(), "it waits on"
        return self.error

    @property
    def has_written(self) -> bool:
        return (self.run_dir / "tape.jsonl").exists()


@pytest.fixture
def keys(request, tmp_path) -> Keys | None:
    """None, unless a test names sites: they are admitted before the syncer listens."""
    keys = Keys(tmp_path / "keys") if hasattr(request, "param") else None
    for name in getattr(request, "param", ()):
        keys.site(name)
    return keys


@pytest.fixture
def question(tmp_path, monkeypatch, keys) -> Iterator[Question]:
    monkeypatch.setattr(rebuilding, "LISTEN_S", 1.0)
    monkeypatch.setattr(rebuilding, "AGAIN_S", 0.3)
    question = Question(tmp_path, keys and keys.syncer)
    yield question
    question.transport.close()


@contextmanager
def witness(
    question: Question, module: nn.Module | None = None, learner_id: int = 0, site: SiteKeys | None = None, **hello: Any
) -> Iterator[RawPeer]:
    with RawPeer(question.transport.control_endpoint, module or make_module(), CONFIG, transport=transport_with(site)) as peer:
        peer.envelope = OURS
        say_hello(peer, learner_id, **hello)
        yield peer


def say_hello(peer: RawPeer, learner_id: int = 0, **fields: Any) -> None:
    versions = tuple(Version(3, 10 + i) for i in range(len(peer.layout.fragments)))
    peer.hello(
        **{"learner_id": learner_id, "lineage": "line", "versions": versions, "token": "secret", "inner_step": 9, "tokens": 90} | fields
    )


def describe(peer: RawPeer, **fields: Any) -> None:
    told = {"layout": peer.layout.to_bytes(), "earlier": (0,) * len(peer.layout.fragments)} | fields
    peer.say(Description(**told))


def give_static(peer: RawPeer, module: nn.Module) -> str | None:
    asked = peer.hear(Describe, with_static=True)
    peer.transport.connect_bulk(asked.shards[0].bulk_endpoint)
    static = pack_static(module, peer.layout)
    return peer.end_of(peer.offer(FoundingStatic(crc=crc32(static)), buffer_of(static)))


def test_one_witness_is_enough_and_strangers_change_nothing(question):
    module = make_module()
    endpoint = question.transport.control_endpoint
    with RawPeer(endpoint, make_module(), CONFIG) as stranger:
        for data in (b"", b"\xc1" * 100, secrets.token_bytes(5000)):
            stranger.say_bytes(data)
        stranger.hello(token="secret")
        stranger.say(Ping(number=4))
        assert stranger.hear(Pong).number == 4, "a newcomer sees that somebody is there"
        stranger.envelope = OURS
        describe(stranger)
        assert stranger.hear(WhoAreYou) is not None
        say_hello(stranger, token="wrong")
        say_hello(stranger, protocol_version=PROTOCOL_VERSION + 1)
        say_hello(stranger, learner_id=10**6)
        say_hello(stranger, tokens=2**60)
        say_hello(stranger, versions=(Version(2**60, 1),))
        stranger.envelope = msgspec.structs.replace(OURS, job_id="job\n\x1b[2J")
        say_hello(stranger)
        stranger.say(Ping(number=5))
        assert stranger.hear(Pong, number=5)
        assert question.rebuilding._witnesses == {}
        with witness(question, module) as peer:
            asked = peer.hear(Describe)
            assert not asked.with_static, "how large it is is not known yet"
            peer.transport.connect_bulk(asked.shards[0].bulk_endpoint)
            static = pack_static(module, peer.layout)
            assert peer.end_of(peer.offer(FoundingStatic(crc=crc32(static)), buffer_of(static))) == "refused"
            describe(peer)
            peer.hear(Describe, with_static=True)
            stranger.transport.connect_bulk(question.transport.bulk_endpoint)
            assert stranger.end_of(stranger.offer(FoundingStatic(crc=1), bytes(8))) == "refused"
            wrong = torch.zeros(static_bytes(peer.layout) + 1, dtype=torch.uint8)
            assert peer.end_of(peer.offer(FoundingStatic(crc=crc32(wrong)), buffer_of(wrong))) == "refused"
            assert peer.end_of(peer.offer(FoundingStatic(crc=crc32(static)), buffer_of(static))) is None
            assert question.ended() is None
    tape = load_tape(question.run_dir / "tape.jsonl")
    assert [e["event"] for e in tape] == ["job", "join", "counters"]
    assert tape[0]["epoch"] == 3 and tape[0]["founded_n"][:2] == [10, 11] and tape[2]["tokens"] == 90


def test_it_waits_for_all_that_are_heard_and_their_ended_lives_are_told(question):
    module = make_module()
    with witness(question, module) as first, witness(question, module, learner_id=5) as second:
        describe(first)
        assert give_static(first, module) is None
        for _ in range(3):
            second.hear(Describe)
            assert question.thread.is_alive() and not question.has_written, "learner 5 is there and has not answered"
        describe(second, earlier=(30, 40, *[40] * (len(second.layout.fragments) - 2)))
        assert question.ended() is None
    tape = load_tape(question.run_dir / "tape.jsonl")
    of_5 = [(e["event"], e.get("tokens"), e.get("role")) for e in tape if e.get("learner_id") == 5]
    assert of_5 == [
        ("join", None, "earlier"),
        ("counters", 40, None),
        ("leave", None, None),
        ("discard", 10, None),
        ("join", None, "rebuilt"),
        ("counters", 90, None),
    ]


@pytest.mark.parametrize("keys", [("paris", "oslo")], indirect=True, ids=["paris and oslo"])
def test_what_a_site_has_told_whose_key_is_revoked_does_not_count(question, keys):
    module, paris, oslo = make_module(), keys.site("paris"), keys.site("oslo")
    with witness(question, module, site=paris) as revoked, witness(question, module, learner_id=5, site=oslo) as other:
        describe(revoked)
        assert give_static(revoked, module) is None
        other.hear(Describe)
        until(lambda: question.rebuilding._static is not None)
        keys.revoke("paris")
        until(lambda: question.rebuilding._static is None)
        assert [w.hello.learner_id for w in question.rebuilding._witnesses.values()] == [5] and not question.has_written
        describe(other)
        assert give_static(other, module) is None
        assert question.ended() is None
    assert {e["learner_id"] for e in load_tape(question.run_dir / "tape.jsonl") if e["event"] == "join"} == {5}


def test_a_life_that_woke_beside_its_successor_is_not_listened_to(question):
    module = make_module()
    with witness(question, module) as newer:
        newer.hear(Describe)
        with RawPeer(question.transport.control_endpoint, module, CONFIG) as older:
            older.envelope = Envelope("job", "line", 3, 0)
            say_hello(older)
            older.say(Ping(number=1))
            older.hear(Pong)
            assert list(question.rebuilding._witnesses) == [newer.nonce]
            describe(newer)
            assert give_static(newer, module) is None
            assert question.ended() is None


@pytest.mark.parametrize(
    "change",
    [
        {"layout": b"nonsense"},
        {"layout": b"[" * 10_000},
        {"earlier": (1,)},
        {"earlier": (2**60,) * 5},
        {"layout": "other"},
    ],
    ids=["no layout", "nested", "too few", "too many tokens", "another layout"],
)
def test_a_description_that_cannot_be_is_none(change, question):
    with witness(question) as peer:
        peer.hear(Describe)
        if change == {"layout": "other"}:
            with RawPeer(question.transport.control_endpoint, make_module(width=20), CONFIG) as other:
                change = {"layout": other.layout.to_bytes()}
        describe(peer, **change)
        peer.say(Ping(number=1))
        peer.hear(Pong)
        assert [w.layout for w in question.rebuilding._witnesses.values()] == [None]
        assert question.thread.is_alive() and question.error is None and not question.has_written


@pytest.mark.parametrize("config", [b"[" * 60_000, b"\xff", b"[1]", json.dumps({"outer_lr": -1}).encode()])
def test_a_configuration_that_cannot_be_read_ends_it_with_a_sentence(config, question):
    module = make_module()
    with witness(question, module, config=config) as peer:
        peer.hear(Describe)
        describe(peer)
        assert give_static(peer, module) is None
        error = question.ended()
    assert isinstance(error, ConfigurationError) and "--rebuild: The configuration cannot be read" in str(error)
    assert not question.has_written


def test_learners_of_several_shards_end_it_with_a_sentence(question):
    """They dial the lead's address; what it could take from them is a part of the model."""
    with RawPeer(question.transport.control_endpoint, make_module(), CONFIG) as peer:
        peer.envelope, peer.layout = OURS, parts_of(peer.layout, 2)[0]
        say_hello(peer, fingerprint=peer.layout.fingerprint())
        error = question.ended()
    assert isinstance(error, ConfigurationError) and "a syncer with 2 shards, whose job cannot be rebuilt" in str(error)
    assert not question.has_written
