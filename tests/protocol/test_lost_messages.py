"""What was said once and lost is said again, and a job ends whatever its learners do (PROTOCOL.md sections 4, 6, 13)."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.messages import Leave, Resolved, StopRequest
from lightning_diloco.protocol.records import CountersRecord, LeaveRecord, RoundCancelRecord
from tests.protocol.invariants import check_end, check_tape
from tests.protocol.moves import bulk_up, contribute, control, payloads, pull, up
from tests.protocol.pair import Pair


def test_the_end_of_a_pause_that_was_lost_is_in_the_next_report():
    pair = Pair(num_fragments=1)
    (a,) = pair.found(1)
    pair.steps([a], 2)
    pair.feed(a, ev.PauseChanged(is_paused=True))
    pair.settle()
    pair.feed(a, ev.PauseChanged(is_paused=False))
    a.control_up.clear()
    pair.heartbeat(a)
    pair.settle()
    assert not pair.syncer.job.members.by_id(0).is_paused


def test_a_stop_that_was_lost_is_told_again_after_the_next_report_and_performed_once():
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pair.steps([a, b], 2)
    pair.feed(a, ev.StopRequested(reason="early_stopping"))
    pair.deliver_control_up(a)
    b.control_down.clear()
    for _ in range(3):
        pair.heartbeat(b)
        pair.settle()
    assert a.stop_reason == b.stop_reason == "early_stopping"
    late = pair.add(2)
    assert late.stop_reason == "early_stopping"


def test_the_wish_of_another_learner_does_not_stop_the_job():
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pair.feed(b, ev.StopRequested(reason="timer"))
    pair.settle()
    assert a.stop_reason is b.stop_reason is None


def test_a_stop_request_and_a_pause_that_were_lost_with_the_connection_are_said_again():
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pair.steps([a, b], 2)
    pair.feed(a, ev.PauseChanged(is_paused=True))
    pair.feed(a, ev.StopRequested(reason="early_stopping"))
    pair.reconnect(a)
    pair.settle()
    assert b.stop_reason == "early_stopping" and pair.syncer.job.members.by_id(0).is_paused
    pair.reconnect(a)
    pair.deliver_control_up(a)
    pair.deliver_control_down(a)
    assert not [m for m in up(a) if isinstance(m, StopRequest)], "it has been heard"


def test_the_token_budget_stops_the_job():
    pair = Pair(num_fragments=1, token_budget=100)
    a, b = pair.found(2)
    pair.steps([a, b], 4)
    assert a.stop_reason is None
    pair.steps([a, b], 1)
    assert a.stop_reason == b.stop_reason == "token_budget"
    before = len(pair.merges())
    pair.steps([a, b], 8)
    assert len(pair.merges()) <= before + 1, "no round opens after the stop"


@pytest.mark.parametrize("lost", ["leave", "left"])
def test_a_good_bye_that_was_lost_with_the_connection_is_said_again(lost):
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pair.steps([a, b], 2)
    pair.leave(b)
    if lost == "leave":
        bulk_up(pair, b)
        while b.control_down:
            pair.deliver_control_down(b)
        assert [m for m in up(b) if isinstance(m, Leave)]
    else:
        bulk_up(pair, b)
        while b.control_down:
            pair.deliver_control_down(b)
        while b.control_up:
            pair.deliver_control_up(b)
        assert pair.syncer.job.members.by_id(1) is None
    pair.reconnect(b)
    pair.settle()
    assert b.stage == "left"
    assert [r.reason for r in pair.of(LeaveRecord)] == ["limit"]


def test_a_learner_that_leaves_while_it_joins_does_not_keep_the_job_from_ending():
    pair = Pair(num_fragments=1)
    (a,) = pair.found(1)
    b = pair.add(1, joins=False)
    pair.hello(b)
    pair.deliver_control_up(b)
    pair.leave(b)
    assert b.has_left
    pair.settle()
    pair.leave(a)
    pair.settle()
    assert pair.ended is not None


def test_a_process_that_never_said_hello_leaves_without_a_word():
    pair = Pair(num_fragments=1)
    node = pair.add(0, joins=False)
    pair.leave(node)
    assert node.has_left and not node.control_up


def test_a_second_wish_to_leave_changes_nothing():
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pair.steps([a, b], 3)
    pair.leave(b)
    sent = len(payloads(b))
    pair.leave(b)
    assert b.stage == "leaving" and len(payloads(b)) == sent == 1


def test_an_unsupervised_job_does_not_wait_for_learners_that_fell_silent():
    pair = Pair(num_fragments=2)
    a, b = pair.found(2)
    pair.steps([a, b], 6)
    pair.kill(b)
    pair.steps([a], 12)
    pair.leave(a)
    pair.settle()
    assert a.stage == "left" and pair.ended is not None
    check_end(pair)


def test_an_unsupervised_job_waits_for_a_learner_that_was_preempted():
    pair = Pair(num_fragments=1)
    (a,) = pair.found(1)
    pair.steps([a], 3)
    pair.leave(a, "signal")
    pair.settle()
    assert a.stage == "left" and pair.ended is None
    again = pair.add(0)
    pair.steps([again], 3)
    pair.leave(again, "limit")
    pair.settle()
    check_end(pair)


def test_a_supervised_job_ends_by_its_supervisors_word_only():
    pair = Pair(num_fragments=2, options={"is_supervised": True})
    a, b = pair.found(2)
    pair.steps([a, b], 6)
    pair.leave(a)
    pair.leave(b)
    pair.settle()
    assert a.stage == b.stage == "left" and pair.ended is None
    pair.take(ev.Finish(status="finished"))
    check_end(pair)


def test_the_last_leaver_that_dies_does_not_keep_the_job_from_ending():
    pair = Pair(num_fragments=2, options={"is_supervised": True})
    pair.manual_merge = True
    (a,) = pair.found(1)
    pair.steps([a], 2)
    pair.leave(a)
    pair.settle()
    assert pair.closing
    pair.kill(a)
    pair.take(ev.LearnerLost(learner_id=0))
    pair.take(ev.Finish(status="stopped"))
    pair.merge()
    check_end(pair)
    assert not pair.syncer._departures._leaving and not pair.syncer._departures._until_s


def test_the_last_leaver_is_let_go_when_the_result_cannot_reach_it():
    pair = Pair(num_fragments=1, drain_timeout_s=5.0)
    (a,) = pair.found(1)
    pair.steps([a], 2)
    pair.step(a)
    pair.leave(a)
    bulk_up(pair, a)
    control(pair, a)
    assert pair.ended is None and pair.version(0) >= 1 and a.bulk_down
    assert pair.syncer.next_deadline_s() == pytest.approx(pair.now_s + 5.0)
    pair.advance(5.0)
    assert pair.ended is not None
    check_end(pair)


def test_the_dead_ones_last_counters_are_in_the_ledger_before_it_closes():
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pair.steps([a, b], 2)
    pair.take(ev.CountersRead(learner_id=1, incarnation=0, inner_steps=5, tokens=77))
    pair.take(ev.CountersRead(learner_id=1, incarnation=1, inner_steps=9, tokens=99))
    pair.take(ev.CountersRead(learner_id=5, incarnation=0, inner_steps=9, tokens=99))
    pair.take(ev.LearnerLost(learner_id=1))
    pair.take(ev.LearnerLost(learner_id=5))
    assert [r.tokens for r in pair.of(CountersRecord)] == [77]
    ledger = pair.syncer.job.ledger
    assert ledger.tokens(1) == 77 == ledger.merged(1, 0) + ledger.discarded(1, 0)


def test_a_lost_pull_ends_at_the_deadline_and_the_learner_is_asked_again():
    pair = Pair(num_fragments=1)
    (a,) = pair.found(1)
    pair.step(a)
    pair.deliver_control_up(a)
    a.control_down.clear()
    for _ in range(12):
        pair.advance(1.0)
    assert pair.of(RoundCancelRecord) and pair.syncer.job.members.by_id(0).is_silent
    pair.heartbeat(a)
    pair.steps([a], 8)
    assert not pair.syncer.job.members.by_id(0).is_silent and pair.merges()


def test_a_learner_whose_bulk_is_stuck_is_not_waited_for_until_it_answers():
    pair = Pair(num_fragments=1, min_quorum=2)
    a, b = pair.found(2)
    pair.steps([a, b], 3)
    while not payloads(b):
        for node in (a, b):
            pair.step(node)
            control(pair, node)
    stuck = list(b.bulk_up)
    b.bulk_up.clear()
    pair.settle()
    for _ in range(11):
        pair.step(a)
        pair.step(b)
        pair.heartbeat(b)
        pair.advance(1.0)
        for node in (a, b):
            control(pair, node)
        bulk_up(pair, a)
    assert pair.syncer.job.members.by_id(1).is_silent
    assert pair.merges()[-1].quorum == 1
    b.bulk_up.extend(stuck)
    pair.steps([a, b], 8)
    assert not pair.syncer.job.members.by_id(1).is_silent
    assert {m.learner_id for m in pair.merges()[-1].members} | {m.learner_id for m in pair.merges()[-2].members} == {0, 1}
    check_tape(pair)


def test_an_answer_for_a_seq_that_is_not_open_changes_nothing():
    pair = Pair(num_fragments=1)
    (a,) = pair.found(1)
    contribute(pair, a)
    fragment = a.machine.state.fragments[0]
    before = fragment.unresolved
    for seq, outcome in ((99, "refused"), (99, "held"), (before.header.seq, "held")):
        pair.feed(
            a, ev.ControlReceived(envelope=a.machine.state.envelope, message=Resolved(fragment_id=0, seq=seq, outcome=outcome, reason=None))
        )
        assert fragment.unresolved is before
    bulk = len(payloads(a))
    pair.feed(
        a, ev.ControlReceived(envelope=a.machine.state.envelope, message=Resolved(fragment_id=0, seq=before.header.seq, outcome="unknown"))
    )
    assert len(payloads(a)) == bulk + 1, "unknown means: send it again"


def test_a_final_contribution_after_a_refused_one_is_refused_too():
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pull(pair, a, b)
    pair.step(b, nan=True)
    assert payloads(b)
    pair.step(b)
    pair.leave(b)
    assert [h.after for h in payloads(b)][-1] == payloads(b)[0].seq
    pair.settle()
    assert b.stage == "left"
    assert set(pair.discarded(1, 0)) == {"nonfinite", "drain"}
    assert pair.syncer.job.ledger.pending(1, 0) == 0


def test_after_an_overwrite_a_final_contribution_is_relative_to_the_base_alone():
    pair = Pair(num_fragments=1, adopt="overwrite")
    a, b = pair.found(2)
    pull(pair, a, b)
    for node in (a, b):
        pair.step(node)
    bulk_up(pair, a)
    while b.bulk_down:
        pair.deliver_bulk_down(b)
    pair.step(b)
    unresolved = b.machine.state.fragments[0].unresolved
    assert unresolved is not None and not unresolved.in_counters, "overwritten while its contribution was on its way"
    pair.step(b)
    mine = max(pair.tokens_of)
    pair.leave(b)
    pair.settle()
    pair.steps([a], 8)
    assert pair.shadow(0)[mine] == 1
    check_tape(pair)


def test_steps_that_are_longer_than_the_shortest_deadline_are_waited_for():
    pair = Pair(num_fragments=1, min_quorum=2)
    a, b = pair.found(2)
    for _ in range(24):
        for node in (a, b):
            pair.step(node)
            pair.heartbeat(node)
        pair.settle()
        for _ in range(6):
            pair.advance(5.0)
            pair.settle()
    last = pair.merges()[-3:]
    assert len(pair.merges()) >= 4 and all({m.learner_id for m in r.members} == {0, 1} for r in last)
