"""The interleavings of PROTOCOL.md section 12, on the two machines: 1 to 4 and 8 to 12. Each broke a simpler version of the rules.

The others: 5, 6, 7, 14 and 23 in `test_restarts.py`, with a syncer that crashes (7 with real processes too, in
`tests/runtime/test_rebuild.py`); 13, 15 and 18 to 22 in `test_interleavings_of_the_end.py`; 16 is the transport's
(`tests/runtime/test_transport_reconnect.py`). 17 needs islands, which are not there: one learner is one process.
"""

from __future__ import annotations

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import Contribution, Pull
from lightning_diloco.protocol.records import ContributionRecord, JoinRecord, LeaveRecord, RoundOpenRecord
from tests.protocol.invariants import check_end, check_tape
from tests.protocol.moves import atoms, bulk_up, contribute, control, down, payloads, publications, pull
from tests.protocol.pair import TOKENS, Node, Pair


@pytest.fixture
def pair() -> Pair:
    return Pair(num_fragments=1)


def test_work_is_in_the_model_once_when_its_publication_is_lost_and_the_next_one_does_not_name_its_learner(pair):
    """Interleaving 1."""
    a, b = pair.found(2)
    contribute(pair, a)
    bulk_up(pair, a)
    assert pair.version(0) == 1 and pair.merges()[0].members[0].learner_id == a.learner_id
    pair.drop_bulk_down(a)
    bulk_up(pair, a)
    a.bulk_down.clear()  # the full one is lost without a word as well
    while pair.version(0) < 2:
        pair.step(b)
        pair.advance(1.0)
        control(pair, b)
        bulk_up(pair, b)
        while b.bulk_down:
            pair.deliver_bulk_down(b)
    assert [m.learner_id for m in pair.merges()[1].members] == [b.learner_id]
    for _ in range(2):
        pair.heartbeat(a)
        pair.settle()
    pair.take(ev.PublicationFailed(session=a.nonce, fragment_id=0))
    pair.settle()
    pair.step(a)
    assert a.machine.state.fragments[0].base == Version(0, 2)
    pair.steps([a, b], 8)
    assert all(pair.shadow(0)[x] <= 1 for x in atoms(pair, a.learner_id))
    check_tape(pair)


def test_the_next_pull_is_answered_busy_while_the_publication_with_the_own_work_is_on_its_way(pair):
    """Interleaving 2."""
    (a,) = pair.found(1)
    contribute(pair, a)
    bulk_up(pair, a)
    assert len(publications(a)) == 1
    first = a.machine.state.fragments[0].unresolved
    for _ in range(8):
        pair.step(a)
        control(pair, a)
    assert not payloads(a)
    assert a.machine.state.fragments[0].unresolved is first
    assert len(pair.of(RoundOpenRecord)) == 3 and len(pair.merges()) == 1
    pair.settle()
    pair.steps([a], 8)
    assert len(pair.merges()) == 3
    check_tape(pair)


def test_a_pull_that_arrives_with_the_publication_is_answered_after_the_adoption(pair):
    """Interleaving 2, the other outcome: adopt first."""
    (a,) = pair.found(1)
    contribute(pair, a)
    bulk_up(pair, a)
    for _ in range(3):
        pair.step(a)
        while a.control_up:
            pair.deliver_control_up(a)
    pair.step(a)
    while a.control_up:
        pair.deliver_control_up(a)
    assert [m for m in down(a) if isinstance(m, Pull)]
    while a.control_down:
        pair.deliver_control_down(a)
    pair.deliver_bulk_down(a)
    pair.step(a)
    (header,) = payloads(a)
    assert header.base == Version(0, 1) and header.base_merged_seq == 1 and header.steps == 5
    pair.settle()
    assert pair.version(0) == 2


def test_an_always_late_learner_does_not_raise_the_pace_and_its_work_is_merged(pair):
    """Interleaving 3: K = 1, and everything of b on bulk arrives one interval late."""
    a, b = pair.found(2)
    for _ in range(48):
        for node in (a, b):
            pair.step(node)
        pair.advance(1.0)
        for _ in range(3):
            for node in (a, b):
                control(pair, node)
            bulk_up(pair, a)
            while a.bulk_down:
                pair.deliver_bulk_down(a)
        if len(a.live[0]) % 5 == 0:
            bulk_up(pair, b)
            while b.bulk_down:
                pair.deliver_bulk_down(b)
    opened = [r for r in pair.of(RoundOpenRecord) if r.fragment_id == 0]
    assert len(opened) == 48 // 4
    assert any(r.outcome == "carried" for r in pair.of(ContributionRecord) if r.learner_id == b.learner_id)
    assert pair.syncer.job.ledger.merged(b.learner_id, 0) > 20 * TOKENS
    check_tape(pair)


def test_a_carried_contribution_is_merged_once_into_the_next_round(pair):
    """Interleaving 3 and 20: a contribution that arrives outside a round."""
    a, b = pair.found(2)
    pull(pair, a, b)
    for node in (a, b):
        pair.step(node)
        assert payloads(node)
    before = len(pair.merges())
    bulk_up(pair, a)
    control(pair, a)
    assert len(pair.merges()) == before + 1
    pair.settle()
    late = [r for r in pair.of(ContributionRecord) if r.learner_id == b.learner_id][-1]
    assert late.outcome == "carried"
    pair.steps([a, b], 4)
    assert [(m.learner_id, m.seq) for m in pair.merges()[before + 1].members][0] == (b.learner_id, late.seq)
    pair.steps([a, b], 8)
    check_tape(pair)


@pytest.mark.parametrize("way", ["restart", "outage"])
def test_not_all_fragments_go_out_at_once_after_a(way):
    """Interleaving 4: one learner restarted, or an outage."""
    pair = Pair(num_fragments=8, sync_interval_steps=8)
    (a,) = pair.found(1)
    pair.steps([a], 20)
    if way == "restart":
        pair.kill(a)
        pair.take(ev.LearnerLost(learner_id=0))
        a = pair.add(0)
    else:
        for _ in range(40):
            pair.step(a)
            a.control_up.clear()
        pair.advance(40.0)
    for _ in range(24):
        before = len(pair.of(RoundOpenRecord))
        pair.steps([a], 1)
        assert len(pair.of(RoundOpenRecord)) - before <= 2
    assert all(pair.version(i) >= 4 for i in range(8))


def test_a_publication_that_overtakes_the_full_transfer_of_a_joiner_is_not_lost(pair):
    """Interleaving 8: v1 comes while the joiner's full v0 is on its way."""
    (a,) = pair.found(1)
    b = pair.add(1, joins=False)
    pair.hello(b)
    control(pair, b)
    assert [p.version.n for p in publications(b)] == [0] and publications(b)[0].parent is None
    contribute(pair, a)
    bulk_up(pair, a)
    assert pair.version(0) == 1
    assert [p.version.n for p in publications(b)] == [0], "at most one is on its way"
    pair.settle()
    assert b.is_joined and b.machine.state.fragments[0].held == Version(0, 1)
    pair.steps([a, b], 8)
    check_tape(pair)


def test_full_transfers_that_overtake_the_welcome_are_asked_for_again():
    """Interleaving 8, on the other channel: bulk is faster than control."""
    pair = Pair(num_fragments=3)
    pair.static_bytes = 8
    pair.found(1)
    b = pair.add(1, joins=False)
    pair.hello(b)
    pair.deliver_control_up(b)
    while b.bulk_down:
        pair.deliver_bulk_down(b)
    bulk_up(pair, b)
    assert b.stage == "greeting"
    pair.settle()
    assert b.is_joined
    assert pair.syncer.job.members.by_id(1).stage == "joined"


def test_ready_that_overtakes_the_last_acknowledgement_still_makes_a_member(pair):
    """Control is faster than bulk: `Ready` comes before the last full transfer is known to have arrived."""
    pair.found(1)
    b = pair.add(1, joins=False)
    pair.hello(b)
    control(pair, b)
    pair.deliver_bulk_down(b)
    control(pair, b)
    assert b.is_joined and pair.syncer.job.members.by_id(1).stage == "receiving"
    bulk_up(pair, b)
    assert pair.syncer.job.members.by_id(1).stage == "joined"
    assert [r.role for r in pair.of(JoinRecord)] == ["founder", "joiner"]


def fifteen_steps(pair: Pair, node: Node) -> Contribution:
    """This learner trains; a contribution of its first 15 steps is on its way when it has done them. It had 10 when it last saved."""
    for _ in range(14):
        pair.step(node)
    control(pair, node)
    pair.step(node)
    (header,) = payloads(node)
    assert header.steps == 15 and header.tokens == 15 * TOKENS
    return header


def die_three_steps_later(pair: Pair, node: Node) -> None:
    """The last of them is known from the process's own counters alone."""
    for _ in range(2):
        pair.step(node)
        while node.control_up:
            pair.deliver_control_up(node)
    pair.step(node)
    pair.kill(node)
    pair.take(ev.CountersRead(learner_id=node.learner_id, incarnation=0, inner_steps=18, tokens=18 * TOKENS))
    pair.take(ev.LearnerLost(learner_id=node.learner_id))


def test_what_was_merged_before_a_kill_is_in_the_next_life_once_and_the_rest_died(pair):
    """Interleaving 9: 10 steps pending in the checkpoint, 15 merged, a version that the dead one never saw, 3 that it handed to nobody."""
    a, b = pair.found(2)
    fifteen_steps(pair, b)
    bulk_up(pair, b)
    assert pair.version(0) == 1 and b.machine.state.fragments[0].base == Version(0, 0)
    die_three_steps_later(pair, b)
    ledger, work = pair.syncer.job.ledger, atoms(pair, 1)
    assert pair.discarded(1, 0) == {"died": 3 * TOKENS}
    assert (ledger.tokens(1), ledger.merged(1, 0), ledger.pending(1, 0)) == (18 * TOKENS, 15 * TOKENS, 0)
    again = pair.add(1)
    assert again.joined.incarnation == 1 and sorted(again.theta[0]) == work[:15], "it begins with the published parameters"
    pair.steps([a, again], 9)
    for node in (a, again):
        pair.leave(node)
    pair.settle()
    check_end(pair)
    assert [pair.shadow(0)[x] for x in work] == [1] * 15 + [0] * 3
    assert all(pair.shadow(0)[x] == 1 for x in pair.tokens_of if x not in work[15:])
    assert pair.discarded(1, 0) == {"died": 3 * TOKENS} and ledger.merged(1, 0) == 15 * TOKENS + 9 * TOKENS


def test_what_was_held_at_a_kill_is_merged_once_beside_the_next_life_and_the_rest_died():
    """Interleaving 9 with 15 steps held, not merged: the next life trains from a version without them."""
    pair = Pair(num_fragments=1, min_quorum=2)
    a, b, c = pair.found(3)
    header = fifteen_steps(pair, b)
    for node in (a, c):
        pair.step(node)
        control(pair, node)
    bulk_up(pair, b)  # alone it is no quorum
    assert not pair.merges() and pair.syncer.rounds.of(0).holds(1)
    die_three_steps_later(pair, b)
    ledger, work = pair.syncer.job.ledger, atoms(pair, 1)
    assert pair.discarded(1, 0) == {"died": 3 * TOKENS}
    assert (ledger.tokens(1), ledger.merged(1, 0), ledger.pending(1, 0)) == (18 * TOKENS, 0, 15 * TOKENS)
    again = pair.add(1)
    assert not again.theta[0] and again.machine.state.fragments[0].next_seq == header.seq + 1
    pair.step(again)
    pair.settle()
    assert not pair.merges() and again.machine.state.fragments[0].pulled_by is None
    pair.steps([a, again, c], 4)
    first = pair.merges()[0].members[0]
    assert (first.learner_id, first.incarnation, first.seq, first.tokens) == (1, 0, header.seq, 15 * TOKENS)
    pair.steps([a, again, c], 8)
    for node in (a, again, c):
        pair.leave(node)
    pair.settle()
    check_end(pair)
    assert [pair.shadow(0)[x] for x in work] == [1] * 15 + [0] * 3
    assert all(pair.shadow(0)[x] == 1 for x in pair.tokens_of if x not in work[15:])
    assert pair.discarded(1, 0) == {"died": 3 * TOKENS} and ledger.merged(1, 0) == 15 * TOKENS + 13 * TOKENS


def test_the_second_process_that_claims_an_id_is_refused(pair):
    """Interleaving 10."""
    (a,) = pair.found(1)
    twin = pair.add(0)
    assert twin.stage == "refused" and "learner_id=0" in twin.detail
    pair.steps([a], 8)
    assert len(pair.merges()) == 2


def test_a_takeover_fences_the_first_process_and_what_it_sends_afterwards_changes_nothing():
    """Interleaving 10 with the supervisor's token."""
    pair = Pair(num_fragments=1, options={"takeover_token": "secret"})
    (a,) = pair.found(1, takeover_token="secret")
    contribute(pair, a)
    twin = pair.add(0, joins=False, takeover_token="secret")
    pair.hello(twin)
    pair.deliver_control_up(twin)
    before = (pair.version(0), pair.syncer.job.ledger.tokens(0), pair.syncer.job.ledger.pending(0, 0))
    assert before[2] == 0 and pair.discarded(0, 0) == {"fenced": before[1]}
    bulk_up(pair, a)
    a.control_down.clear()
    pair.heartbeat(a)
    pair.settle()
    assert a.stage == "fenced" and "taken over" in a.detail
    assert (pair.version(0), pair.syncer.job.ledger.tokens(0), pair.syncer.job.ledger.pending(0, 0)) == before
    assert twin.is_joined and twin.joined.incarnation == 1
    pair.hello(a)
    assert a.stage == "fenced"
    assert [r.reason for r in pair.of(LeaveRecord)] == ["fenced"]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ["nonfinite", "norm"])
def test_a_bad_value_is_refused_once_and_its_learner_heals(kind, count):
    """Interleaving 11: NaN (or an outlier) in one learner for one step, also in the only one."""
    pair = Pair(num_fragments=1)
    nodes = pair.found(count)
    pair.steps(nodes, 40)
    pair.step(nodes[-1], nan=kind == "nonfinite", loud=kind == "norm")
    bad = nodes[-1].learner_id
    pair.steps(nodes, 24)
    refused = [r for r in pair.of(ContributionRecord) if r.outcome == "refused"]
    assert [(r.learner_id, r.reason) for r in refused] == [(bad, kind)]
    assert not nodes[-1].poisoned and not nodes[-1].loud
    for node in nodes:
        pair.heartbeat(node)
    pair.settle()
    assert list(pair.discarded(bad, 0)) == [kind]
    assert pair.discarded(bad, 0)[kind] >= refused[0].tokens
    assert any(bad in [m.learner_id for m in r.members] for r in pair.merges()[-2:]), "it takes part again"
    check_tape(pair)


def test_no_round_is_stuck_while_all_learners_validate():
    """Interleaving 12: the pulls end at once, the rounds are cancelled, and the pace goes on afterwards."""
    pair = Pair(num_fragments=2, min_quorum=2)
    nodes = pair.found(2)
    pair.steps(nodes, 9)
    for node in nodes:
        pair.step(node)
        pair.feed(node, ev.PauseChanged(is_paused=True))
    pair.settle()
    assert all(r.stage == "idle" for r in pair.syncer.rounds.all)
    assert not pair.syncer.job.members.active(pair.now_s)
    pair.advance(600.0)
    for node in nodes:
        pair.feed(node, ev.PauseChanged(is_paused=False))
    pair.settle()
    before = len(pair.of(RoundOpenRecord))
    pair.steps(nodes, 4)
    assert len(pair.of(RoundOpenRecord)) - before == 2
    window = pair.syncer.job.members.step_time_s(pair.now_s)
    assert window < 10.0, "a pause is no step time"
    assert (pair.syncer.job.grace.sync.value or 0.0) < 10.0, "a pause is no time of synchronization"
    check_tape(pair)
