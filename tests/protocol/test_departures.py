"""The end of lives and of a job by hand, when nobody says who is dead: silence ends a life, and a job ends all the same."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.actions import CloseSession, Reply
from lightning_diloco.protocol.messages import Fenced, Left, Ping
from lightning_diloco.protocol.records import LeaveRecord, MergeRecord
from tests.protocol.invariants import check_end, check_tape
from tests.protocol.moves import bulk_up, control, up
from tests.protocol.pair import Node, Pair


def pass_time(pair: Pair, seconds: int, *alive: Node) -> None:
    """Seconds in which nobody trains; these processes say that they live."""
    for _ in range(seconds):
        pair.advance(1.0)
        for node in alive:
            ping(pair, node)


def ping(pair: Pair, node: Node) -> None:
    pair.take(ev.MessageReceived(session=node.nonce, envelope=pair._envelope_up(node), message=Ping(number=1)))
    node.control_down.clear()


def reasons(pair: Pair) -> dict[int, str]:
    return {r.learner_id: r.reason for r in pair.of(LeaveRecord)}


# ---- the end of a job by hand ---------------------------------------------------------------------------------------------------


def test_a_job_ends_and_merges_what_is_held_though_one_died_shortly_before_the_last_one_left():
    pair = Pair(num_fragments=2, min_quorum=2)
    a, b = pair.found(2)
    pair.steps([a, b], 10)
    pair.kill(b)
    for _ in range(5):
        pair.steps([a], 1)
    pair.leave(a)
    pair.settle()
    assert a.stage == "left" and pair.ended is None, "the other one may live"
    assert any(r.held for r in pair.syncer.rounds.all), "what the leaver handed over waits for a quorum"
    pass_time(pair, 61)
    check_end(pair)
    assert reasons(pair) == {0: "limit", 1: "died"}
    assert all(pair.shadow(i)[atom] == 1 for i in range(2) for atom, (m, _) in pair.tokens_of.items() if m == 0)


def test_a_learner_that_only_waits_is_heard_and_keeps_the_job_open():
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pair.steps([a, b], 5)
    pair.leave(a)
    pair.settle()
    pass_time(pair, 300, b)
    assert pair.ended is None
    pair.steps([b], 8)
    pair.leave(b)
    pair.settle()
    check_end(pair)
    assert reasons(pair) == {0: "limit", 1: "limit"}


def test_a_link_that_breaks_for_half_a_minute_does_not_end_a_job_whose_other_learner_has_left():
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pair.steps([a, b], 5)
    pair.leave(a)
    pair.settle()
    pass_time(pair, 30)
    assert pair.ended is None
    pair.reconnect(b)
    pair.settle()
    pair.steps([b], 8)
    assert b.is_joined and pair.merges()[-1].members[0].learner_id == 1


@pytest.mark.parametrize("stage", ["waiting", "receiving", "founding"])
def test_a_process_that_died_while_it_joined_does_not_hold_up_the_end(stage):
    pair = Pair(num_fragments=2)
    if stage == "founding":
        dead = pair.add(0, joins=False)
        pair.hello(dead)
        pair.deliver_control_up(dead)
        assert pair.syncer.job.members.by_id(0).stage == stage
        pair.kill(dead)
        pass_time(pair, 61)
        assert pair.syncer.job.members.by_id(0) is None
    if stage == "waiting":
        pair.kill(pair.add(1))
        assert pair.syncer.job.members.by_id(1).stage == stage
        pass_time(pair, 61)
        assert pair.syncer.job.members.by_id(1) is None
    (a,) = pair.found(1)
    if stage == "receiving":
        dead = pair.add(1, joins=False)
        pair.hello(dead)
        pair.deliver_control_up(dead)
        assert pair.syncer.job.members.by_id(1).stage == stage
        pair.kill(dead)
    pair.steps([a], 6)
    pair.leave(a)
    pair.settle()
    pass_time(pair, 61)
    check_end(pair)


def test_a_process_that_waits_for_a_slow_founder_is_not_given_up():
    pair = Pair(num_fragments=1)
    waiting = pair.add(1)
    pass_time(pair, 300, waiting)
    pair.found(1)
    assert waiting.is_joined


def test_a_supervised_job_gives_up_nobody_by_silence():
    pair = Pair(num_fragments=1, options={"is_supervised": True})
    a, b = pair.found(2)
    pair.steps([a, b], 5)
    joining = pair.add(2, joins=False)
    pair.hello(joining)
    pair.deliver_control_up(joining)
    pair.leave(a)
    pair.settle()
    pass_time(pair, 1000)
    assert [m.learner_id for m in pair.syncer.job.members.present()] == [1, 2] and pair.ended is None


@pytest.mark.parametrize("first", ["limit", "stopped"])
def test_a_job_is_over_when_one_reached_its_limit_and_the_last_one_leaves_by_signal(first):
    pair = Pair(num_fragments=2)
    a, b = pair.found(2)
    pair.steps([a, b], 10)
    pair.leave(a, first)
    pair.settle()
    pair.steps([b], 3)
    pair.leave(b, "signal")
    pair.settle()
    check_end(pair)
    assert reasons(pair) == {0: first, 1: "signal"}


def test_a_job_whose_learners_were_all_preempted_waits_for_them():
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pair.steps([a, b], 5)
    pair.leave(a, "signal")
    pair.settle()
    pair.kill(b)
    pass_time(pair, 1000)
    assert pair.ended is None


def test_a_leaver_whose_time_is_over_is_no_deadline_while_the_last_merge_runs():
    pair = Pair(num_fragments=1, drain_timeout_s=5.0)
    pair.manual_merge = True
    (a,) = pair.found(1)
    pair.steps([a], 1)
    pair.leave(a)
    pair.settle()
    assert pair.closing and pair.syncer.next_deadline_s() == pytest.approx(pair.now_s + 5.0)
    pair.advance(6.0)
    assert pair.ended is None and pair.syncer.next_deadline_s() is None, "a deadline in the past would be a busy loop"
    pair.merge()
    check_end(pair)


# ---- the id of a dead process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner_id", [1, None])
def test_the_id_of_a_process_that_fell_silent_goes_to_one_that_asks(learner_id):
    pair = Pair(num_fragments=1, options={"num_slots": 2})
    a, b = pair.found(2)
    pair.steps([a, b], 16)
    pair.kill(b)
    for _ in range(9):
        pair.step(a)
        pair.advance(1.0)
        pair.settle()
    early = pair.add(learner_id)
    assert early.stage == "refused", "nine heartbeats are no death"
    for _ in range(2):
        pair.step(a)
        pair.advance(1.0)
        pair.settle()
    late = pair.add(learner_id)
    assert late.is_joined and (late.learner_id, late.joined.incarnation) == (1, 1)
    assert reasons(pair) == {1: "died"}
    pair.steps([a, late], 16)
    assert {m.incarnation for r in pair.of(MergeRecord) for m in r.members if m.learner_id == 1} == {0, 1}
    check_tape(pair)


def test_the_one_that_was_replaced_is_told_so_when_it_wakes_up():
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pair.steps([a, b], 5)
    pass_time(pair, 11, a)
    successor = pair.add(1)
    assert successor.is_joined
    pair.step(b)
    control(pair, b)
    assert b.stage == "fenced"
    assert pair.syncer.job.members.by_id(1).session == successor.nonce


def test_with_a_supervisor_only_its_token_takes_the_id_of_a_silent_process():
    pair = Pair(num_fragments=1, options={"is_supervised": True, "takeover_token": "secret"})
    a, b = pair.found(2)
    pair.steps([a, b], 5)
    pair.kill(b)
    pass_time(pair, 100, a)
    assert pair.add(1).stage == "refused"
    assert pair.add(1, takeover_token="secret").is_joined


def test_the_word_about_a_lost_life_does_not_end_the_next_one():
    pair = Pair(num_fragments=1, options={"takeover_token": "secret"})
    a, b = pair.found(2)
    pair.steps([a, b], 3)
    successor = pair.add(1, takeover_token="secret")
    pair.take(ev.LearnerLost(learner_id=1, incarnation=0))
    assert pair.syncer.job.members.by_id(1).session == successor.nonce
    pair.take(ev.LearnerLost(learner_id=1, incarnation=1))
    assert pair.syncer.job.members.by_id(1) is None


def test_the_supervisors_word_about_a_lost_life_counts_lives_and_not_incarnations():
    pair = Pair(num_fragments=1, options={"takeover_token": "secret"})
    a, b = pair.found(2)
    pair.steps([a, b], 3)
    # Life 1 died before it said hello, so the syncer's second incarnation is the supervisor's third process.
    successor = pair.add(1, takeover_token="secret", life=2)
    for life in (0, 1):
        pair.take(ev.LearnerLost(learner_id=1, life=life))
        assert pair.syncer.job.members.by_id(1).session == successor.nonce
    pair.take(ev.LearnerLost(learner_id=1, life=2))
    assert pair.syncer.job.members.by_id(1) is None


# ---- sessions -------------------------------------------------------------------------------------------------------------------


def newest_up(node: Node) -> object:
    """The newest control message on its way to the syncer."""
    return up(node)[-1]


def last_words(pair: Pair, event: object, session: str) -> list[str]:
    """What follows for this session: the kinds of messages to it, and the closing."""
    actions = [a for a in pair.syncer.handle(event, pair.now_s) if getattr(a, "session", None) == session]
    return [type(a.message if isinstance(a, Reply) else a).__name__ for a in actions if isinstance(a, Reply | CloseSession)]


@pytest.mark.parametrize("reason", ["limit", "signal", "stopped", "died", "fenced"])
def test_every_end_closes_the_session_after_the_last_word_to_it(reason):
    pair = Pair(num_fragments=1, options={"takeover_token": "secret"})
    a, b = pair.found(2)
    pair.steps([a, b], 5)
    if reason == "died":
        assert last_words(pair, ev.LearnerLost(learner_id=1), b.nonce) == ["CloseSession"]
        return
    if reason == "fenced":
        c = pair.add(1, joins=False, takeover_token="secret")
        pair.hello(c)
        hello = ev.MessageReceived(session=c.nonce, envelope=pair._envelope_up(c), message=newest_up(c))
        assert last_words(pair, hello, b.nonce) == [Fenced.__name__, "CloseSession"]
        return
    pair.leave(b, reason)
    bulk_up(pair, b)
    while b.control_down:
        pair.deliver_control_down(b)
    leave = ev.MessageReceived(session=b.nonce, envelope=pair._envelope_up(b), message=newest_up(b))
    assert last_words(pair, leave, b.nonce) == [Left.__name__, "CloseSession"]


# ---- late answers ---------------------------------------------------------------------------------------------------------------


def test_a_late_answer_to_the_previous_round_ends_the_pull_of_this_one():
    pair = Pair(num_fragments=1, min_quorum=2)
    a, b, late = pair.found(3)
    pair.manual_encode = True
    round_ = pair.syncer.rounds.of(0)
    for _ in range(20):
        for node in (a, b, late):
            pair.step(node)
        pair.advance(1.0)
        for node in (a, b, late):
            control(pair, node)
        pending = late.machine.state.fragments[0].unresolved
        if pending is not None and round_.is_collecting and pending.header.round_id == round_.round_id - 1:
            break
        for node in (a, b):
            pair.encode(node)
            while any((node.control_up, node.control_down, node.bulk_up, node.bulk_down)):
                control(pair, node)
                bulk_up(pair, node)
                while node.bulk_down:
                    pair.deliver_bulk_down(node)
    assert sorted(round_.open_pulls) == [0, 1, 2], "asked again before the answer to the first question was here"
    pair.encode(late)
    bulk_up(pair, late)
    assert sorted(round_.open_pulls) == [0, 1] and [h.learner_id for h in round_.held] == [2]
