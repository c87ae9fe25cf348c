"""Who watches a job: what it is told, that it can change nothing, and that a crowd of it costs the job nothing."""

from __future__ import annotations

import random
import secrets
import threading
import time
from typing import Any, get_args

import msgspec
import pytest

from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.protocol import messages as msg
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.messages import PROTOCOL_VERSION, Envelope, Ping, Pong, Status, StatusRefused, StatusRequest
from lightning_diloco.protocol.observer_messages import MAX_TOLD, Fault
from lightning_diloco.protocol.wire import decode_from_learner, decode_from_observer, decode_to_observer, encode
from lightning_diloco.runtime.observers import MAX_WAITING, PERIOD_S, state_of
from lightning_diloco.runtime.transport import MAX_CONTROL_BYTES, SYNCER, ControlReceived, LearnerTransport
from tests.cli.test_status_table import ACTIVE, STATUS
from tests.fuzzing.values import broken, mutated, struct
from tests.runtime.job_helpers import CONFIG, Background, Job, make_module, running_job, train, until, whole_life
from tests.runtime.job_raw_peer import RawPeer

SEED = 20251128
NOBODY = Envelope("", "", 0, 0)
QUESTION = encode(NOBODY, StatusRequest(protocol_version=PROTOCOL_VERSION))


class Asker:
    """A socket that says whatever a test wants, and keeps the answers."""

    def __init__(self, job: Job) -> None:
        self.link = LearnerTransport(job.endpoint, nonce=secrets.token_bytes(16), accept=lambda *_: False, context=job.context)
        self.link.connect()
        self.heard: list[Any] = []

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.link.close()

    def say(self, data: bytes = QUESTION) -> None:
        until(lambda: self.link.send_control(SYNCER, data))

    def poll(self, timeout_s: float = 0.02) -> None:
        for event in self.link.poll(timeout_s):
            if isinstance(event, ControlReceived):
                try:
                    self.heard.append(decode_to_observer(event.data)[1])
                except RemoteProtocolError:
                    self.heard.append(event.data)

    def answer(self) -> Any:
        until(lambda: self.poll() or bool(self.heard), 10)
        return self.heard.pop(0)


def asked(job: Job) -> Status:
    with Asker(job) as asker:
        asker.say()
        status = asker.answer()
    assert isinstance(status, Status), status
    return status


def asked_until(job: Job, condition: Any) -> Status:
    found: list[Status] = []
    until(lambda: found.append(asked(job)) or condition(found[-1]))
    return found[-1]


def facts(job: Job) -> Any:
    """Everything that the rules know of a job at rest."""
    machine = job.machine.job
    return (
        [(m.learner_id, m.incarnation, m.session, m.stage, m.inner_step, m.tokens, m.is_paused) for m in machine.members.present()],
        [c.version for c in machine.currents],
        [(r.stage, r.round_id, list(r.held)) for r in job.machine.rounds.all],
        [(m, machine.ledger.tokens(m)) for m in machine.ledger.learners()],
        dict(machine.members._ended),
    )


# ---- what is told ---------------------------------------------------------------------------------------------------------------


def test_a_job_without_a_founder_waits(tmp_path):
    with running_job(tmp_path) as job:
        status = asked(job)
        assert (status.status, status.learners, status.wall_s, status.num_fragments) == ("waiting", (), None, 0)
        assert status.job_id == job.machine.job.options.job_id


def test_learners_are_told_of_with_what_they_do(tmp_path):
    with running_job(tmp_path) as job:
        one, two = job.client(0), job.client(1)
        for client in (one, two):
            client.join()
        assert {x.state for x in asked(job).learners} == {"joining"}
        trained = [Background(lambda c=c: train(c, 20)) for c in (one, two)]
        for life in trained:
            life.result()
        two.set_paused(True)
        status = asked_until(job, lambda s: s.learners[1].state == "paused" and s.learners[0].tokens == s.learners[1].tokens == 320)
        assert [(x.learner_id, x.incarnation, x.state, x.inner_step, x.device) for x in status.learners] == [
            (0, 0, "active", 20, "cpu"),
            (1, 0, "paused", 20, "cpu"),
        ]
        assert status.tokens == 640 == status.tokens_merged + status.tokens_pending + status.tokens_discarded
        assert status.merges > 0 and (status.num_members, status.num_active, status.num_learners) == (2, 1, 2)
        versions = [c.version.n for c in job.machine.job.currents]
        assert status.version_min <= status.version_max <= max(versions)
        for learner in status.learners:
            assert learner.participation > 0 and learner.steps_per_s > 0 and learner.tokens_per_s > 0
            assert learner.version_min <= learner.version_max and 0 <= learner.heard_age_s < 10
        assert sum(x.bytes_up for x in status.learners) == status.bytes_up
        assert sum(x.bytes_down for x in status.learners) == status.bytes_down
        two.set_paused(False)
        two.leave("limit")
        status = asked_until(job, lambda s: s.num_members == 1)
        assert [x.state for x in status.learners] == ["active", "gone"] and status.learners[1].inner_step == 20


def test_who_watches_is_told_of_the_end(tmp_path):
    with running_job(tmp_path) as job, Asker(job) as asker:
        asker.say()
        assert asker.answer().status == "waiting"
        whole_life(job.client(0), 30)
        summary = job.finish()
        last = asker.answer()
        assert last.status == "finished" and last.learners[0].state == "gone"
        for name in ("tokens", "tokens_merged", "tokens_pending", "tokens_discarded", "merges", "bytes_up", "bytes_down", "wall_s"):
            assert getattr(last, name) == summary[name], name


def test_a_learner_that_was_told_to_end_shows_why_and_a_stranger_is_named_apart(tmp_path):
    with running_job(tmp_path) as job:
        job.client(0).join()
        with (
            RawPeer(job.endpoint, make_module(), CONFIG, job.context) as peer,
            RawPeer(job.endpoint, make_module(), CONFIG, job.context) as other,
        ):
            peer.join(7)
            until(lambda: job.machine.job.members.by_id(7).stage == "joined", 5)
            peer.say(msg.Busy(fragment_id=2**40, round_id=1))
            peer.hear(msg.JoinRefused)
            other.hello(learner_id=8, protocol_version=1)
            other.hear(msg.JoinRefused, reason="protocol_version")
            status = asked_until(job, lambda s: s.refused_join is not None and s.num_learners == 2)
    gone = status.learners[1]
    assert (gone.learner_id, gone.state) == (7, "gone") and "fragment_id=1099511627776" in gone.fault.what
    assert status.refused_join.what.startswith("protocol_version: ")


def test_of_a_crowd_of_learners_the_present_ones_are_told_and_all_are_counted(tmp_path):
    with running_job(tmp_path) as job:
        job.client(0).join()
        job.finish()
        members = job.machine.job.members
        for i in range(1000, 1000 + MAX_TOLD + 44):
            members.add(i, f"{i:032x}", "joined").device = "x" * 200
        status = job.service._observers.status(job.service._live.read())
        data = encode(NOBODY, status)
    assert status.num_learners == MAX_TOLD + 45 and len(status.learners) == MAX_TOLD
    assert decode_to_observer(data)[1] == status and status.learners[0].learner_id == 1000, "who is gone is left out first"


def test_the_longest_answer_is_a_control_message():
    text = "\U0001f600" * 200
    learner = msgspec.structs.replace(ACTIVE, device=text, fault=Fault(what=text, age_s=1e8), tokens=2**62, bytes_up=2**62)
    longest = msgspec.structs.replace(STATUS, learners=MAX_TOLD * (learner,), refused_join=learner.fault)
    assert len(encode(NOBODY, longest)) < MAX_CONTROL_BYTES


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"stage": "receiving"}, "joining"),
        ({"inner_step": 0}, "joining"),
        ({}, "active"),
        ({"is_paused": True}, "paused"),
        ({"is_paused": True, "is_leaving": True}, "leaving"),
        ({"is_silent": True}, "silent"),
        ({"last_advance_s": 50.0}, "silent"),
    ],
)
def test_the_state_is_that_by_which_the_rules_judge(fields, state):
    member = Member(0, 0, "s", "joined")
    for name, value in ({"inner_step": 5, "last_advance_s": 99.0} | fields).items():
        setattr(member, name, value)
    assert state_of(member, 100.0) == state and member.is_active(100.0) == (state == "active")


# ---- who may ask ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (StatusRequest(protocol_version=PROTOCOL_VERSION - 1, token="watch"), "protocol_version"),
        (StatusRequest(protocol_version=PROTOCOL_VERSION, token=""), "token"),
        (StatusRequest(protocol_version=PROTOCOL_VERSION, token="watch "), "token"),
        (StatusRequest(protocol_version=PROTOCOL_VERSION, token="\u00e9"), "token"),
    ],
)
def test_who_has_no_token_or_another_release_is_told_so(tmp_path, request_, reason):
    with running_job(tmp_path, observer_token="watch") as job, Asker(job) as asker:
        asker.say(encode(NOBODY, request_))
        refused = asker.answer()
        assert isinstance(refused, StatusRefused) and refused.reason == reason and refused.detail.endswith(".")
        asker.say(encode(NOBODY, StatusRequest(protocol_version=PROTOCOL_VERSION, token="watch")))
        assert isinstance(asker.answer(), Status)


def test_the_two_directions_and_learners_do_not_take_each_others_words():
    for decode, data in [
        (decode_from_learner, QUESTION),
        (decode_from_observer, encode(NOBODY, STATUS)),
        (decode_to_observer, QUESTION),
        (decode_from_observer, encode(NOBODY, Ping(number=1))),
    ]:
        with pytest.raises(RemoteProtocolError):
            decode(data)


def test_hostile_questions_change_nothing(tmp_path):
    dice = random.Random(SEED)
    with running_job(tmp_path) as job:
        client = job.client(0)
        client.join()
        train(client, 20)
        until(lambda: all(r.stage == "idle" for r in job.machine.rounds.all) and job.machine.job.ledger.tokens(0) == 320)
        before = facts(job)
        with Asker(job) as asker:
            for _ in range(300):
                request = struct(dice, StatusRequest, {}, wildness=0.5)
                data = encode(Envelope("x" * dice.randrange(300), "", dice.randrange(3), 0), request)
                plain = msgspec.msgpack.encode((("", "", 0, 0), broken(dice, request)))
                asker.say(dice.choice((data, plain, mutated(dice, data, QUESTION))))
            for kind in get_args(msg.ToObserver):
                asker.say(encode(NOBODY, struct(dice, kind, {}, wildness=0.1)))
            asker.say(msgspec.msgpack.encode((("", "", 0, 0), {"type": "StatusRequest", "protocol_version": PROTOCOL_VERSION, "more": 1})))
            asker.say(msgspec.msgpack.encode((("", "", 0, 0), {"type": "StatusRequest", "protocol_version": PROTOCOL_VERSION, "token": 5})))
            asker.say(QUESTION)
            until(lambda: asker.poll() or any(isinstance(m, Status) for m in asker.heard), 10)
        assert facts(job) == before
        assert job.service.error is None and client.fenced is None
        client.leave("limit")
        assert job.finish()["tokens"] == 320


def test_a_member_that_asks_is_answered_and_stays_what_it_is(tmp_path):
    with running_job(tmp_path) as job:
        job.client(0).join()
        with RawPeer(job.endpoint, make_module(), CONFIG, job.context) as peer:
            peer.join(7)
            until(lambda: job.machine.job.members.by_id(7).stage == "joined", 5)
            before = facts(job)
            peer.say_bytes(QUESTION)
            found: list[Status] = []
            end_s = time.monotonic() + 10
            while not found and time.monotonic() < end_s:
                events = [e for e in peer.transport.poll(0.05) if isinstance(e, ControlReceived)]
                found += [decode_to_observer(e.data)[1] for e in events if b"StatusRe" not in e.data and b"Status" in e.data]
            assert found and found[0].num_learners == 2 and facts(job) == before


# ---- a crowd --------------------------------------------------------------------------------------------------------------------


def test_a_thousand_questions_of_one_peer_are_a_few_answers_and_the_job_goes_on_meanwhile(tmp_path):
    with running_job(tmp_path) as job:
        client, is_over = job.client(0), threading.Event()
        client.join()

        def life() -> None:
            while not is_over.is_set():
                train(client, 1)

        trainer = Background(life)
        try:
            with Asker(job) as asker:
                start_s, sent, merged = time.monotonic(), 0, _merges(job)
                while sent < 1000 or _merges(job) < merged + 20:
                    assert time.monotonic() < start_s + 60, "no merges while many ask"
                    asker.say(QUESTION)
                    asker.poll(0.0)
                    sent += 1
                asker.say(encode(NOBODY, Ping(number=5)))
                options = job.machine.job.options
                pong = encode(Envelope(options.job_id, options.lineage, options.epoch, 0), Pong(number=5))
                until(lambda: asker.poll() or pong in asker.heard, 20)
                passed_s = time.monotonic() - start_s
        finally:
            is_over.set()
        trainer.result()
        answers = [m for m in asker.heard if isinstance(m, Status)]
        assert 0 < len(answers) <= 2 + passed_s / PERIOD_S
        client.leave("limit")
        assert job.finish()["tokens_discarded"] == 0


def _merges(job: Job) -> int:
    return sum(current.version.n for current in job.machine.job.currents)


def test_of_a_crowd_of_observers_a_bounded_number_waits(tmp_path):
    with running_job(tmp_path) as job:
        observers = job.service._observers
        observers.tick = lambda now_s: None  # nobody is answered for the time being
        with Asker(job) as asker:
            peers = [f"{i:032x}" for i in range(200)]
            for peer in peers:
                assert observers.ask(peer, QUESTION) and observers.ask(peer, QUESTION)
            assert len(observers._waiting) == MAX_WAITING
            del observers.tick
            until(lambda: not observers._waiting, 10)
            asker.say()
            assert isinstance(asker.answer(), Status), "and the next one is answered again"


def test_an_answer_that_cannot_be_made_ends_no_job(tmp_path, caplog):
    with running_job(tmp_path) as job, Asker(job) as asker:
        job.service._observers.status = lambda *_: 1 / 0
        asker.say()
        until(lambda: "Observers were not answered: ZeroDivisionError" in caplog.text)
        del job.service._observers.status
        asker.say()
        assert isinstance(asker.answer(), Status)


def test_figures_that_cannot_be_read_end_no_job(tmp_path, caplog):
    with running_job(tmp_path) as job:
        whole_life(job.client(0), 10)
        job.service._live._tail.path.rename(tmp_path / "aside")
        (tmp_path / "tape.jsonl").write_bytes(b"nonsense\n")
        status = asked(job)
        assert status.tokens == 0 and status.version_max > 0 and job.service.error is None
        (tmp_path / "aside").rename(tmp_path / "tape.jsonl")
        assert job.finish()["tokens"] == 160
    assert "The figures for observers cannot be read" in caplog.text
