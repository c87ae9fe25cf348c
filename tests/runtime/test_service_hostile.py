"""What a peer may say, and what it costs: its own session at most, never the syncer, never the others."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import msgspec
import pytest
import torch

from lightning_diloco.protocol.identity import FragmentInfo, Version
from lightning_diloco.protocol.messages import (
    Busy,
    Contribution,
    Found,
    FoundingFragment,
    Heartbeat,
    JoinRefused,
    NeedFull,
    Ping,
    Pong,
    Progress,
    Resolved,
    SendState,
    Unresolved,
    Welcome,
    WhoAreYou,
)
from lightning_diloco.protocol.syncer_messages import Fenced
from lightning_diloco.protocol.wire import encode
from lightning_diloco.runtime.transport.frames import Begin, count_chunks, encode_frame
from tests.runtime.job_helpers import CONFIG, Background, Job, make_module, running_job, train, until, whole_life
from tests.runtime.job_raw_peer import RawPeer

SEED = 20251123


@pytest.fixture
def job(tmp_path):
    """A founded job whose learner 0 rests at its first boundaries."""
    with running_job(tmp_path) as job:
        client = job.client(0)
        client.join()
        yield job
        assert job.service.error is None


@pytest.fixture
def peer(job):
    with RawPeer(job.endpoint, make_module(), CONFIG, job.context) as peer:
        yield peer


def is_well(job: Job) -> None:
    """The syncer serves on: another learner joins, trains, and the whole ledger is exact."""
    client = job.client(None)
    client.join()
    train(client, 30)
    assert client.fenced is None
    client.leave("limit")
    assert job.service.error is None


def test_what_is_no_message_cannot_forge_a_line_of_the_log(job, peer, caplog):
    for word in ("x\nERROR forged\x1b[2J\x9b", "z" * 900_000):
        job.service._complaints._next_s = 0.0
        peer.say_bytes(msgspec.msgpack.encode((("job", "line", 0, 0), {"type": "Ping", "number": 1, word: 2})))
        until(lambda word=word: any(word[:1] in r.getMessage() and "unknown field" in r.getMessage() for r in caplog.records), 10)
    said = [record.getMessage() for record in caplog.records]
    assert all(line.isprintable() and len(line) < 1000 for line in said) and sum("unknown field" in line for line in said) == 2


# ---- one contribution, word by word -----------------------------------------------------------------------------------------


def prepared(job: Job, peer: RawPeer) -> torch.Tensor:
    """A member with eight tokens of work; a value for its contribution to fragment 0."""
    peer.join(7)
    until(lambda: job.machine.job.members.by_id(7).stage == "joined", 5)
    peer.step(1, 8)
    return torch.full((peer.layout.fragments[0].num_params,), 0.5)


def test_the_same_contribution_twice_is_idempotent_and_other_bytes_are_a_conflict(job, peer):
    d = prepared(job, peer)
    header, payload = peer.contribution(0, 1, d)
    assert peer.end_of(peer.offer(header, payload)) is None
    peer.hear(Resolved, fragment_id=0, seq=1, outcome="held")
    assert peer.end_of(peer.offer(header, payload)) is None
    assert peer.hear(Resolved, fragment_id=0, seq=1).outcome in ("held", "merged")
    other, other_payload = peer.contribution(0, 1, d + 1)
    peer.offer(other, other_payload)
    assert peer.hear(Resolved, fragment_id=0, seq=1, outcome="refused").reason == "conflict"
    merged = _merged_seqs(job)
    assert len(merged) == len(set(merged)) and job.machine.job.ledger.pending(7, 0) + job.machine.job.ledger.merged(7, 0) == 8
    is_well(job)


def _merged_seqs(job: Job) -> list[Any]:
    job.service._tape.flush()
    lines = (job.run_dir / "tape.jsonl").read_text().splitlines()
    merges = [e for e in map(json.loads, lines) if e["event"] == "merge"]
    return [(m["learner_id"], e["fragment_id"], m["seq"]) for e in merges for m in e["members"]]


REFUSED = {
    "overlap": {"tokens": 9},
    "conflict": {"base": Version(0, 5)},
    "stale_epoch": {"base": Version(1, 0)},
    "bad_checksum": {"crc": 12345},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_contribution_that_breaks_a_rule_is_refused_by_name(job, peer, reason):
    d = prepared(job, peer)
    peer.offer(*peer.contribution(0, 1, d, **REFUSED[reason]))
    assert peer.hear(Resolved, fragment_id=0, seq=1).reason == reason
    peer.offer(*peer.contribution(0, 2, d))
    peer.hear(Resolved, fragment_id=0, seq=2, outcome="held")
    is_well(job)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(job, peer, value):
    d = prepared(job, peer)
    d[3] = value
    peer.offer(*peer.contribution(0, 1, d))
    assert peer.hear(Resolved, fragment_id=0, seq=1).reason == "nonfinite"
    is_well(job)


def test_a_contribution_of_another_life_is_neither_taken_nor_answered(job, peer):
    d = prepared(job, peer)
    peer.offer(*peer.contribution(0, 1, d), incarnation=3)
    peer.poll_for(0.3)
    assert not [m for m in peer.heard if isinstance(m, Resolved)]
    peer.offer(*peer.contribution(0, 1, d))
    peer.hear(Resolved, fragment_id=0, seq=1, outcome="held")
    is_well(job)


@pytest.mark.parametrize("change", [-4, 4, 1 << 40], ids=["short", "long", "huge"])
def test_a_payload_of_the_wrong_size_gets_no_memory(job, peer, change):
    d = prepared(job, peer)
    header, payload = peer.contribution(0, 1, d)
    if change > 1 << 20:
        _announce(peer, header, change)
    else:
        assert peer.end_of(peer.offer(header, bytes(len(payload) + change))) == ("oversized" if change > 0 else "refused")
    if 0 < change < 1 << 20:
        peer.hear(JoinRefused, reason="oversized")
    assert job.service._transport._incoming.buffer_bytes == 0
    is_well(job)


def _announce(peer: RawPeer, header: Contribution, total_bytes: int) -> None:
    """Offer more bytes than there are, on the bulk socket itself."""
    begin = Begin(1 << 40, 1, encode(peer.envelope, header), total_bytes, count_chunks(total_bytes), 0)
    peer.transport._bulk.send(encode_frame(begin))
    peer.hear(JoinRefused, reason="oversized")


def test_a_stranger_gets_no_memory_and_a_member_is_not_mistaken_for_it(job, peer):
    d = prepared(job, peer)
    header, payload = peer.contribution(0, 1, d)
    with RawPeer(job.endpoint, make_module(), CONFIG, job.context) as stranger:
        stranger.transport.connect_bulk(job.service._transport.bulk_endpoint)
        stranger.envelope = peer.envelope
        assert stranger.end_of(stranger.offer(header, payload)) == "refused"
        for message in (Progress(inner_step=5, tokens=5), Heartbeat(inner_step=5, tokens=5), NeedFull(fragment_id=0)):
            stranger.say(message)
            stranger.hear(WhoAreYou)
    peer.offer(header, payload)
    peer.hear(Resolved, fragment_id=0, seq=1, outcome="held")
    is_well(job)


# ---- control ----------------------------------------------------------------------------------------------------------------


def test_garbage_on_control_and_bulk_changes_nothing(job, peer):
    dice = random.Random(SEED)
    prepared(job, peer)
    good = [bytes(dice.randrange(256) for _ in range(dice.randrange(1, 200))) for _ in range(300)]
    for data in [b"", b"\xc1", b"\x92", b"\xdd\xff\xff\xff\xff", *good]:
        peer.say_bytes(data)
        peer.transport._bulk.send(data)
        peer.offer(data, b"abcd")
    peer.say(Ping(number=77))
    peer.hear(Pong, number=77)
    peer.poll_for(0.2)
    assert job.clients[0].fenced is None
    is_well(job)


def test_messages_that_a_syncer_says_are_not_taken_from_a_learner(job, peer):
    prepared(job, peer)
    for message in (Pong(number=1), Welcome(role="founder", learner_id=0, incarnation=0), Fenced(detail="go away"), WhoAreYou()):
        peer.say(message)
    peer.say(Ping(number=78))
    peer.hear(Pong, number=78)
    assert job.clients[0].fenced is None
    is_well(job)


@pytest.mark.parametrize(
    "message",
    [
        Busy(fragment_id=2**62, round_id=1),
        NeedFull(fragment_id=5),
        Progress(inner_step=2**62, tokens=2**62),
        Heartbeat(inner_step=2**60, tokens=1),
    ],
    ids=lambda m: type(m).__name__,
)
def test_an_id_or_a_total_that_no_learner_has_costs_its_session(job, peer, message):
    prepared(job, peer)
    peer.say(message)
    peer.hear(JoinRefused, reason="wrong_layout")
    until(lambda: job.machine.job.members.by_id(7) is None, 5)
    assert job.clients[0].fenced is None
    is_well(job)


CONFIGS = {
    "nested": b"[" * 60_000,
    "number": b"17",
    "unknown": b'{"colour": 1}',
    "overflow": b'{"outer_lr": 1' + b"0" * 400 + b"}",
    "null": b"null",
    "bytes": b"\xff\xfe",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_cannot_be_read_is_refused(job, peer, name):
    peer.hello(learner_id=7, config=CONFIGS[name])
    peer.hear(JoinRefused, reason="config")
    assert job.machine.job.members.by_id(7) is None
    is_well(job)


def test_a_report_that_asks_for_a_flood_of_answers_is_dropped(job, peer):
    d = prepared(job, peer)
    d[0] = float("nan")
    peer.offer(*peer.contribution(0, 1, d))
    peer.hear(Resolved, fragment_id=0, seq=1)
    flood = tuple(Unresolved(0, 1) for _ in range(100_000))
    peer.say(Heartbeat(inner_step=1, tokens=8, unresolved=flood))
    peer.hello(learner_id=7, unresolved=flood, lineage=peer.envelope.lineage, versions=tuple(peer.versions[i] for i in range(4)))
    peer.say(Ping(number=79))
    peer.hear(Pong, number=79)
    assert len([m for m in peer.heard if isinstance(m, Resolved)]) == 0
    is_well(job)


def test_a_learner_that_refuses_every_publication_is_told_to_end(job, peer):
    prepared(job, peer)
    peer.transport._incoming._accept = lambda *_: False
    peer.say(NeedFull(fragment_id=1))
    assert "publications in a row" in peer.hear(JoinRefused, reason="wrong_layout").detail
    is_well(job)


# ---- founding ---------------------------------------------------------------------------------------------------------------


def founding(peer: RawPeer, **fields: Any) -> Found:
    infos = tuple(FragmentInfo(fragment_id=f.fragment_id, num_params=f.num_params, kind=f.kind) for f in peer.layout.fragments)
    standard = {"layout": peer.layout.to_bytes(), "fragments": infos, "static_bytes": sum(s.num_bytes for s in peer.layout.static)}
    return Found(**({**standard, "static_crc": 0} | fields))


BAD_FOUNDINGS = {
    "layout": {"layout": b"nonsense"},
    "empty": {"layout": b""},
    "sizes": {"fragments": (FragmentInfo(fragment_id=0, num_params=10**15),)},
    "static": {"static_bytes": 2**60},
    "versions": {"versions": (1, 2)},
}


@pytest.mark.parametrize("name", BAD_FOUNDINGS)
def test_a_founder_whose_description_is_wrong_is_refused_and_the_next_one_founds(tmp_path, name):
    with running_job(tmp_path) as job, RawPeer(job.endpoint, make_module(), CONFIG, job.context) as peer:
        peer.hello(learner_id=0)
        peer.hear(Welcome, role="founder")
        peer.say(founding(peer, **BAD_FOUNDINGS[name]))
        peer.hear(JoinRefused)
        assert job.client(0).join().role == "member"
        is_well(job)


def test_founding_payloads_with_another_checksum_are_refused_and_of_others_not_taken(tmp_path):
    with running_job(tmp_path) as job, RawPeer(job.endpoint, make_module(), CONFIG, job.context) as peer:
        peer.hello(learner_id=0)
        peer.hear(Welcome, role="founder")
        size = 4 * peer.layout.fragments[0].num_params
        with RawPeer(job.endpoint, make_module(), CONFIG, job.context) as other:
            other.hello(learner_id=1)
            other.hear(Welcome, role="waiting")
            peer.say(founding(peer))
            peer.hear(SendState)
            assert other.end_of(other.offer(FoundingFragment(fragment_id=0, crc=0), bytes(size))) == "refused"
            other.say(founding(other))
            assert peer.end_of(peer.offer(FoundingFragment(fragment_id=0, crc=0, part="momentum"), bytes(size))) == "refused"
            peer.offer(FoundingFragment(fragment_id=0, crc=1), bytes(size))
            assert "checksum" in peer.hear(JoinRefused, reason="bad_checksum").detail
        assert job.client(0).join().role == "member"
        is_well(job)


# ---- learners that err in good faith ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["nonfinite", "norm"])
def test_a_learner_whose_values_are_refused_heals_and_goes_on_and_nobody_else_notices(tmp_path, reason):
    config = dataclasses.replace(CONFIG, norm_gate=100.0)
    with running_job(tmp_path, config=config) as job:
        sick, well = job.client(0), job.client(1)
        healed: list[int] = []
        sick.on_heal = lambda parameters: healed.append(len(parameters))
        sick.join()
        other = Background(lambda: whole_life(well, 250))
        train(sick, 60)
        parameter = next(sick._module.parameters())
        with torch.no_grad():
            parameter.mul_(float("nan")) if reason == "nonfinite" else parameter.add_(1e6)
        steps = 0
        while not healed:
            steps += 1
            assert steps < 300
            train(sick, 1)
        train(sick, 100)
        assert all(torch.isfinite(p).all() for p in sick._module.parameters())
        other.result()
        sick.leave("limit")
        summary = job.finish()
    assert len(healed) <= 2 * len(sick.layout.fragments), "once poisoned, it must not be poisoned again and again"
    discarded = summary["discarded_by_reason"]
    assert [r for r, n in discarded.items() if n] == [reason]
    assert all(fragment["pending"] == 0 for fragment in summary["fragments"])
    assert 0 < discarded[reason] < 0.5 * summary["learners"][0]["tokens"] and summary["learners"][1]["discarded"] == 0
