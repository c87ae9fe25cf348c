"""What grows with the number of peers and of their messages has a bound, and what is over it costs nobody else anything."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.identity import MergedThrough, Version
from lightning_diloco.protocol.members import MAX_IDS, MAX_JOINING
from lightning_diloco.protocol.messages import Discarded, Envelope, Heartbeat, Leave, Ping, Publication
from lightning_diloco.protocol.records import DiscardRecord, JoinRecord
from lightning_diloco.protocol.wire import encode
from lightning_diloco.runtime.transport import MAX_HEADER_BYTES
from tests.protocol.moves import up
from tests.protocol.pair import Node, Pair

REASONS = ("overwritten", "died", "fenced", "nonfinite", "norm", "rollback", "drain")


def say(pair: Pair, node: Node, message: object) -> None:
    pair.take(ev.MessageReceived(session=node.nonce, envelope=pair._envelope_up(node), message=message))


def arrive(pair: Pair, learner_id: int | None = None) -> Node:
    """A process says hello and is not answered yet."""
    node = pair.add(learner_id, joins=False)
    pair.hello(node)
    pair.deliver_control_up(node)
    return node


# ---- reports of discarded tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_leave", [False, True])
@pytest.mark.parametrize(
    "discarded",
    [
        *(((0, reason, 1),) for reason in ("died", "fenced", "rollback", "drain")),
        ((2, "norm", 1),),
        ((0, "norm", 1), (0, "norm", 2)),
        tuple((0, "norm", n) for n in range(15)),
    ],
)
def test_a_report_of_discards_that_no_learner_makes_costs_its_sender_the_session(discarded, is_leave):
    pair = Pair(num_fragments=2)
    good, bad = pair.found(2)
    pair.steps([good, bad], 3)
    report = Heartbeat(inner_step=3, tokens=30, discarded=tuple(Discarded(*item) for item in discarded))
    say(pair, bad, Leave(reason="limit", report=report) if is_leave else report)
    pair.settle()
    assert bad.stage == "refused" and bad.detail.startswith("discarded: ")
    assert {r.reason for r in pair.of(DiscardRecord)} <= {"died"}, "of the session's end, by the syncer's own account"
    assert pair.syncer.job.members.by_id(1) is None and pair.syncer.job.members.by_id(0) is not None


def test_a_full_report_of_discards_is_taken():
    pair = Pair(num_fragments=2)
    (a,) = pair.found(1)
    pair.step(a)
    pair.settle()
    items = tuple(Discarded(i, reason, 1) for i in range(2) for reason in ("overwritten", "nonfinite", "norm"))
    say(pair, a, Heartbeat(inner_step=2, tokens=100, discarded=items))
    assert sorted((r.fragment_id, r.reason, r.tokens) for r in pair.of(DiscardRecord)) == sorted(
        (d.fragment_id, d.reason, 1) for d in items
    )


# ---- ids ------------------------------------------------------------------------------------------------------------------------


def test_a_version_that_names_every_possible_learner_fits_into_a_header():
    most = {2**62 - i: MergedThrough(2**62, 2**62) for i in range(MAX_IDS)}
    version = Version(2**62, 2**62)
    header = Publication(fragment_id=2**62, version=version, parent=version, crc=2**62, merged_through=most)
    assert len(encode(Envelope("j" * 200, "l" * 200, 2**62, 2**62), header)) <= MAX_HEADER_BYTES


@pytest.mark.parametrize("learner_id", [MAX_IDS, 2**62])
def test_an_id_beyond_the_last_one_of_a_job_is_refused_with_the_rule(learner_id):
    pair = Pair(num_fragments=1)
    pair.found(1)
    assert pair.add(MAX_IDS - 1).is_joined
    late = pair.add(learner_id)
    assert late.stage == "refused" and f"learner_id={learner_id}: a job has at most {MAX_IDS} learner ids" in late.detail


def test_processes_that_come_and_go_use_the_ids_of_those_that_ended_when_all_were_used(monkeypatch):
    monkeypatch.setattr("lightning_diloco.protocol.job.MAX_IDS", 4)
    pair = Pair(num_fragments=1)
    (a,) = pair.found(1)
    ids = []
    for _ in range(9):
        node = pair.add()
        ids.append(node.learner_id)
        pair.steps([a, node], 8)
        pair.leave(node)
        pair.settle()
        pair.steps([a], 8)
    assert ids == [1, 2, 3, 1, 1, 1, 1, 1, 1]
    assert max(r.incarnation for r in pair.of(JoinRecord)) == 6
    work = [atom for atom, (m, _) in pair.tokens_of.items() if m == 1]
    assert work and all(pair.shadow(0)[atom] == 1 for atom in work), "each life goes on with the seqs of the one before"
    assert sorted(pair.syncer.job.currents[0].merged_through) == [0, 1, 2, 3]


def test_when_all_ids_are_held_a_newcomer_is_refused(monkeypatch):
    monkeypatch.setattr("lightning_diloco.protocol.job.MAX_IDS", 2)
    pair = Pair(num_fragments=1)
    pair.found(2)
    late = pair.add()
    assert late.stage == "refused" and "at most 2 learner ids" in late.detail


# ---- processes that are not members yet -----------------------------------------------------------------------------------------


def test_the_one_that_was_silent_longest_makes_room_for_a_newcomer():
    pair = Pair(num_fragments=1)
    pair.found(1)
    crowd = [arrive(pair) for _ in range(MAX_JOINING)]
    pair.advance(11.0)
    for node in crowd[1:]:
        say(pair, node, Ping(number=1))
    late = arrive(pair)
    members = pair.syncer.job.members
    assert members.of(late.nonce).stage == "receiving" and members.of(crowd[0].nonce) is None
    assert all(members.of(node.nonce) is not None for node in crowd[1:])


def test_a_newcomer_waits_when_too_many_living_processes_join_at_once_and_gets_in_later():
    pair = Pair(num_fragments=1)
    pair.found(1)
    crowd = [arrive(pair) for _ in range(MAX_JOINING)]
    late = arrive(pair)
    members = pair.syncer.job.members
    assert members.of(late.nonce) is None and not late.control_down, "no answer, so it says hello again"
    pair.settle()
    assert all(node.is_joined for node in crowd) and late.stage == "greeting"
    pair.hello(late)
    pair.settle()
    assert late.is_joined


# ---- a question that is lost ----------------------------------------------------------------------------------------------------


def test_a_joiner_asks_again_for_what_overtook_its_welcome_when_the_question_was_lost():
    pair = Pair(num_fragments=2)
    (a,) = pair.found(1)
    pair.steps([a], 10)
    joiner = arrive(pair)
    while joiner.bulk_down:
        pair.deliver_bulk_down(joiner)
    while joiner.bulk_up:
        pair.deliver_bulk_up(joiner)
    while joiner.control_down:
        pair.deliver_control_down(joiner)
    assert [type(m).__name__ for m in up(joiner)] == ["NeedFull", "NeedFull"]
    joiner.control_up.clear()
    pair.hello(joiner)
    pair.settle()
    assert joiner.is_joined
    pair.hello(joiner)
    pair.settle()
    pair.hello(joiner)
    assert "NeedFull" not in [type(m).__name__ for m in up(joiner)], "nothing is missed any more"
