"""What a user should know of a job, before it starts by its options and after it by its figures: sentences with the figure and the remedy.

**Before.** Momentum counts merges. A merge of few steps is small and there are many of them, so the same momentum moves further for the
steps done; a short run ends before constant high momentum has settled. What rounding to four bits takes is sent later by rebase alone.
Each rule names what it cost where it was measured (``docs/benchmarks/ablation.md``, ``docs/numerics.md``): a hint of its size, for another
model it differs. A run that is to end by epochs has no length before its data are there: a learner tells the rest then (`advise_late`).
Not told about before is what depends on how a run goes: whether a quorum of one leaves learners out (it is told after), and a schedule on
a learner's own clock, which costs only who comes late.

**After.** Nobody looks at participation when all processes are alive and the loss falls, and a job whose merges hold half of the learners
wastes the other half's work for an interval each time, or worse: with outer momentum, contributions that learned the same thing and arrive
one after the other add up instead of being averaged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import Layout, momentum_at

__all__ = ["advise", "advise_before", "advise_late", "tell_fragments", "warn"]

_log = logging.getLogger(__name__)

LOW_PARTICIPATION = 0.9
"""Below it a learner is told about. Two equal learners that answer in time have 1.0, one that is always late about 0.5. Four of which the
lowest had 0.77 to 0.84, with a quorum of one, ended 4 % behind four that are waited for (``docs/benchmarks/ablation.md``, three seeds)."""
FEW_ROUNDS = 20
"""Of fewer merges a share says little."""
HIGH_MOMENTUM = 0.75
LOW_LR = 0.3
"""An outer rate that was measured as too little, with an interval of 24 steps."""
HIGH_LR = 1.0
"""An outer rate that was measured as too much together with momentum."""
SOME_MOMENTUM = 0.5
"""Up to it a high outer rate is not told about: that was not measured."""
SHORT_INTERVAL = 8
"""Inner steps between merges of a fragment, at and below which an outer rate of 0.7 and a momentum of 0.8 were measured as too much."""
FAR = 1.0
"""What momentum makes of the outer rate in the end, outer_lr / (1 - momentum), for an inner step of the interval. 1.0 was measured as too
much (4 steps, 0.4 and 0.9), 0.6 was not (4 steps, 0.3 and 0.87), and the defaults have 0.15."""
FEW_MERGES = 100
"""Merges of a fragment in a run, below which high momentum from the beginning is told about. It was measured as bad with 33."""
EARLY_MERGE = 5
"""Momentum is high from the beginning if it is at this merge of a fragment."""
SOME_MERGES = 10
"""Of fewer merges a fragment has no momentum to speak of."""


def advise_before(config: SyncConfig, max_steps: int) -> list[str]:
    """Sentences about options that measurements show to be bad.

    Args:
        config: of the job.
        max_steps: inner steps of a learner; -1: not known.

    Returns:
        One sentence for each; none for the defaults.
    """
    sentences = []
    interval, momentum = config.sync_interval_steps, config.outer_momentum
    merges = FEW_MERGES if max_steps < 0 else max_steps // interval
    reached = momentum_at(max(1, merges), momentum, config.outer_momentum_warmup)
    if interval <= SHORT_INTERVAL and reached > HIGH_MOMENTUM and config.outer_lr > 0.5:
        sentences.append(
            f"sync_interval_steps={interval} with outer_lr={config.outer_lr:g} and outer_momentum={momentum:g}: momentum counts merges, "
            "and with short intervals there are many. With 8 steps, 0.7 and at most 0.8 ended at a loss of 1.49; outer_lr=0.4 with "
            "outer_momentum=0.7 and outer_momentum_warmup=15 at 1.41, and an interval of 24 steps at 1.44. "
            f"Pass {'these, or ' if interval == SHORT_INTERVAL else ''}a longer interval."
        )
    elif reached > SOME_MOMENTUM and config.outer_lr / (1.0 - reached) >= FAR * interval:
        sentences.append(
            f"sync_interval_steps={interval} with outer_lr={config.outer_lr:g} and outer_momentum={momentum:g}: momentum counts merges, "
            "and with short intervals there are many. With 4 steps, 0.4 and 0.9 ended at a loss of 1.59, and the defaults, with an "
            "interval of 24 steps, at 1.45. Pass a longer interval, or a smaller outer_lr."
        )
    if momentum_at(EARLY_MERGE, momentum, config.outer_momentum_warmup) > HIGH_MOMENTUM and merges < FEW_MERGES:
        sentences.append(
            f"outer_momentum={momentum:g} with outer_momentum_warmup={config.outer_momentum_warmup} in a run of {max_steps} steps, "
            f"{merges} merges of a fragment: "
            "with 33 merges, constant 0.9 ended at a loss of 1.58, constant 0.6 at 1.44, and outer_momentum_warmup=10 at 1.43. "
            "Pass one of these."
        )
    if momentum == 0.0 and config.outer_lr < 1.0 and merges >= SOME_MERGES:
        sentences.append(
            f"outer_momentum=0 with outer_lr={config.outer_lr:g}: a merge goes only so far of what the learners did, and nothing makes up "
            "for it. With 33 merges and 0.7 that ended at a loss of 1.49, and the default outer_momentum=0.8 at 1.43. Pass that."
        )
    if config.outer_lr >= HIGH_LR and reached > SOME_MOMENTUM and config.merge == "rda" and interval > SHORT_INTERVAL:
        sentences.append(
            f"outer_lr={config.outer_lr:g} with outer_momentum={momentum:g}: a merge goes as far as learners did, and momentum further. "
            "With 33 merges, 1.0 ended at a loss of 1.51, and 0.7 at 1.43. Pass that."
        )
    if 0.0 < momentum and config.outer_lr <= LOW_LR and interval > SHORT_INTERVAL and merges >= SOME_MERGES:
        sentences.append(
            f"outer_lr={config.outer_lr:g} with sync_interval_steps={interval}: a merge goes only so far of what the learners did. "
            "With 33 merges, 0.3 ended at a loss of 1.48, and 0.7 at 1.43. Pass that."
        )
    if interval > SyncConfig().sync_interval_steps and merges < SOME_MERGES and max_steps > 0:
        sentences.append(
            f"sync_interval_steps={interval} in a run of {max_steps} steps: {merges} merges of a fragment. With 8 of them (96 in 800) "
            "that ended at a loss of 1.49, and with 33 (24 in 800) at 1.43. Pass a shorter interval."
        )
    if config.wire_dtype == "int4" and config.adopt == "overwrite":
        sentences.append(
            "wire_dtype='int4' with adopt='overwrite': what rounding takes from a contribution is lost, and it adds up: to 9.5 % of the "
            "way after 100 rounds at random, and to 1.3 % with adopt='rebase', which sends it later. Pass that, or wire_dtype='bf16'."
        )
    return sentences


def advise_late(config: SyncConfig, trainer: pl.Trainer) -> list[str]:
    """What `advise_before` could not say yet of a run that is to end by epochs.

    Args:
        config: of the job.
        trainer: whose training data are set up.
    """
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if trainer.max_steps >= 0 or epochs is None or epochs < 0 or not math.isfinite(batches):
        return []
    num_steps = epochs * math.ceil(batches / trainer.accumulate_grad_batches)
    told = advise_before(config, trainer.max_steps)
    return [sentence for sentence in advise_before(config, num_steps) if sentence not in told]


def tell_fragments(config: SyncConfig, layout: Layout) -> None:
    """Say how many fragments there are if the model has fewer tensors than were asked for.

    Args:
        config: of the job.
        layout: of the model.
    """
    effective = sum(not fragment.holds_values for fragment in layout.fragments)
    if effective < config.num_fragments:
        rank_zero_info(f"num_fragments={config.num_fragments}, but the model has {effective} tensors to merge: {effective} are used.")


def warn(sentences: Iterable[str]) -> None:
    """Log each of them as a warning."""
    for sentence in sentences:
        _log.warning("%s", sentence)


def advise(summary: Mapping[str, Any]) -> list[str]:
    """Sentences about the figures of one run.

    Args:
        summary: the content of ``summary.json``; may be empty.

    Returns:
        One sentence for each thing to know; none for a run with nothing to say about.
    """
    learners = summary.get("learners", [])
    late = [row for row in learners if row["rounds_eligible"] >= FEW_ROUNDS and row["participation"] < LOW_PARTICIPATION]
    if not late:
        return []
    worst, config = min(late, key=lambda row: row["participation"]), summary["config"]
    quorum, overlap = config["min_quorum"], config["overlap_steps"]
    pace = "" if worst["step_median_s"] is None else f", with steps of {1e3 * worst['step_median_s']:.1f} ms"
    longer = f"overlap_steps={2 * max(1, overlap)}, so that answers have more time."
    remedy = (
        f"Pass {longer}"
        if quorum >= len(learners)
        else f"Pass min_quorum={len(learners)}, so that a merge waits for all learners that are active (four of which the lowest had "
        f"77 to 84 % ended at a loss 4 % above four that were waited for), or {longer}"
    )
    return [
        f"{len(late)} of {len(learners)} learners had a participation below {LOW_PARTICIPATION:g}; the lowest is learner "
        f"{worst['learner_id']}, in {100 * worst['participation']:.0f} % of the merges it could have been in{pace}. A merge waits for "
        f"min_quorum={quorum} contributions and then for the grace window, which is 0 where answers take more than "
        f"overlap_steps={overlap} steps. {remedy}"
    ]
