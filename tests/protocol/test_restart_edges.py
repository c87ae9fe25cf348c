"""A syncer that starts again, at its edges: silence, lies, ends, and words that were lost with the one before it."""

from __future__ import annotations

import pytest

from lightning_diloco.metrics import SummaryFold
from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.identity import MergedThrough, Version
from lightning_diloco.protocol.messages import HeldFragment, NotHeld, Ping, Pong, Recall
from lightning_diloco.protocol.records import JoinRecord, ProgressRecord, RestartRecord, TapeLine
from tests.protocol.invariants import check_end, check_tape
from tests.protocol.moves import bulk_up, contribute, control, down
from tests.protocol.restarting import RestartingPair
from tests.protocol.toy import Node


@pytest.fixture
def pair() -> RestartingPair:
    return RestartingPair(num_fragments=2)


def say_hello(pair: RestartingPair, *nodes: Node) -> None:
    """These members report, are asked who they are, and say so; nothing goes over bulk."""
    for node in nodes:
        pair.heartbeat(node)
        control(pair, node)


def test_the_time_before_the_crash_is_no_step_time(pair):
    nodes = pair.found(2)
    pair.take_snapshot()
    pair.steps(nodes, 6)
    for node in nodes:
        pair.heartbeat(node)
    pair.settle()
    pair.restart()
    pair.steps(nodes, 8)
    assert all(m.step_time.value < 3.0 for m in pair.syncer.job.members.joined())
    before = len(pair.merges())
    for _ in range(60):
        pair.step(nodes[0])
        pair.advance(1.0)
        pair.settle()
    assert len(pair.merges()) > before + 10, "a learner that hangs holds nothing up"


def told(pair: RestartingPair) -> list[tuple[int, tuple[float, ...]]]:
    return [(record.first_gap, record.step_gaps_s) for record in pair.of(ProgressRecord) if record.step_gaps_s]


def test_step_times_that_are_told_twice_are_on_the_tape_once_and_none_is_lost_with_a_syncer(pair):
    (a,) = pair.found(1)
    pair.take_snapshot()
    pair.step(a)

    def report(first: int, gaps: tuple[float, ...]) -> None:
        pair._send(a, a.machine.report(first_gap=first, step_gaps_s=gaps, paused_s=gaps, stalls_s=gaps))

    report(0, (1.0, 2.0))
    report(0, (1.0, 2.0, 3.0))
    control(pair, a)
    assert told(pair) == [(0, (1.0, 2.0)), (2, (3.0,))]
    pair._send(a, Ping(number=7))
    pair.deliver_control_up(a)
    assert next(m for m in down(a) if isinstance(m, Pong)) == Pong(number=7, num_gaps=3)
    report(1, (2.0, 3.0, 4.0))
    a.control_up.clear()  # lost with the syncer
    pair.restart()
    report(1, (2.0, 3.0, 4.0, 5.0))
    report(9, (9.0,))
    pair.settle()
    assert told(pair)[2:] == [(3, (4.0, 5.0)), (9, (9.0,))]
    last = [r for r in pair.of(ProgressRecord) if r.step_gaps_s][-1]
    assert last.paused_s == last.stalls_s == (9.0,)


def test_a_hole_in_the_tape_lets_no_seq_be_used_again_and_the_accounts_are_those_of_the_versions(pair):
    """A full disk took no line for a while; the version that a learner holds says what is in it."""
    a, b = pair.found(2)
    pair.take_snapshot()
    pair.steps([a, b], 6)
    pair.settle()
    before = len(pair.tape)
    pair.steps([a, b], 10)
    pair.settle()
    used = max(seq for c in pair.syncer.job.currents if (seq := c.merged_through[b.learner_id].seq))
    del pair.tape[before:]
    pair.restart()
    (restart,) = pair.of(RestartRecord)
    assert max(m[b.learner_id].seq for m in restart.merged_through) == used
    pair.kill(b)
    pair.take(ev.LearnerLost(learner_id=b.learner_id))
    again = pair.add(b.learner_id)
    pair.settle_all()
    assert max(f.next_seq for f in again.machine.state.fragments) == used + 1
    ledger = pair.syncer.job.ledger
    for fragment_id, merged in enumerate(restart.merged_through):
        for learner_id, item in merged.items():
            assert ledger.merged(learner_id, fragment_id) == item.tokens and ledger.pending(learner_id, fragment_id) >= 0


@pytest.mark.parametrize("restarts", [1, 2, 3])
def test_a_merge_that_one_restart_undid_stays_undone_when_the_next_snapshot_is_past_its_number(pair, restarts):
    """The syncer and the merge's only member end together; nobody merges for that member again."""
    a, b = pair.found(2)
    pair.take_snapshot()
    contribute(pair, a)
    pair.heartbeat(a)
    control(pair, a)
    bulk_up(pair, a)
    assert [m.learner_id for merge in pair.merges() for m in merge.members] == [a.learner_id]
    pair.kill(a)
    pair.crash()
    pair.take(ev.LearnerLost(learner_id=a.learner_id))
    for _ in range(restarts - 1):
        pair.settle_all()
        pair.advance(6.0)
        pair.steps([b], 20)
        pair.take_snapshot()
        assert min(c.version.n for c, _, _ in pair.snapshot) > 1
        pair.crash()
    pair.settle_all()
    pair.advance(6.0)
    pair.leave(b)
    pair.settle()
    pair.take(ev.Finish(status="finished"))
    pair.settle()
    check_end(pair)
    fold = SummaryFold()
    for seq, record in enumerate(pair.tape):
        fold.feed(TapeLine(seq, float(seq), record))
    summary, true_tokens = fold.result(is_strict=True), sum(tokens for _, tokens in pair.tokens_of.values())
    assert summary["tokens"] == true_tokens == sum(pair.syncer.job.ledger.tokens(m) for m in (0, 1))
    assert not [r for r in pair.of(JoinRecord) if r.role == "earlier"], "a life that nobody lived"


def test_a_holder_that_falls_silent_is_not_waited_for(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    pair.steps([a, b], 10)
    pair.crash()
    say_hello(pair, a, b)
    control(pair, a)
    assert a.bulk_up and b.bulk_up, "one fragment is asked for of each"
    a.bulk_up.clear()
    pair.kill(a)
    for _ in range(30):
        pair.advance(1.0)
        say_hello(pair, b)
        while b.bulk_up:
            pair.deliver_bulk_up(b)
    assert not pair.syncer.job.is_recovering and pair.of(RestartRecord)
    assert all(v.epoch == 1 for v in (c.version for c in pair.syncer.job.currents))


def test_a_learner_that_cannot_give_what_it_showed_says_so(pair):
    (a,) = pair.found(1)
    pair.take_snapshot()
    pair.steps([a], 10)
    pair.crash()
    pair.heartbeat(a)
    while not any(isinstance(m, Recall) for m in down(a)):
        (pair.deliver_control_up if a.control_up else pair.deliver_control_down)(a)
    a.control_down.clear()
    for fragment_id in (0, 1):
        pair._send(a, NotHeld(fragment_id=fragment_id))
    pair.settle()
    assert [v.n for v in pair.of(RestartRecord)[0].versions] == [0, 0], "the snapshot is all there is"


@pytest.mark.parametrize("through", [{5_000: MergedThrough(1, 1)}, {0: MergedThrough(1, 2**60)}])
def test_a_version_that_says_what_cannot_be_is_not_taken(pair, through):
    (a,) = pair.found(1)
    pair.take_snapshot()
    pair.steps([a], 10)
    pair.crash()
    say_hello(pair, a)
    recovery = pair.syncer.recovery
    held = a.machine.state.fragments[0].held
    assert recovery.expects(a.nonce, 0, held)
    header = HeldFragment(fragment_id=0, version=held, crc=1, merged_through=through)
    pair.take(ev.HeldArrived(session=a.nonce, header=header, crc_ok=True))
    assert not recovery.expects(a.nonce, 0, held) and pair.syncer.job.currents[0].version.n == 0


def test_a_copy_of_a_version_and_one_that_was_not_asked_for_change_nothing(pair):
    (a,) = pair.found(1)
    pair.take_snapshot()
    pair.steps([a], 10)
    pair.crash()
    say_hello(pair, a)
    header = HeldFragment(fragment_id=0, version=Version(0, 99), crc=1, merged_through={})
    pair.take(ev.HeldArrived(session=a.nonce, header=header, crc_ok=True))
    held = a.machine.state.fragments[0].held
    assert pair.syncer.recovery.expects(a.nonce, 0, held), "it is still waited for"
    pair.settle()
    before = pair.syncer.job.currents[0].version
    pair.take(ev.HeldArrived(session=a.nonce, header=header, crc_ok=True))
    assert pair.syncer.job.currents[0].version == before == Version(1, held.n)


@pytest.mark.parametrize("when", ["during", "after"])
def test_a_join_that_did_not_reach_the_disk_is_written_when_its_learner_comes(pair, when):
    a, b = pair.found(2)
    pair.take_snapshot()
    pair.tape = [r for r in pair.tape if getattr(r, "session", None) != b.nonce]
    pair.steps([a, b], 6)
    pair.tape = [r for r in pair.tape if getattr(r, "learner_id", 0) == 0]
    pair.crash()
    say_hello(pair, *((b, a) if when == "during" else (a,)))
    pair.settle_all()
    pair.settle_all()
    assert [r.incarnation for r in pair.of(JoinRecord) if r.learner_id == 1] == [0] and b.is_joined
    pair.steps([a, b], 12)
    pair.restart()
    pair.steps([a, b], 12)
    assert b.is_joined and 1 in pair.syncer.job.ledger.learners()
    check_tape(pair)


def test_a_life_that_had_ended_stays_out_with_its_old_work(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    pair.steps([a, b], 6)
    pair.take(ev.LearnerLost(learner_id=1))
    pair.restart()
    pair.hello(b)
    pair.settle()
    assert b.stage == "fenced" and pair.syncer.job.members.by_id(1) is None


def test_a_finish_while_nobody_has_the_model_ends_the_job_as_failed(pair):
    (a,) = pair.found(1)
    pair.kill(a)
    pair.snapshot = []
    pair.crash()
    pair.take(ev.LearnerLost(learner_id=0))
    pair.advance(30.0)
    assert pair.ended is None, "somebody may still come"
    pair.take(ev.Finish(status="stopped"))
    assert pair.ended is not None and pair.ended.status == "failed"


def test_a_finish_during_the_recovery_waits_for_what_learners_hold(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    pair.steps([a, b], 10)
    pair.crash()
    say_hello(pair, a)
    pair.take(ev.Finish(status="stopped"))
    assert pair.ended is None
    pair.settle_all()
    assert pair.ended is not None and min(pair.ended.versions) > 0


def test_the_last_leave_is_complete_when_its_result_is_on_the_disk(pair):
    (a,) = pair.found(1)
    pair.take_snapshot()
    pair.steps([a], 10)
    pair.slow_disk = True
    pair.leave(a)
    pair.settle()
    assert not a.has_left and pair.is_writing, "nobody else would have the model"
    pair.make_durable()
    pair.settle()
    assert a.has_left
    versions = [c.version.n for c in pair.syncer.job.currents]
    pair.slow_disk, pair.ended = False, None  # it was killed before it could write that the job is over
    pair.crash()
    pair.advance(6.0)
    assert pair.ended is not None and [v.n for v in pair.of(RestartRecord)[0].versions] == versions


def test_a_job_that_was_ending_ends_after_the_restart():
    pair = RestartingPair(num_fragments=1)
    a, b = pair.found(2)
    pair.steps([a, b], 6)
    pair.leave(a)
    pair.settle()
    assert a.has_left
    pair.take_snapshot()
    pair.restart()
    pair.leave(b, "signal")
    pair.settle()
    assert b.has_left and pair.ended is not None


def test_a_stop_that_the_others_were_not_told_of_is_told_by_the_next_syncer(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    pair.steps([a, b], 3)
    pair.feed(a, ev.StopRequested(reason="early_stopping"))
    while a.control_up:
        pair.deliver_control_up(a)
    while a.control_down:
        pair.deliver_control_down(a)
    assert a.stop_reason and not b.stop_reason
    pair.restart()
    pair.settle_all()
    assert b.stop_reason == "early_stopping"


def test_a_founder_whose_state_was_on_its_way_sends_it_to_the_next_syncer():
    pair = RestartingPair(num_fragments=2)
    a = pair.add(0, joins=False)
    pair.hello(a)
    while not a.bulk_up:
        (pair.deliver_control_up if a.control_up else pair.deliver_control_down)(a)
    pair.crash_before_the_founding()
    pair.settle()
    pair.hello(a)
    pair.settle()
    assert a.is_joined and pair.syncer.job.is_founded and pair.syncer.job.epoch == 1
    pair.steps([a], 6)
    contribute(pair, a)
