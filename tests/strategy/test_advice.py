"""Options that were measured to be bad are told about before a run, hardly used learners after it; otherwise there is silence."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lightning_diloco.config import SyncConfig
from lightning_diloco.strategy.advice import (
    FEW_MERGES,
    FEW_ROUNDS,
    LOW_PARTICIPATION,
    SHORT_INTERVAL,
    advise,
    advise_before,
    advise_late,
)


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
        "Pass min_quorum=3, so that a merge waits for all learners that are active (four of which the lowest had 77 to 84 % ended at a "
        "loss 4 % above four that were waited for), or overlap_steps=4, so that answers have more time."
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
    (none,) = advise_before(SyncConfig(sync_interval_steps=1000), 800)
    assert "800 steps: 0 merges of a fragment" in none
    for interval, max_steps in ((24, 100), (96, 960), (96, -1), (96, 0)):
        assert advise_before(SyncConfig(sync_interval_steps=interval), max_steps) == []


def test_four_steps_between_merges_with_high_momentum_are_told_about_at_a_low_rate_too():
    (sentence,) = advise_before(SyncConfig(sync_interval_steps=4, outer_lr=0.4, outer_momentum=0.9, outer_momentum_warmup=20), 800)
    assert sentence.startswith("sync_interval_steps=4 with outer_lr=0.4 and outer_momentum=0.9: ") and "at a loss of 1.59" in sentence
    fine = SyncConfig(sync_interval_steps=4, outer_lr=0.3, outer_momentum=0.9, outer_momentum_warmup=30)
    assert advise_before(fine, 800) == [], "measured as good as the defaults"


def test_a_low_outer_rate_is_told_about_with_an_interval_at_which_it_was_measured():
    (sentence,) = advise_before(SyncConfig(outer_lr=0.3), 800)
    assert sentence.startswith("outer_lr=0.3 with sync_interval_steps=24: ") and sentence.endswith("0.7 at 1.43. Pass that.")
    for config in (SyncConfig(outer_lr=0.5), SyncConfig(outer_lr=0.3, sync_interval_steps=8, outer_momentum=0.7)):
        assert advise_before(config, 800) == []


@dataclass
class Trainer:
    """What of a Trainer tells how long a run is."""

    max_steps: int = -1
    max_epochs: int | None = 2
    num_training_batches: float = 400
    accumulate_grad_batches: int = 1


def test_a_run_that_ends_by_epochs_is_told_about_when_its_length_is_known():
    config = SyncConfig(outer_momentum_warmup=0, wire_dtype="int4", adopt="overwrite")
    assert len(advise_before(config, -1)) == 1, "four bits without feedback, told already"
    (sentence,) = advise_late(config, Trainer())
    assert sentence.startswith("outer_momentum=0.8 with outer_momentum_warmup=0 in a run of 800 steps, 33 merges of a fragment")
    assert "in a run of 400 steps" in advise_late(config, Trainer(accumulate_grad_batches=2))[0]
    for silent in (Trainer(max_steps=800), Trainer(max_epochs=-1), Trainer(max_epochs=20), Trainer(num_training_batches=float("inf"))):
        assert advise_late(config, silent) == []


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
