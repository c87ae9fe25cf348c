"""A syncer that crashes and goes on (PROTOCOL.md sections 8 and 12: 5, 6, 7, 14, 23), on the two machines."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import Envelope, Stop
from lightning_diloco.protocol.records import DiscardRecord, RestartRecord
from tests.protocol.invariants import check_end, check_tape
from tests.protocol.moves import atoms, bulk_down, bulk_up, contribute, control, payloads
from tests.protocol.restarting import RestartingPair


@pytest.fixture
def pair() -> RestartingPair:
    return RestartingPair(num_fragments=2)


def finish(pair: RestartingPair) -> None:
    for node in pair.nodes:
        if not node.is_dead and not node.has_left:
            pair.leave(node)
    pair.settle()
    pair.take(ev.Finish(status="finished"))
    pair.settle()
    check_end(pair)


def everything_is_in_the_model(pair: RestartingPair) -> bool:
    return all(sum(pair.shadow(i).values()) == len(pair.tokens_of) for i in range(pair.num_fragments))


def test_learners_are_ahead_of_the_snapshot_and_the_model_goes_on_from_them(pair):
    """Interleaving 5: the snapshot is at an early version, learners hold later ones."""
    nodes = pair.found(2)
    pair.take_snapshot()
    pair.steps(nodes, 20)
    held = [node.machine.state.fragments[0].held for node in nodes]
    assert max(held).n >= 4
    pair.restart()
    (record,) = pair.of(RestartRecord)
    assert record.versions[0] == Version(1, max(held).n) and 0 in record.recalled
    pair.steps(nodes, 20)
    assert {n.machine.state.fragments[0].base.epoch for n in nodes} == {1} and not pair.of(DiscardRecord)
    finish(pair)
    assert everything_is_in_the_model(pair)


def test_a_crash_between_a_merge_and_its_publication_merges_nothing_twice(pair):
    """Interleaving 6: the merge is on the tape, and nobody has its version."""
    a, b = pair.found(2)
    pair.take_snapshot()
    contribute(pair, a)
    bulk_up(pair, a)
    assert len(pair.merges()) == 1
    pair.restart()
    assert [v.n for v in pair.of(RestartRecord)[0].versions] == [0, 0]
    pair.steps([a, b], 12)
    finish(pair)
    assert everything_is_in_the_model(pair) and not pair.of(DiscardRecord)


def test_a_crash_after_one_of_two_learners_got_the_publication_keeps_what_the_other_one_gave(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    contribute(pair, a)
    bulk_up(pair, a)
    bulk_down(pair, b)
    assert b.machine.state.fragments[0].held == Version(0, 1) and a.machine.state.fragments[0].held == Version(0, 0)
    pair.restart()
    assert pair.of(RestartRecord)[0].versions[0] == Version(1, 1)
    for node in (a, b):
        pair.step(node)
    assert all(pair.shadow(0)[x] <= 1 for x in atoms(pair, a.learner_id))
    pair.steps([a, b], 12)
    finish(pair)
    assert everything_is_in_the_model(pair)


def test_a_contribution_on_its_way_through_the_crash_is_answered_and_its_work_sent_again(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    contribute(pair, a)
    assert payloads(a)
    pair.restart()
    pair.step(a)
    again = a.machine.state.fragments[0].unresolved
    assert again is not None and (again.header.seq, again.header.steps, again.header.base.epoch) == (2, 3, 1)
    pair.steps([a, b], 12)
    finish(pair)
    assert everything_is_in_the_model(pair)


def test_what_a_learner_that_has_left_had_handed_over_is_discarded_if_the_crash_comes_before_its_merge(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    pair.step(a)
    pair.leave(a)
    pair.settle()
    assert a.has_left and not pair.merges(1), "fragment 1 is not due yet"
    pair.restart()
    assert pair.discarded(a.learner_id, 1) == {"rollback": 10}
    pair.steps([b], 8)
    finish(pair)


def test_a_learner_that_was_away_adopts_the_older_version_and_says_what_it_lost(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    contribute(pair, a)
    bulk_up(pair, a)
    bulk_down(pair, a)
    pair.step(a)
    assert a.machine.state.fragments[0].base == Version(0, 1)
    pair.crash()
    pair.heartbeat(b)
    control(pair, b)
    pair.advance(6.0)
    assert not pair.syncer.job.is_recovering and pair.version(0) == 0, "the only one that holds version 1 was not heard"
    for _ in range(3):
        pair.settle_all()
        for node in (a, b):
            pair.step(node)
    pair.settle_all()
    assert pair.discarded(a.learner_id, 0)["rollback"] > 0
    pair.steps([a, b], 12)
    finish(pair)


def test_a_stopped_syncer_that_wakes_beside_its_successor_is_not_obeyed(pair):
    """Interleaving 14."""
    nodes = pair.found(2)
    pair.take_snapshot()
    pair.steps(nodes, 6)
    pair.restart()
    old = Envelope("job", "first", 0, nodes[0].machine.state.envelope.incarnation)
    assert nodes[0].machine.handle(ev.ControlReceived(envelope=old, message=Stop(reason="x")), pair.now_s) == []
    assert nodes[0].stop_reason is None


def test_versions_of_the_same_number_and_two_epochs_are_two_and_a_second_crash_goes_on_from_the_later(pair):
    """Interleaving 23."""
    a, b = pair.found(2)
    pair.take_snapshot()
    pair.steps([a, b], 10)
    pair.restart()
    first = pair.of(RestartRecord)[0].versions[0]
    assert first.epoch == 1 and a.machine.state.fragments[0].held == first
    pair.restart()
    assert pair.of(RestartRecord)[1].versions[0] == Version(2, first.n)
    pair.steps([a, b], 10)
    assert a.machine.state.fragments[0].base.epoch == 2
    finish(pair)
    assert everything_is_in_the_model(pair)


def test_nothing_is_served_before_the_new_epoch_is_durable(pair):
    nodes = pair.found(2)
    pair.take_snapshot()
    pair.steps(nodes, 6)
    pair.slow_disk = True
    pair.crash()
    pair.settle_all()
    assert pair.is_writing and not any(n.bulk_down or n.machine.state.envelope.epoch for n in nodes)
    pair.make_durable()
    pair.settle()
    assert {n.machine.state.envelope.epoch for n in nodes} == {1}


@pytest.mark.parametrize("times", [1, 2])
def test_a_crash_between_the_snapshot_of_an_epoch_and_its_line_leaves_origins_that_the_tape_knows(pair, times):
    nodes = pair.found(2)
    pair.take_snapshot()
    early = [c.version for c, _, _ in pair.snapshot]
    pair.steps(nodes, 20)
    held = max(node.machine.state.fragments[0].held for node in nodes)
    pair.slow_disk = True
    for epoch in range(1, 1 + times):
        pair.crash()
        pair.settle_all()
        pair.take_snapshot()
        assert pair.snapshot[0][0].version == Version(epoch, held.n) and not pair.of(RestartRecord)
    pair.slow_disk = False
    pair.restart()
    (record,) = pair.of(RestartRecord)
    assert record.versions[0] == Version(times + 1, held.n) and record.origins[0] == held
    assert record.momenta == tuple(early) and 0 in record.recalled, "values of a learner, momentum of the snapshot before"
    # What was made since has its own line again.
    pair.steps(nodes, 20)
    pair.take_snapshot()
    pair.restart()
    assert pair.of(RestartRecord)[-1].origins[0].epoch == times + 1
    finish(pair)
    assert everything_is_in_the_model(pair)


def test_a_newcomer_waits_until_the_syncer_serves_and_is_never_the_founder(pair):
    """Interleaving 7."""
    (a,) = pair.found(1)
    pair.steps([a], 6)
    pair.snapshot = []
    pair.crash()
    fresh = pair.add(joins=False)
    pair.hello(fresh)
    while fresh.control_up or fresh.control_down:
        pair.deliver_control_up(fresh) if fresh.control_up else pair.deliver_control_down(fresh)
    assert fresh.stage == "greeting"
    pair.advance(60.0)
    assert pair.syncer.job.is_recovering, "nobody has shown a model, so there is none to give"
    pair.settle_all()
    pair.settle_all()
    assert fresh.is_joined and fresh.base[0] == pair.shadow(0)
    assert not pair.syncer.job.is_recovering
    check_tape(pair)


def test_a_leave_that_the_crash_interrupts_begins_anew(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    pair.steps([a, b], 5)
    pair.step(a)
    pair.leave(a)
    bulk_up(pair, a)
    pair.restart()
    pair.settle_all()
    assert a.has_left
    pair.steps([b], 8)
    finish(pair)
    assert everything_is_in_the_model(pair)


def test_a_learner_that_died_while_there_was_no_syncer_ends_with_what_it_had_not_handed_over(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    pair.steps([a, b], 5)
    pair.kill(b)
    pair.crash()
    pair.take(ev.CountersRead(learner_id=b.learner_id, incarnation=0, inner_steps=5, tokens=50))
    pair.take(ev.LearnerLost(learner_id=b.learner_id))
    pair.settle_all()
    assert not pair.syncer.job.is_recovering, "nobody is waited for who is known to be dead"
    assert sum(pair.discarded(b.learner_id, 0).values()) == sum(
        tokens for atom, (m, tokens) in pair.tokens_of.items() if m == b.learner_id and not pair.shadow(0)[atom]
    )
    pair.steps([a], 8)
    finish(pair)


def test_a_learner_whose_join_did_not_reach_the_disk_is_a_member_all_the_same(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    pair.tape = [r for r in pair.tape if getattr(r, "session", None) != b.nonce]
    pair.restart()
    pair.steps([a, b], 6)
    assert pair.syncer.job.members.of(b.nonce).incarnation == 0 and b.is_joined


def test_a_version_whose_values_are_not_what_they_should_be_is_taken_from_another_learner(pair):
    nodes = pair.found(3)
    pair.take_snapshot()
    pair.steps(nodes, 9)
    pair.crash()
    for node in nodes:
        pair.heartbeat(node)
    while not any(kind == "held" for n in nodes for kind, _, _ in n.bulk_up):
        for node in nodes:
            while node.control_up or node.control_down:
                pair.deliver_control_up(node) if node.control_up else pair.deliver_control_down(node)
    holder = next(n for n in nodes if any(kind == "held" for kind, _, _ in n.bulk_up))
    while holder.bulk_up[0][0] != "held":
        holder.bulk_up.popleft()
    pair.deliver_bulk_up(holder, crc_ok=False)
    pair.settle()
    assert not pair.syncer.job.is_recovering
    pair.steps(nodes, 9)
    finish(pair)
    assert everything_is_in_the_model(pair)


def test_a_copy_of_a_contribution_that_the_old_syncer_merged_is_no_refusal(pair):
    """Else its learner would forget what it sent, and count the same work again when it adopts the version that holds it."""
    a, b = pair.found(2)
    pair.take_snapshot()
    contribute(pair, a)
    pair.deliver_bulk_up(a, keep=True)
    assert len(pair.merges(0)) == 1
    bulk_down(pair, b)
    copy = a.bulk_up.popleft()
    pair.restart()
    assert pair.version(0) == 1 and a.machine.state.fragments[0].unresolved is not None
    a.bulk_up.append(copy)
    pair.settle()
    pair.step(a)
    assert a.machine.state.fragments[0].base == Version(1, 1)
    finish(pair)
    assert everything_is_in_the_model(pair)


def test_last_work_that_was_merged_before_the_crash_is_not_handed_over_twice(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    for _ in range(3):
        pair.step(a)
    pair.leave(a)
    bulk_up(pair, a)
    while not (pair.merges(0) and pair.merges(1)):
        pair.step(b)
        pair.advance(1.0)
        while b.control_up or b.control_down or b.bulk_up or b.bulk_down:
            for queue, deliver in (
                (b.control_up, pair.deliver_control_up),
                (b.control_down, pair.deliver_control_down),
                (b.bulk_up, pair.deliver_bulk_up),
                (b.bulk_down, pair.deliver_bulk_down),
            ):
                while queue:
                    deliver(b)
    assert any(m.learner_id == a.learner_id for r in pair.merges() for m in r.members) and not a.has_left
    a.bulk_down.clear()
    pair.restart()
    pair.settle_all()
    assert a.has_left
    finish(pair)
    assert everything_is_in_the_model(pair)


def test_work_of_a_dead_learner_in_a_version_that_nobody_has_is_rolled_back(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    contribute(pair, a)
    bulk_up(pair, a)
    assert len(pair.merges(0)) == 1
    pair.kill(a)
    b.bulk_down.clear()
    pair.take(ev.CountersRead(learner_id=a.learner_id, incarnation=0, inner_steps=2, tokens=20))
    pair.take(ev.LearnerLost(learner_id=a.learner_id))
    pair.restart()
    merged = sum(m.tokens for m in pair.merges(0)[0].members)
    assert pair.version(0) == 0 and pair.discarded(a.learner_id, 0)["rollback"] == merged
    pair.steps([b], 8)
    finish(pair)


def test_a_version_that_was_received_and_not_adopted_is_dropped_with_the_syncer_that_made_it(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    contribute(pair, a)
    bulk_up(pair, a)
    bulk_down(pair, a)
    fragment = a.machine.state.fragments[0]
    assert fragment.held == Version(0, 1) and fragment.base == Version(0, 0)
    pair.crash()
    pair.heartbeat(b)
    control(pair, b)
    pair.advance(6.0)
    assert pair.version(0) == 0 and not pair.syncer.job.is_recovering
    pair.heartbeat(a)
    for _ in range(3):
        while a.control_up:
            pair.deliver_control_up(a)
        while a.control_down:
            pair.deliver_control_down(a)
    assert fragment.held == fragment.base == Version(0, 0), "dropped at the welcome"
    for _ in range(2):
        pair.settle_all()
        pair.step(a)
    pair.steps([a, b], 12)
    finish(pair)
    assert everything_is_in_the_model(pair) and not pair.of(DiscardRecord)


def test_a_learner_that_has_said_good_bye_hands_its_last_work_over_again(pair):
    a, b = pair.found(2)
    pair.take_snapshot()
    contribute(pair, a)
    bulk_up(pair, a)
    bulk_down(pair, b)
    a.bulk_down.clear()
    pair.step(a)
    pair.leave(a)
    control(pair, a)
    bulk_up(pair, a)
    while not a.machine.state.said_leave:
        pair.deliver_control_down(a)
    pair.restart()
    pair.settle_all()
    assert a.has_left
    pair.steps([b], 8)
    finish(pair)
    assert everything_is_in_the_model(pair)
