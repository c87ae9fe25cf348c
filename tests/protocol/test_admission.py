"""The door: who founds, who is refused with which sentence, and what a hello said twice does."""

from __future__ import annotations

import json

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.identity import FragmentInfo, Version
from lightning_diloco.protocol.messages import PROTOCOL_VERSION, Envelope, Found, Hello, JoinRefused
from lightning_diloco.protocol.records import JobRecord, JoinRecord
from tests.protocol.pair import Pair

REFUSALS = {
    "fingerprint": ({"fingerprint": "other"}, "wrong_layout", "layout"),
    "outer_lr": ({"config": {"outer_lr": 0.1}}, "config", "outer_lr=0.1 differs from the job's 0.7"),
    "sync_interval_steps": ({"config": {"sync_interval_steps": 9}}, "config", "sync_interval_steps=9"),
    "unknown option": ({"config": {"outer_lrr": 0.1}}, "config", "outer_lrr"),
    "no json": ({"config": b"{"}, "config", "cannot be read"),
    "no mapping": ({"config": b"[]"}, "config", "cannot be read"),
    "deep json": ({"config": b"[" * 60_000}, "config", "cannot be read"),
    "infinite number": ({"config": {"outer_lr": 10**400}}, "config", ""),
    "token": ({"token": "guess"}, "token", "token"),
    "learner_id": ({"learner_id": 7}, "learner_id", "learner_id=7: this job has 3 learners, ids 0 to 2"),
    "id in use": ({"learner_id": 0}, "id_in_use", "learner_id=0 is in use"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_names_the_field(name):
    change, reason, sentence = REFUSALS[name]
    pair = Pair(num_fragments=1, options={"token": "open", "num_slots": 3})
    pair.found(1, token="open")
    config = change.get("config", {})
    fields = {**pair.config.as_dict(), **config} if isinstance(config, dict) else None
    options = {"token": "open", "learner_id": 1, **change, "config": json.dumps(fields).encode() if fields is not None else config}
    refused = pair.add(joins=False, **{k: v for k, v in options.items() if k != "learner_id"})
    object.__setattr__(refused.machine.state.options, "learner_id", options["learner_id"])
    pair.hello(refused)
    pair.settle()
    assert refused.stage == "refused"
    assert sentence in refused.detail and len(refused.detail) <= 2000
    assert pair.syncer.job.members.of(refused.nonce) is None


def hello_of(pair: Pair, **change) -> Hello:
    fields = {
        "protocol_version": PROTOCOL_VERSION,
        "token": "",
        "learner_id": None,
        "nonce": "ff",
        "takeover_token": "",
        "config": json.dumps(pair.config.as_dict()).encode(),
        "fingerprint": "print",
    }
    return Hello(**{**fields, **change})


@pytest.mark.parametrize(
    ("envelope", "change", "reason", "sentence"),
    [
        (Envelope("job", "", 0, 0), {"protocol_version": 1}, "protocol_version", "protocol_version=1"),
        (Envelope("another", "", 0, 0), {}, "job_id", "job_id='another'"),
        (Envelope("job", "", 0, 0), {"lineage": "second"}, "lineage", "another history"),
    ],
)
def test_a_stranger_of_another_job_or_release_is_refused(envelope, change, reason, sentence):
    pair = Pair(num_fragments=1)
    pair.found(1)
    event = ev.MessageReceived(session="ff", envelope=envelope, message=hello_of(pair, **change))
    reply, _ = pair.syncer.handle(event, pair.now_s)
    assert isinstance(reply.message, JoinRefused)
    assert reply.message.reason == reason and sentence in reply.message.detail


def test_a_learner_that_shows_a_lineage_never_founds_an_empty_job():
    pair = Pair(num_fragments=1)
    event = ev.MessageReceived(session="ff", envelope=Envelope("job", "", 0, 0), message=hello_of(pair, learner_id=0, lineage="old"))
    reply, _ = pair.syncer.handle(event, pair.now_s)
    assert isinstance(reply.message, JoinRefused) and not pair.syncer.job.is_founded


def test_only_the_appointed_learner_founds_and_the_others_wait_for_it():
    pair = Pair(num_fragments=2)
    second = pair.add(1)
    assert second.stage == "greeting" and not pair.syncer.job.is_founded
    first = pair.add(0)
    assert first.is_joined and second.is_joined
    assert [r.founder_id for r in pair.of(JobRecord)] == [0]
    assert [(r.learner_id, r.role) for r in pair.of(JoinRecord)] == [(1, "joiner"), (0, "founder")]


def test_a_founded_job_is_never_founded_again():
    pair = Pair(num_fragments=1)
    (first,) = pair.found(1)
    pair.steps([first], 6)
    pair.kill(first)
    pair.take(ev.LearnerLost(learner_id=0))
    again = pair.add(0)
    assert again.joined.role == "joiner" and again.theta[0] == pair.shadow(0)
    pair.take(ev.FoundingArrived(session=again.nonce, crcs=(1,), payload_bytes=1))
    assert len(pair.of(JobRecord)) == 1


def test_when_the_founder_dies_its_next_life_founds_and_those_in_line_join():
    pair = Pair(num_fragments=1)
    first = pair.add(0, joins=False)
    pair.hello(first)
    second = pair.add(1, joins=False)
    pair.hello(second)
    pair.deliver_control_up(first)
    pair.deliver_control_up(second)
    pair.deliver_control_down(first)
    pair.deliver_control_up(first)
    pair.kill(first)
    pair.take(ev.LearnerLost(learner_id=0))
    pair.take(ev.FoundingArrived(session=first.nonce, crcs=(1,), payload_bytes=1))
    assert not pair.syncer.job.is_founded
    pair.settle()
    assert second.stage == "greeting"
    again = pair.add(0)
    assert again.is_joined and second.is_joined
    assert {r.learner_id: r.role for r in pair.of(JoinRecord)} == {0: "founder", 1: "joiner"}


def test_the_description_of_a_dead_founder_is_not_taken_for_that_of_its_next_life():
    pair = Pair(num_fragments=1)
    first = pair.add(0, joins=False)
    pair.hello(first)
    pair.deliver_control_up(first)
    pair.deliver_control_down(first)
    pair.deliver_control_up(first)
    pair.kill(first)
    pair.take(ev.LearnerLost(learner_id=0))
    again = pair.add(0, joins=False)
    pair.hello(again)
    pair.deliver_control_up(again)
    pair.take(ev.FoundingArrived(session=again.nonce, crcs=(1,), payload_bytes=1))
    assert not pair.syncer.job.is_founded


@pytest.mark.parametrize(
    ("fragments", "versions"),
    [((FragmentInfo(1, 8),), ()), ((FragmentInfo(0, 8), FragmentInfo(0, 8)), ()), ((FragmentInfo(0, 8),), (1, 2))],
)
def test_a_founders_description_that_does_not_hold_together_is_refused(fragments, versions):
    pair = Pair(num_fragments=1)
    first = pair.add(0, joins=False)
    pair.hello(first)
    pair.deliver_control_up(first)
    found = Found(layout=b"", fragments=fragments, static_bytes=0, static_crc=0, versions=versions)
    pair.take(ev.MessageReceived(session=first.nonce, envelope=Envelope("job", "", 0, 0), message=found))
    pair.deliver_control_down(first)
    pair.deliver_control_down(first)
    assert first.stage == "refused" and "fragments" in first.detail


def test_a_founder_with_an_unreadable_configuration_is_refused():
    pair = Pair(num_fragments=1)
    first = pair.add(0, config=b"{}}")
    assert first.stage == "refused" and "cannot be read" in first.detail


def test_one_in_line_whose_model_differs_is_refused_when_the_job_is_founded():
    pair = Pair(num_fragments=1)
    second = pair.add(1, fingerprint="other")
    first = pair.add(0)
    assert first.is_joined and second.stage == "refused" and "layout" in second.detail


def test_a_hello_said_twice_before_the_answer_changes_nothing():
    pair = Pair(num_fragments=2)
    first = pair.add(0, joins=False)
    pair.hello(first)
    pair.hello(first)
    pair.settle()
    second = pair.add(1, joins=False)
    pair.hello(second)
    pair.hello(second)
    pair.deliver_control_up(second)
    pair.deliver_control_up(second)
    assert len(second.bulk_down) == 2, "the full transfers go out once"
    pair.settle()
    assert first.is_joined and second.is_joined and len(pair.of(JoinRecord)) == 2


@pytest.mark.parametrize("lost", ["welcome", "ready"])
@pytest.mark.parametrize("who", [0, 1])
def test_a_join_survives_the_loss_of(who, lost):
    pair = Pair(num_fragments=2)
    if who == 1:
        pair.found(1)
    node = pair.add(who, joins=False)
    pair.hello(node)
    pair.deliver_control_up(node)
    if lost == "welcome":
        node.control_down.clear()
        while node.bulk_down:
            pair.deliver_bulk_down(node)
        pair.hello(node)
    else:
        while not node.is_joined:
            for queue, deliver in (
                (node.control_down, pair.deliver_control_down),
                (node.bulk_down, pair.deliver_bulk_down),
                (node.bulk_up, pair.deliver_bulk_up),
                (node.control_up, pair.deliver_control_up),
            ):
                if queue and not node.is_joined:
                    deliver(node)
        node.control_up.clear()
        pair.step(node)
    pair.settle()
    assert node.is_joined and pair.syncer.job.members.of(node.nonce).stage == "joined"


def test_a_session_that_is_resumed_keeps_its_incarnation_and_gets_only_what_it_misses():
    pair = Pair(num_fragments=2)
    first, second = pair.found(2)
    pair.steps([first, second], 2)
    while pair.version(0) < 2:
        pair.step(first)
        pair.advance(1.0)
        while first.control_up or first.control_down or first.bulk_up or first.bulk_down:
            for queue, deliver in (
                (first.control_up, pair.deliver_control_up),
                (first.control_down, pair.deliver_control_down),
                (first.bulk_up, pair.deliver_bulk_up),
                (first.bulk_down, pair.deliver_bulk_down),
            ):
                if queue:
                    deliver(first)
    second.bulk_down.clear()
    before = len(pair.of(JoinRecord))
    pair.reconnect(second)
    pair.settle()
    pair.step(second)
    assert second.joined.incarnation == 0 and len(pair.of(JoinRecord)) == before
    assert [f.held.n for f in second.machine.state.fragments] == [pair.version(0), pair.version(1)]


@pytest.mark.parametrize("arrived", [False, True])
def test_a_contribution_in_flight_at_a_reconnection_is_merged_once(arrived):
    pair = Pair(num_fragments=1)
    first, second = pair.found(2)
    pair.steps([first, second], 4)
    pair.step(first)
    while first.control_up:
        pair.deliver_control_up(first)
    for node in (first, second):
        while node.control_down:
            pair.deliver_control_down(node)
    pair.step(second)
    if arrived:
        pair.deliver_bulk_up(second)
    else:
        second.bulk_up.clear()
    pair.reconnect(second)
    pair.settle()
    pair.steps([first, second], 12)
    pair.leave(second)
    pair.leave(first)
    pair.settle()
    assert sorted(pair.shadow(0)) == sorted(pair.tokens_of)


def test_a_new_process_without_an_id_gets_one_that_nobody_had_and_then_one_that_is_free():
    pair = Pair(num_fragments=1, options={"num_slots": 2})
    pair.found(1)
    assert pair.add().learner_id == 1
    pair.take(ev.LearnerLost(learner_id=1))
    assert pair.add().learner_id == 1


def test_a_job_that_was_founded_from_a_checkpoint_goes_on_with_its_version_numbers():
    pair = Pair(num_fragments=2)
    first = pair.add(0, founded_n=(7, 9))
    assert [f.held for f in first.machine.state.fragments] == [Version(0, 7), Version(0, 9)]
    pair.steps([first], 6)
    assert pair.version(0) == 9 and pair.version(1) == 10
    assert not [r for r in pair.tape if getattr(r, "is_full", False)], "no full transfer is needed"


def test_a_joiner_is_told_the_jobs_step():
    pair = Pair(num_fragments=1)
    nodes = pair.found(3)
    for _ in range(6):
        pair.steps(nodes, 1)
    late = pair.add(3)
    assert late.joined.job_step == 6


def test_after_the_end_nobody_joins():
    pair = Pair(num_fragments=1, options={"is_supervised": True})
    (first,) = pair.found(1)
    pair.steps([first], 5)
    pair.take(ev.Finish(status="stopped"))
    assert pair.ended.status == "stopped"
    assert pair.syncer.handle(ev.Tick(), pair.now_s) == []


def test_finish_before_the_founding_ends_at_once():
    pair = Pair(num_fragments=1)
    pair.add(1)
    assert pair.syncer.next_deadline_s() is None
    pair.take(ev.Finish(status="failed"))
    assert pair.ended.status == "failed" and pair.ended.versions == ()


def test_a_hello_while_the_last_merge_runs_is_told_that_the_job_has_ended():
    pair = Pair(num_fragments=1)
    (first,) = pair.found(1)
    pair.manual_merge = True
    pair.steps([first], 1)
    pair.step(first)
    pair.settle()
    pair.take(ev.Finish(status="stopped"))
    assert pair.ended is None
    late = pair.add(1)
    assert late.stage == "refused" and "has ended" in late.detail
    pair.merge()
    assert pair.ended is not None


def test_a_contribution_that_comes_after_the_end_of_its_job_fences_nobody():
    pair = Pair(num_fragments=2)
    (first,) = pair.found(1)
    pair.manual_merge = True
    for _ in range(40):
        pair.step(first)
        for _ in range(3):
            while first.control_up:
                pair.deliver_control_up(first)
            while first.control_down:
                pair.deliver_control_down(first)
            pair.encode(first)
            if not pair.closing and first.bulk_up:
                pair.deliver_bulk_up(first)
        if pair.closing and first.bulk_up:
            break
    assert pair.closing and first.bulk_up[0][0] == "contribution"
    pair.take(ev.Finish(status="stopped"))
    assert pair.ended is None
    first.control_down.clear()
    pair.deliver_bulk_up(first)
    assert not first.control_down
