"""Options that were measured to be bad are told about before a run, hardly used learners after it; otherwise there is silence."""

from __future__ import annotations

import pytest

from lightning_diloco.config import SyncConfig
from lightning_diloco.strategy.advice import FEW_MERGES, FEW_ROUNDS, LOW_PARTICIPATION, SHORT_INTERVAL, advise, advise_before


def summary(*shares: float | None, eligible: int = 100) -> dict:
    rows = [
        {"learner_id": i, "participation": share, "rounds_eligible": eligible, "step_median_s": 0.0054} for i, share in enumerate(shares)
    ]
    return {"learners": rows, "config": {"min_quorum": 1, "overlap_steps": 2}}


def test_the_learner_that_was_in_the_fewest_merges_is_named_with_figure_and_remedy():
    (sentence,) = advise(summary(0.95, 0.61, 0.7))
    assert sentence.startswith("2 of 3 learners had a participation below 0.9; the lowest is learner 1, in 61 % of the merges")
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


def test_short_intervals_with_the_default_momentum_are_told_about_with_the_figures():
    (sentence,) = advise_before(SyncConfig(sync_interval_steps=SHORT_INTERVAL), 10_000)
    assert sentence.startswith(f"sync_interval_steps={SHORT_INTERVAL} with outer_lr=0.7 and outer_momentum=0.8: ")
    assert "1.49" in sentence and sentence.endswith("at 1.41, and an interval of 24 steps at 1.44. Pass these, or a longer interval.")
    (shorter,) = advise_before(SyncConfig(sync_interval_steps=SHORT_INTERVAL // 2), 10_000)
    assert shorter.endswith("an interval of 24 steps at 1.44. Pass a longer interval."), "what helps at 8 steps was bad at 4"


def test_constant_high_momentum_in_a_short_run_is_told_about():
    config = SyncConfig(outer_momentum_warmup=0)
    limit = FEW_MERGES * config.sync_interval_steps
    (sentence,) = advise_before(config, limit - 1)
    assert f"a run of {limit - 1} steps, {FEW_MERGES - 1} merges of a fragment" in sentence
    assert advise_before(config, limit) == []
    (nearly,) = advise_before(SyncConfig(outer_momentum=0.9, outer_momentum_warmup=1), limit - 1)
    assert nearly.startswith("outer_momentum=0.9 with outer_momentum_warmup=1 in a run of ")


def test_no_momentum_is_told_about_where_a_merge_goes_only_part_of_the_way():
    config = SyncConfig(outer_momentum=0.0)
    (sentence,) = advise_before(config, 10 * config.sync_interval_steps)
    assert sentence.startswith("outer_momentum=0 with outer_lr=0.7: ") and sentence.endswith("outer_momentum=0.8 at 1.43. Pass that.")
    assert advise_before(config, 10 * config.sync_interval_steps - 1) == []
    assert advise_before(SyncConfig(outer_momentum=0.0, outer_lr=1.0), 800) == []


def test_a_high_outer_rate_with_momentum_is_told_about():
    (sentence,) = advise_before(SyncConfig(outer_lr=1.0), 800)
    assert sentence.startswith("outer_lr=1 with outer_momentum=0.8: ") and sentence.endswith("0.7 at 1.43. Pass that.")
    assert advise_before(SyncConfig(outer_lr=0.9), 800) == [], "not measured"
    assert advise_before(SyncConfig(outer_lr=1.0, merge="mean"), 800) == [], "a mean is shorter than what learners did"
    (short,) = advise_before(SyncConfig(outer_lr=1.0, sync_interval_steps=SHORT_INTERVAL), 800)
    assert short.startswith("sync_interval_steps="), "one remedy, not two that differ"


def test_an_interval_that_leaves_few_merges_is_told_about_where_it_was_chosen():
    (sentence,) = advise_before(SyncConfig(sync_interval_steps=96), 800)
    assert sentence.startswith("sync_interval_steps=96 in a run of 800 steps: 8 merges of a fragment.") and "1.49" in sentence
    for interval, max_steps in ((24, 100), (96, 960), (96, -1), (96, 95)):
        assert advise_before(SyncConfig(sync_interval_steps=interval), max_steps) == []


def test_four_bits_without_feedback_are_told_about():
    (sentence,) = advise_before(SyncConfig(wire_dtype="int4", adopt="overwrite"), 800)
    assert sentence.startswith("wire_dtype='int4' with adopt='overwrite': ") and sentence.endswith("Pass that, or wire_dtype='bf16'.")
    for options in ({"wire_dtype": "int4"}, {"adopt": "overwrite"}):
        assert advise_before(SyncConfig(**options), 800) == []


@pytest.mark.parametrize(
    ("options", "max_steps"),
    [
        ({}, 100),
        ({"sync_interval_steps": SHORT_INTERVAL + 1}, 100),
        ({"sync_interval_steps": 8, "outer_lr": 0.4, "outer_momentum_warmup": 15}, 100),
        ({"sync_interval_steps": 1, "outer_lr": 1.0, "outer_momentum": 0.0}, 100),
        ({"outer_momentum_warmup": 0, "outer_momentum": 0.6}, 100),
        ({"outer_momentum_warmup": 0}, -1),
        ({"sync_interval_steps": 8, "outer_momentum_warmup": 100}, 800),
        ({"sync_interval_steps": 8}, 16),
    ],
    ids=["defaults", "long enough", "the remedy", "no momentum", "low momentum", "length not known", "slow warm-up", "two merges"],
)
def test_options_with_nothing_to_say_about_are_silent(options, max_steps):
    assert advise_before(SyncConfig(**options), max_steps) == []
