"""A run whose learners were hardly in its merges says so; one with nothing to say about is silent."""

from __future__ import annotations

import pytest

from lightning_diloco.strategy.advice import FEW_ROUNDS, LOW_PARTICIPATION, advise


def summary(*shares: float | None, eligible: int = 100) -> dict:
    rows = [
        {"learner_id": i, "participation": share, "rounds_eligible": eligible, "step_median_s": 0.0054} for i, share in enumerate(shares)
    ]
    return {"learners": rows, "config": {"min_quorum": 1, "overlap_steps": 2}}


def test_the_learner_that_was_in_the_fewest_merges_is_named_with_figure_and_remedy():
    (sentence,) = advise(summary(0.95, 0.61, 0.7))
    assert sentence.startswith("2 of 3 learners had a participation below 0.8; the lowest is learner 1, in 61 % of the merges")
    for part in ("5.4 ms", "min_quorum=1", "overlap_steps=2"):
        assert part in sentence
    assert sentence.endswith(
        "Pass min_quorum=3, so that a merge waits for all learners that are active, or overlap_steps=4, so that answers have more time."
    )


def test_what_is_not_known_or_is_at_its_limit_is_left_out():
    figures = summary(0.61, 0.7)
    figures["learners"][0]["step_median_s"], figures["config"]["min_quorum"] = None, 2
    (sentence,) = advise(figures)
    assert " ms" not in sentence and sentence.endswith("2 steps. Pass overlap_steps=4, so that answers have more time.")


@pytest.mark.parametrize(
    "silent",
    [summary(1.0, LOW_PARTICIPATION), summary(0.1, eligible=FEW_ROUNDS - 1), summary(None, eligible=0), {}],
    ids=["enough", "few rounds", "no round", "no summary"],
)
def test_a_run_with_nothing_to_say_about_is_silent(silent):
    assert advise(silent) == []
