"""What a running job is doing now, from its tape: rates, staleness, members, refusals, and what went wrong last."""

from __future__ import annotations

import pytest

from lightning_diloco.metrics.present import NUM_STALENESS, WINDOW_S, PresentFold
from tests.metrics.tape_builder import TapeBuilder, two_learner_run


def present(tape: TapeBuilder) -> PresentFold:
    fold = PresentFold()
    for line in tape.lines:
        fold.feed(line)
    return fold


def job_with(*learners: int, **fields: object) -> TapeBuilder:
    tape = TapeBuilder()
    tape.job((10,), buffers=4, **fields)
    for learner in learners:
        tape.join(learner)
    return tape


def test_a_rate_is_that_of_the_window():
    tape = job_with(0)
    for second in range(1, 101):
        tape.now_s = float(second)
        tape.progress(0, 2 * min(second, 50) + 4 * max(0, second - 50), 10 * second)
    learner = present(tape).learners()[0]
    assert learner.steps_per_s == pytest.approx(4.0) and learner.tokens_per_s == pytest.approx(10.0)
    assert learner.inner_step == 300


def test_a_learner_that_reports_and_does_not_step_falls_to_zero():
    tape = job_with(0)
    tape.progress(0, 50, 500)
    for second in range(1, int(2 * WINDOW_S)):
        tape.now_s = float(second)
        tape.progress(0, 50, 500)
    assert present(tape).learners()[0].steps_per_s == 0.0


def test_one_that_has_left_has_no_rate_and_keeps_its_step():
    tape = job_with()
    tape.join(3, job_step=40)
    tape.now_s = 1.0
    tape.progress(3, 5, 50)
    fold = present(tape)
    assert fold.num_members == 1 and fold.learners()[3].inner_step == 45
    tape.leave(3)
    fold = present(tape)
    learner = fold.learners()[3]
    assert fold.num_members == 0 and not learner.is_member
    assert (learner.steps_per_s, learner.inner_step, learner.fault) == (None, 45, None)


def test_a_word_of_an_ended_life_says_nothing_of_the_next_one():
    tape = job_with(0)
    tape.leave(0, reason="died")
    tape.now_s = 2.0
    tape.join(0, 1)
    tape.progress(0, 70, 700, incarnation=0)
    tape.leave(0, 0, reason="fenced")
    fold = present(tape)
    assert fold.num_members == 1 and fold.learners()[0].inner_step == 0
    assert fold.learners()[0].fault == ("life 0 ended: fenced", 2.0)


def test_staleness_counts_versions_between_base_and_merge():
    tape = job_with(0, 1)
    late = tape.contribute(1, 0, 1, 5, "carried")
    tape.merge(0, [tape.contribute(0, 0, 1, 5)], (0, 1))
    tape.merge(0, [tape.contribute(0, 0, 1, 5)], (0, 1))
    tape.merge(0, [late], (0, 1))
    learners = present(tape).learners()
    assert (learners[0].staleness_versions, learners[1].staleness_versions) == (0.0, 2.0)
    for _ in range(NUM_STALENESS):
        tape.merge(0, [tape.contribute(1, 0, 1, 5)], (0, 1))
    assert present(tape).learners()[1].staleness_versions == 0.0, "it is that of the last ones"


def test_staleness_leaves_out_running_statistics_and_what_a_restart_has_lost():
    tape = job_with(0)
    tape.merge(1, [tape.contribute(0, 1, 1, 5)], (0,))
    held = tape.contribute(0, 0, 1, 5)
    tape.restart((0, 1))
    tape.merge(0, [held], (0,))
    fold = present(tape)
    assert fold.learners()[0].staleness_versions is None and fold.epoch == 1


def test_refusals_are_counted_and_the_last_one_is_named():
    tape = job_with(0)
    tape.contribute(0, 0, 1, 5, "refused", reason="norm")
    tape.now_s = 7.0
    tape.contribute(0, 0, 1, 5, "refused", reason="norm")
    tape.contribute(0, 0, 1, 5, "refused", reason="overlap")
    fold = present(tape)
    assert fold.refused == {"norm": 2, "overlap": 1}
    assert fold.learners()[0].fault == ("contribution to fragment 0 refused: overlap", 7.0)


def test_bytes_of_the_learners_are_those_of_the_summary():
    tape = two_learner_run()
    learners, summary = present(tape).learners().values(), tape.summary()
    assert sum(x.bytes_up for x in learners) == summary["bytes_up"]
    assert sum(x.bytes_down for x in learners) == summary["bytes_down"]


def test_only_who_joined_is_shown():
    tape = TapeBuilder()
    tape.job((10,))
    assert present(tape).learners() == {}
