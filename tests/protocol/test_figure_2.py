"""The paper's Figure 2: M = 2, P = 3, H = 3, tau = 2; learner 2 stalls for three steps.

References:
    Decoupled DiLoCo, arXiv 2604.21428, figure 2.
"""

from __future__ import annotations

import pytest

from tests.protocol.invariants import check_end
from tests.protocol.pair import Node, Pair

STALL_FROM, STALL_TO, LAST = 7, 10, 18


def run_figure(adopt: str) -> tuple[Pair, Node, Node, list[int]]:
    """Play the figure; returns the number of fragments that wait for learner 2 at each tick of its stall."""
    pair = Pair(num_fragments=3, sync_interval_steps=3, overlap_steps=2, grace_fraction=0.8, adopt=adopt)
    first, second = pair.found(2)
    waiting = []
    for tick in range(LAST):
        is_stalled = STALL_FROM <= tick < STALL_TO
        before = first.machine.state.inner_step
        pair.step(first)
        if not is_stalled:
            pair.step(second)
        pair.advance(0.5)
        pair.settle()
        pair.advance(0.5)
        pair.settle()
        assert first.machine.state.inner_step == before + 1, "learner 1 never stops"
        if is_stalled:
            waiting.append(sum(f.is_behind for f in second.machine.state.fragments))
    return pair, first, second, waiting


@pytest.mark.parametrize("adopt", ["rebase", "overwrite"])
def test_learner_1_never_stops_and_one_fragment_is_merged_at_every_step(adopt):
    pair, first, second, _ = run_figure(adopt)
    assert first.machine.state.inner_step == LAST
    assert second.machine.state.inner_step == LAST - (STALL_TO - STALL_FROM)
    assert all(LAST // 3 - 1 <= pair.version(i) <= LAST // 3 for i in range(3))
    during = [r for r in pair.merges() if [m.learner_id for m in r.members] == [0]]
    assert {r.fragment_id for r in during} == {0, 1, 2}, "each fragment is merged once without learner 2"


@pytest.mark.parametrize("adopt", ["rebase", "overwrite"])
def test_learner_2_receives_every_fragment_that_it_missed_at_its_first_step(adopt):
    pair, first, second, waiting = run_figure(adopt)
    assert waiting[-1] == 3, "all fragments wait for it at the end of the stall"
    for node in (first, second):
        for i, fragment in enumerate(node.machine.state.fragments):
            assert fragment.held.n == pair.version(i)


def test_after_the_stall_learner_2_is_merged_again_and_nothing_is_lost():
    pair, first, second, _ = run_figure("rebase")
    for i in range(3):
        members = {m.learner_id for r in pair.merges(i)[-2:] for m in r.members}
        assert members == {0, 1}, "the one that comes later is carried into the next round"
    for node in (first, second):
        pair.leave(node)
    pair.settle()
    check_end(pair)
    assert all(sorted(pair.shadow(i)) == sorted(pair.tokens_of) for i in range(3))


def test_overwriting_loses_only_what_was_not_handed_over():
    pair, first, second, _ = run_figure("overwrite")
    for node in (first, second):
        pair.leave(node)
    pair.settle()
    check_end(pair)
    for learner_id in (0, 1):
        for i in range(3):
            ledger = pair.syncer.job.ledger
            assert set(pair.discarded(learner_id, i)) <= {"overwritten"}
            assert ledger.merged(learner_id, i) + ledger.discarded(learner_id, i) == ledger.tokens(learner_id)
