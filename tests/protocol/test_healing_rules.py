"""What a learner's rules do at the boundary of a heal: to pulls, to contributions on their way, to what was copied aside.

Tokens stay exact in every case: `Pair` compares the machines' accounts with the model after every event.
"""

from __future__ import annotations

from random import Random

import pytest

import tests.protocol.test_invariants as chaos
from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.messages import Busy, Pull
from lightning_diloco.protocol.records import ContributionRecord
from lightning_diloco.protocol.wire import decode_learner_header
from tests.protocol.invariants import check_end, check_tape
from tests.protocol.mending import MendingPair
from tests.protocol.moves import bulk_up, control, payloads, up
from tests.protocol.pair import TOKENS, Node

ROUND = 9_001
"""A pull that the test forges: a round that the syncer has not opened, so that it comes exactly when the test needs it."""


@pytest.fixture
def pair() -> MendingPair:
    return MendingPair(num_fragments=2)


def ask(pair: MendingPair, node: Node, fragment_id: int) -> None:
    """The learner is asked for a contribution, and answers at its next boundary."""
    pair.feed(node, ev.ControlReceived(envelope=node.machine.state.envelope, message=Pull(fragment_id=fragment_id, round_id=ROUND)))


def quiet(pair: MendingPair) -> Node:
    """A learner without anything on its way, and without any work that is not merged."""
    (a,) = pair.found(1)
    pair.steps([a], 8)
    while any(f.unresolved or f.pulled_by for f in a.machine.state.fragments):
        pair.steps([a], 1)
    pair.settle()
    a.control_up.clear()
    return a


def resolve(pair: MendingPair, node: Node, *fragment_ids: int) -> None:
    """What is on its way of these fragments arrives, and the answers come back; of the others it stays on its way."""
    for _ in range(len(node.bulk_up)):
        kind, data, _ = node.bulk_up[0]
        is_meant = kind != "contribution" or decode_learner_header(data)[1].fragment_id in fragment_ids
        pair.deliver_bulk_up(node) if is_meant else node.bulk_up.rotate(-1)
    while node.control_down:
        pair.deliver_control_down(node)


def refused_alone(pair: MendingPair, node: Node, fragment_id: int) -> None:
    """One step poisons all fragments; only this one is asked for, and refused: its heal is due."""
    ask(pair, node, fragment_id)
    pair.step(node, nan=True)
    resolve(pair, node, fragment_id)
    assert node.machine.state.fragments[fragment_id].heal == "nonfinite" and node.poisoned == {0, 1}


def leave_all(pair: MendingPair, node: Node) -> None:
    pair.leave(node)
    pair.settle()
    assert node.stage == "left"
    check_end(pair)


def refusals(pair: MendingPair) -> list[tuple[int, int]]:
    return [(r.fragment_id, r.tokens) for r in pair.of(ContributionRecord) if r.reason == "nonfinite"]


def test_a_pull_at_the_boundary_of_a_heal_is_busy_for_every_poisoned_fragment_and_their_tokens_are_discarded_and_never_merged(pair):
    a = quiet(pair)
    work = [a.machine.state.tokens - f.since_tokens for f in a.machine.state.fragments]
    refused_alone(pair, a, 0)
    for fragment_id in (0, 1):
        ask(pair, a, fragment_id)
    a.control_up.clear()
    seqs = [f.next_seq for f in a.machine.state.fragments]
    pair.step(a)
    assert [f.next_seq for f in a.machine.state.fragments] == seqs, "nothing was copied aside, not even in vain"
    assert [(h.fragment_id, h.keep_seq) for h in pair.heals] == [(0, 0), (1, 0)]
    assert [m for m in up(a) if isinstance(m, Busy)] == [Busy(fragment_id=0, round_id=ROUND), Busy(fragment_id=1, round_id=ROUND)]
    assert not payloads(a) and not a.poisoned
    pair.settle()
    pair.steps([a], 8)
    leave_all(pair, a)
    # Two steps are lost, the poisoned one and the one with whose boundary the heal came, and what no round had taken before.
    assert [pair.discarded(0, i) for i in (0, 1)] == [{"nonfinite": w + 2 * TOKENS} for w in work]
    assert len(refusals(pair)) == 1, "nothing that the heal threw away was handed over"


def test_a_pull_of_an_earlier_fragment_is_answered_after_the_heal_of_a_later_one(pair):
    """Heals come before all pulls: fragment 0 is asked for, and the refusal is fragment 1's."""
    a = quiet(pair)
    refused_alone(pair, a, 1)
    ask(pair, a, 0)
    pair.step(a)
    assert {h.fragment_id for h in pair.heals} == {0, 1} and not payloads(a)
    pair.settle()
    leave_all(pair, a)
    assert len(refusals(pair)) == 1


def test_a_finite_contribution_on_its_way_is_kept_by_a_heal_and_merged_with_exactly_its_tokens(pair):
    a = quiet(pair)
    ask(pair, a, 1)
    pair.step(a)
    (kept,) = payloads(a)
    refused_alone(pair, a, 0)
    pair.step(a)
    assert [(h.fragment_id, h.keep_seq) for h in pair.heals] == [(0, 0), (1, kept.seq)]
    fragment = a.machine.state.fragments[1]
    assert fragment.unresolved is not None and a.machine.state.tokens - fragment.since_tokens == kept.tokens
    pair.settle()
    pair.steps([a], 8)
    (merged,) = [m for r in pair.merges(1) for m in r.members if m.seq == kept.seq]
    assert merged.tokens == kept.tokens
    leave_all(pair, a)
    assert pair.discarded(0, 1) == {"nonfinite": 2 * TOKENS}, "only what came after it"


def test_a_kept_contribution_that_is_refused_later_is_discarded_once_and_heals_nothing_again(pair):
    a = quiet(pair)
    ask(pair, a, 0)
    ask(pair, a, 1)
    pair.step(a, nan=True)
    tokens = {h.fragment_id: h.tokens for h in payloads(a)}
    resolve(pair, a, 0)
    pair.step(a)
    assert [(h.fragment_id, h.keep_seq > 0) for h in pair.heals] == [(0, False), (1, True)]
    pair.step(a)
    resolve(pair, a, 1)
    assert refusals(pair) == sorted(tokens.items()) and a.machine.state.fragments[1].heal is None
    pair.step(a)
    assert len(pair.heals) == 2, "what it named was mended with the other fragment"
    fragment = a.machine.state.fragments[1]
    assert a.machine.state.tokens - fragment.since_tokens == 2 * TOKENS, "the steps since the heal are sound, and stay"
    pair.settle()
    pair.steps([a], 8)
    leave_all(pair, a)
    assert [pair.discarded(0, i) for i in (0, 1)] == [{"nonfinite": tokens[i] + TOKENS} for i in (0, 1)]


def test_an_outlier_on_its_way_that_is_refused_after_a_heal_is_healed_as_well(pair):
    a = quiet(pair)
    pair.steps([a], 40)
    while any(f.unresolved or f.pulled_by for f in a.machine.state.fragments):
        pair.steps([a], 1)
    ask(pair, a, 1)
    pair.step(a, loud=True)
    refused_alone(pair, a, 0)
    pair.step(a)
    assert pair.heals[-1].keep_seq > 0 and 1 in a.loud
    pair.settle()
    pair.step(a)
    assert (pair.heals[-1].fragment_id, pair.heals[-1].reason) == (1, "norm") and not a.loud
    pair.settle()
    pair.steps([a], 8)
    leave_all(pair, a)
    assert pair.discarded(0, 1)["norm"] > 0


def test_what_was_copied_aside_and_not_encoded_is_withdrawn_by_a_heal_and_its_tokens_are_discarded(pair):
    a = quiet(pair)
    refused_alone(pair, a, 0)
    pair.is_blind = True
    ask(pair, a, 1)
    pair.manual_encode = True
    pair.step(a)
    assert len(a.to_encode) == 1 and not pair.heals
    withdrawn = a.machine.state.fragments[1].unresolved.header
    pair.is_blind = False
    a.control_up.clear()
    pair.step(a)
    assert [(h.fragment_id, h.keep_seq) for h in pair.heals] == [(0, 0), (1, 0)]
    assert Busy(fragment_id=1, round_id=ROUND) in up(a), "the round does not wait for it"
    pair.manual_encode = False
    pair.encode(a)
    assert not payloads(a) and (1, withdrawn.seq) not in a.payloads, "it is encoded in vain, not sent, and forgotten"
    pair.settle()
    merged = pair.syncer.job.ledger.merged(0, 1)
    pair.steps([a], 8)
    assert pair.syncer.job.ledger.merged(0, 1) > merged, "a gap in the seqs is no reason to refuse the next one"
    leave_all(pair, a)
    assert pair.discarded(0, 1) == {"nonfinite": withdrawn.tokens + TOKENS}


def test_a_heal_waits_for_the_boundary_at_which_somebody_has_looked(pair):
    a = quiet(pair)
    refused_alone(pair, a, 0)
    pair.is_blind = True
    ask(pair, a, 0)
    a.control_up.clear()
    pair.step(a)
    assert not pair.heals and a.machine.state.fragments[0].heal == "nonfinite" and a.poisoned == {0, 1}
    assert Busy(fragment_id=0, round_id=ROUND) in up(a), "its values would be refused again"
    pair.is_blind = False
    pair.step(a)
    assert [h.fragment_id for h in pair.heals] == [0, 1] and not a.poisoned
    pair.settle()
    pair.steps([a], 8)
    leave_all(pair, a)


def test_an_outlier_is_healed_though_nobody_has_looked(pair):
    a = quiet(pair)
    pair.steps([a], 40)
    while any(f.unresolved or f.pulled_by for f in a.machine.state.fragments):
        pair.steps([a], 1)
    pair.is_blind = True
    ask(pair, a, 0)
    pair.step(a, loud=True)
    resolve(pair, a, 0)
    assert a.machine.state.fragments[0].heal == "norm"
    pair.step(a)
    assert [(h.fragment_id, h.reason) for h in pair.heals] == [(0, "norm")], "and the other fragment keeps its work"


def test_a_learner_that_leaves_with_a_heal_due_discards_the_poisoned_work_and_hands_over_none_of_it(pair):
    a = quiet(pair)
    refused_alone(pair, a, 0)
    pair.leave(a)
    assert [(h.fragment_id, h.keep_seq) for h in pair.heals] == [(0, 0), (1, 0)] and not payloads(a)
    pair.settle()
    assert a.stage == "left" and len(refusals(pair)) == 1
    assert all(pair.discarded(0, i)["nonfinite"] >= TOKENS for i in (0, 1))
    check_end(pair)


def test_a_learner_that_leaves_with_a_heal_due_still_hands_over_what_is_on_its_way(pair):
    a = quiet(pair)
    ask(pair, a, 1)
    pair.step(a)
    (kept,) = payloads(a)
    merged = pair.syncer.job.ledger.merged(0, 1)
    refused_alone(pair, a, 0)
    pair.leave(a)
    assert [h.keep_seq for h in pair.heals] == [0, kept.seq]
    assert [h.seq for h in payloads(a)] == [kept.seq], "and nothing after it"
    pair.settle()
    assert a.stage == "left" and pair.syncer.job.ledger.merged(0, 1) == merged + kept.tokens
    check_end(pair)


def test_a_learner_that_leaves_unseen_with_a_heal_due_is_refused_once_more_and_its_account_closes(pair):
    a = quiet(pair)
    refused_alone(pair, a, 0)
    pair.is_blind = True
    pair.leave(a)
    assert not pair.heals and [h.is_final for h in payloads(a)] == [True, True]
    pair.settle()
    assert a.stage == "left" and len(refusals(pair)) == 3
    check_end(pair)


def test_a_copy_of_the_refusal_of_what_was_kept_discards_nothing_twice(pair):
    a = quiet(pair)
    ask(pair, a, 0)
    ask(pair, a, 1)
    pair.step(a, nan=True)
    resolve(pair, a, 0)
    pair.step(a)
    while a.bulk_up:
        bulk_up(pair, a)
    answer = a.control_down[-1]
    control(pair, a)
    lost = dict(a.machine.state.fragments[1].discarded)
    a.control_down.append(answer)
    control(pair, a)
    assert a.machine.state.fragments[1].discarded == lost
    leave_all(pair, a)


@pytest.mark.parametrize("adopt", ["rebase", "overwrite"])
def test_heals_between_random_deliveries_and_late_encodings_keep_every_account_exact(adopt, monkeypatch):
    """`Pair` holds machines and model to each other after every event; here they are driven into heals of every kind."""
    heals = []
    for seed in range(60):
        dice = Random(seed)
        pairs: list[MendingPair] = []

        def mending(dice: Random = dice, pairs: list[MendingPair] = pairs, **options) -> MendingPair:
            pairs.append(MendingPair(dice=dice, **options))
            return pairs[0]

        monkeypatch.setattr(chaos.Chaos, "kind", staticmethod(mending))
        # Number 0 is a bad step, up to 24 are good ones, the rest deliveries, merges, reports, pauses and leaves.
        numbers = [dice.choice((0, 1, 2, 3)) if dice.random() < 0.3 else dice.randrange(25, 92) for _ in range(150)]
        schedule = [(number, dice.randrange(6), dice.randrange(4)) for number in numbers]
        check_tape(chaos.run(schedule, adopt=adopt, quorum=1, faults=frozenset({"bad"})))
        heals += pairs[0].heals
    assert len(heals) > 100
    assert adopt == "overwrite" or sum(h.keep_seq > 0 for h in heals) > 5
