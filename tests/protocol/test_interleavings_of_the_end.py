"""The interleavings of PROTOCOL.md section 12, on the two machines: 13, 15 and 18 to 22. Each broke a simpler version of the rules."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.messages import Busy, Contribution, Released, Resolved
from lightning_diloco.protocol.records import ContributionRecord
from tests.protocol.invariants import check_end, check_tape
from tests.protocol.moves import atoms, bulk_up, contribute, control, down, payloads, pull, up
from tests.protocol.pair import TOKENS, Pair


@pytest.fixture
def pair() -> Pair:
    return Pair(num_fragments=1)


@pytest.mark.parametrize("order", ["contribution first", "final first answered late", "all at once"])
def test_a_learner_that_leaves_with_an_unresolved_contribution_hands_over_everything(order):
    """Interleaving 13."""
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    contribute(pair, b)
    pair.step(b)
    pair.step(b)
    if order == "contribution first":
        bulk_up(pair, b)
    pair.leave(b)
    assert [h.after for h in payloads(b)][-1] is not None
    if order == "final first answered late":
        bulk_up(pair, b)
        b.control_down.clear()
        assert b.stage == "leaving"
        pair.heartbeat(b)
    pair.settle()
    assert b.stage == "left"
    assert pair.discarded(1, 0) == {}
    pair.steps([a], 8)
    assert all(pair.shadow(0)[x] == 1 for x in atoms(pair, 1))
    assert pair.syncer.job.ledger.pending(1, 0) == 0
    pair.leave(a)
    pair.settle()
    check_end(pair)


def test_the_last_learner_that_leaves_closes_what_remains():
    """Interleaving 13: nobody else will come, so the last one's work is merged at once and published to it."""
    pair = Pair(num_fragments=3, min_quorum=2)
    a, b = pair.found(2)
    pair.steps([a, b], 6)
    pair.step(b)
    pair.leave(a)
    pair.settle()
    assert a.stage == "left" and pair.ended is None
    pair.leave(b)
    pair.settle()
    assert b.stage == "left"
    check_end(pair)
    for i in range(3):
        assert sorted(pair.shadow(i)) == sorted(pair.tokens_of), "all work of both is in the model"
        assert b.published[i] == pair.shadow(i)
    # Momentum carries the merges from which somebody trains on. Fragment 2 was merged while b did, and b did no step after it.
    last = {m.fragment_id: m.last_share for m in pair.merges() if m.last_share is not None}
    interval = pair.syncer.job.config.sync_interval_steps
    assert last == {0: min(1, 4 / interval), 1: min(1, 4 / interval)}
    assert len(pair.merges()) == 6


def test_the_share_of_a_last_merge_is_its_longest_contribution_in_intervals():
    pair = Pair(num_fragments=2, min_quorum=2, sync_interval_steps=8)
    a, b = pair.found(2)
    pair.steps([a, b], 3)
    pair.step(b)
    pair.leave(a)
    pair.leave(b)
    pair.settle()
    merges = [m for m in pair.merges() if m.last_share is not None]
    assert {m.fragment_id: m.last_share for m in merges} == {m.fragment_id: max(x.steps for x in m.members) / 8 for m in merges}
    assert 0.5 in {m.last_share for m in merges}


def test_a_merge_that_somebody_trains_on_from_is_no_last_one():
    pair = Pair(num_fragments=1, min_quorum=1)
    a, b = pair.found(2)
    pair.steps([a, b], 2)
    pair.leave(a)
    pair.settle()
    pair.steps([b], 8)
    assert pair.merges() and all(m.last_share is None for m in pair.merges())


def test_two_learners_that_leave_at_the_same_moment_lose_nothing():
    """Interleaving 13: both say good-bye before either is answered."""
    pair = Pair(num_fragments=2)
    pair.manual_merge = True
    a, b = pair.found(2)
    pair.steps([a, b], 3)
    pair.merge()
    pair.settle()
    for node in (a, b):
        pair.step(node)
        pair.leave(node)
    for node in (a, b):
        bulk_up(pair, node)
    for node in (a, b):
        control(pair, node)
    assert pair.ended is None and pair.closing
    pair.merge()
    pair.settle()
    assert a.stage == b.stage == "left"
    check_end(pair)
    assert all(sorted(pair.shadow(i)) == sorted(pair.tokens_of) for i in range(2))


def test_a_full_staging_queue_answers_busy_and_drops_nothing(pair):
    """Interleaving 15."""
    (a,) = pair.found(1)
    pair.step(a)
    control(pair, a)
    pair.tokens_of[1000] = (0, TOKENS)
    a.theta[0][1000] += 1
    a.live[0].add(1000)
    a.made.add(1000)
    pair.feed(a, ev.Boundary(tokens=TOKENS, can_snapshot=False))
    assert [m for m in up(a) if isinstance(m, Busy)]
    pair.settle()
    assert not pair.merges()
    pair.steps([a], 8)
    assert pair.shadow(0)[1000] == 1
    check_tape(pair)


def test_the_death_of_one_learner_does_not_stop_the_rounds_of_a_full_quorum():
    """Interleaving 18: K = M; without a supervisor the deadline of the round decides."""
    pair = Pair(num_fragments=1, min_quorum=2)
    a, b = pair.found(2)
    pair.steps([a, b], 12)
    pair.kill(b)
    before = len(pair.merges())
    pair.steps([a], 40)
    later = pair.merges()[before:]
    assert len(later) >= 6
    assert {r.quorum for r in later} == {1}
    check_tape(pair)


def test_a_supervisors_word_ends_the_pulls_of_the_dead_at_once():
    """Interleaving 18 with a supervisor."""
    pair = Pair(num_fragments=1, min_quorum=2)
    a, b = pair.found(2)
    contribute(pair, a)
    bulk_up(pair, a)
    assert pair.syncer.rounds.of(0).stage == "grace" or pair.merges() or pair.syncer.rounds.of(0).open_pulls
    pair.kill(b)
    pair.take(ev.LearnerLost(learner_id=1))
    assert len(pair.merges()) == 1 and pair.merges()[0].quorum == 1


def test_a_lost_refusal_is_told_again_after_the_next_report(pair):
    """Interleaving 19."""
    (a,) = pair.found(1)
    pair.step(a, nan=True)
    control(pair, a)
    pair.step(a)
    bulk_up(pair, a)
    a.control_down.clear()
    assert a.machine.state.fragments[0].unresolved is not None
    pair.heartbeat(a)
    pair.settle()
    assert a.machine.state.fragments[0].unresolved is None
    pair.steps([a], 5)
    assert not a.poisoned and len(pair.merges()) >= 1


@pytest.mark.parametrize("fate", ["held", "merged"])
def test_a_lost_answer_to_a_final_contribution_is_told_again(fate):
    """Interleaving 19, for a learner that waits for the answer in order to leave."""
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pair.steps([a, b], 3)
    pair.step(b)
    pair.leave(b)
    bulk_up(pair, b)
    while fate == "merged" and pair.syncer.rounds.of(0).holds(1):
        pair.step(a)
        control(pair, a)
        bulk_up(pair, a)
    b.control_down.clear()
    assert b.stage == "leaving"
    pair.heartbeat(b)
    pair.settle()
    assert b.stage == "left"


def test_released_that_crosses_a_contribution_does_not_end_the_contribution():
    """Interleaving 20."""
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pull(pair, a, b)
    pair.step(b)
    mine = payloads(b)[0]
    pair.advance(11.0)
    assert [m for m in down(b) if isinstance(m, Released)], "the round ended at its deadline"
    control(pair, b)
    assert b.machine.state.fragments[0].unresolved is not None
    pair.settle()
    pair.steps([a, b], 8)
    (record,) = [r for r in pair.of(ContributionRecord) if (r.learner_id, r.seq) == (1, mine.seq)]
    assert record.outcome == "carried"
    assert all(pair.shadow(0)[x] == 1 for x in atoms(pair, 1)[:5])


def test_released_that_comes_before_the_boundary_ends_the_pull():
    """Interleaving 20, earlier: nothing was copied yet."""
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pull(pair, a, b)
    pair.advance(11.0)
    control(pair, b)
    assert b.machine.state.fragments[0].pulled_by is None
    pair.step(b)
    assert not payloads(b)


def test_a_pull_that_outlives_its_round_is_answered_and_carried():
    """Interleaving 20: the merge without this learner ends its round, not its answer."""
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pull(pair, a, b)
    pair.step(a)
    bulk_up(pair, a)
    merged = len(pair.merges())
    control(pair, b)
    pair.step(b)
    assert payloads(b)
    pair.settle()
    assert pair.of(ContributionRecord)[-1].outcome == "carried" and len(pair.merges()) == merged


def test_a_copy_of_a_payload_whose_first_one_was_refused_gets_the_same_answer(pair):
    """Interleaving 21: bad bytes the first time, good ones the second: decided once, and the work comes again under a new seq."""
    (a,) = pair.found(1)
    contribute(pair, a)
    pair.deliver_bulk_up(a, keep=True, crc_ok=False)
    pair.deliver_bulk_up(a)
    assert [(r.outcome, r.reason) for r in pair.of(ContributionRecord)] == [("refused", "bad_checksum"), ("duplicate", None)]
    assert not pair.merges()
    pair.steps([a], 8)
    assert sorted(pair.shadow(0)) == sorted(pair.tokens_of)[: len(pair.shadow(0))] and len(pair.merges()) >= 1
    assert not pair.discarded(0, 0)


def test_a_payload_that_arrives_twice_is_merged_once(pair):
    """Interleaving 21, both good."""
    (a,) = pair.found(1)
    contribute(pair, a)
    pair.deliver_bulk_up(a, keep=True)
    pair.deliver_bulk_up(a)
    assert [r.outcome for r in pair.of(ContributionRecord)] == ["folded", "duplicate"]
    pair.steps([a], 4)
    check_tape(pair)


def test_a_new_life_never_takes_a_seq_of_an_old_one(pair):
    """Interleaving 22: next_seq comes with the welcome, and what the dead one had in flight is not taken for the new one's."""
    a, b = pair.found(2)
    pair.steps([a, b], 12)
    used = pair.syncer.job.last_seq[1, 0]
    contribute(pair, b)
    lost = payloads(b)[0].seq
    pair.kill(b)
    pair.take(ev.LearnerLost(learner_id=1))
    again = pair.add(1, joins=False)
    pair.hello(again)
    control(pair, again)
    assert again.machine.state.fragments[0].next_seq == used + 1 == lost
    before = pair.syncer.job.ledger.pending(1, 0)
    bulk_up(pair, b)
    assert pair.syncer.job.ledger.pending(1, 0) == before
    assert not pair.syncer.rounds.of(0).holds(1)
    pair.settle()
    pair.steps([a, again], 9)
    check_tape(pair)


def test_a_known_seq_with_other_bytes_is_a_conflict_and_changes_nothing(pair):
    """Interleaving 22, with a learner that breaks the rule."""
    (a,) = pair.found(1)
    contribute(pair, a)
    header = payloads(a)[0]
    bulk_up(pair, a)
    envelope = pair._envelope_up(a)
    forged = Contribution(**{**{n: getattr(header, n) for n in header.__struct_fields__}, "crc": header.crc ^ 1})
    event = ev.ContributionArrived(session=a.nonce, envelope=envelope, header=forged, norm=1.0, is_finite=True, payload_bytes=1)
    merges = len(pair.merges())
    pair.take(event)
    assert pair.of(ContributionRecord)[-1].reason == "conflict"
    assert len(pair.merges()) == merges


def test_a_final_contribution_waits_for_the_merge_during_which_the_part_before_it_came():
    """Both parts in one merge would be averaged, and each count half: the second comes again after the merge (docs/protocol.md, 20)."""
    pair = Pair(num_fragments=1)
    a, b = pair.found(2)
    pull(pair, a, b)
    for node in (a, b):
        pair.step(node)
        pair.step(node)
    assert payloads(a) and payloads(b)
    pair.manual_merge = True
    bulk_up(pair, a)
    pair.advance(30)
    round_ = pair.syncer.rounds.of(0)
    assert round_.stage == "merging"
    bulk_up(pair, b)
    assert [h.learner_id for h in round_.held] == [1], "carried"
    pair.step(b)
    pair.leave(b)
    (final,) = payloads(b)
    assert final.after is not None
    bulk_up(pair, b)
    (answer,) = [m for m in down(b) if isinstance(m, Resolved) and m.seq == final.seq]
    assert answer.outcome == "unknown" and b.stage == "leaving"
    assert len(round_.held) == 1
    pair.manual_merge = False
    pair.settle()
    assert b.stage == "left" and pair.discarded(1, 0) == {}
    pair.steps([a], 8)
    pair.leave(a)
    pair.settle()
    assert all(pair.shadow(0)[x] == 1 for x in atoms(pair, 1))
    check_end(pair)
