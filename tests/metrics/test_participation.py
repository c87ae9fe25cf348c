"""Members, eligibility and the sample under the medians."""

from __future__ import annotations

import random
import statistics

from lightning_diloco.metrics.participation import MergeLog
from lightning_diloco.metrics.sample import SortedSample
from lightning_diloco.protocol.identity import MergedThrough
from lightning_diloco.protocol.records import JobRecord, MergeRecord
from tests.metrics.tape_builder import TapeBuilder


def test_merges_of_buffers_count_nowhere():
    tape = TapeBuilder()
    tape.job((10,), buffers=4)
    tape.join(0)
    tape.progress(0, 1, 5)
    tape.merge(1, [tape.contribute(0, 1, 1, 5)], (0,))
    tape.discard(0, 1, 5)
    summary = tape.summary()
    assert (summary["merges"], summary["mean_members"], summary["tokens_discarded"]) == (0, None, 0)
    assert [f["fragment_id"] for f in summary["fragments"]] == [0]
    assert summary["learners"][0]["participation"] is None


def test_participation_counts_a_carried_contribution_in_the_merge_that_folds_it():
    tape = TapeBuilder()
    tape.job((10,))
    tape.join(0)
    tape.join(1)
    late = tape.contribute(1, 0, 1, 5, "carried")
    tape.merge(0, [tape.contribute(0, 0, 1, 5)], (0, 1))
    tape.merge(0, [late, tape.contribute(0, 0, 1, 5)], (0, 1))
    learners = tape.summary()["learners"]
    assert [x["participation"] for x in learners] == [1.0, 0.5]


def test_member_that_has_left_is_eligible_so_the_share_stays_below_one():
    tape = TapeBuilder()
    tape.job((10,))
    tape.join(0)
    final = tape.contribute(0, 0, 1, 5, "carried")
    tape.leave(0)
    tape.merge(0, [final], ())
    learner = tape.summary()["learners"][0]
    assert (learner["rounds_merged"], learner["rounds_eligible"], learner["participation"]) == (1, 1, 1.0)


def test_restart_of_an_empty_log_takes_nothing_out():
    log = MergeLog()
    log.restart({0: 3})
    assert (log.num_merges, log.mean_members(), log.merged_tokens(0, 0)) == (0, None, 0)


def test_what_a_restart_says_of_a_fragment_is_all_that_is_merged_in_it():
    """A full disk kept the line of the restart before off the tape, and with it that learner 0's merge was undone."""
    tape = TapeBuilder()
    tape.job((10, 10))
    tape.join(0)
    tape.join(1)
    tape.merge(0, [tape.contribute(0, 0, 1, 5)], (0,))
    tape.merge(1, [tape.contribute(0, 1, 1, 5)], (0,))
    log = MergeLog()
    for line in tape.lines:
        if isinstance(line.record, JobRecord):
            log.found(line.record.fragments)
        elif isinstance(line.record, MergeRecord):
            log.merge(line.record)
    log.restart({0: 1}, {0: {1: MergedThrough(1, 7)}})
    assert [(log.merged_tokens(0, p), log.merged_tokens(1, p)) for p in (0, 1)] == [(0, 7), (5, 0)], "fragment 1 is another shard's"


def test_sample_gives_exact_quantiles_in_any_order_of_arrival():
    rng = random.Random(3)
    values = [rng.random() for _ in range(1001)]
    sample = SortedSample()
    assert sample.median() is None
    assert sample.quantile(0.99) is None
    for i in range(0, 1001, 100):
        sample.extend(values[i : i + 100])
        assert sample.median() == statistics.median(values[: i + 100])
    assert sample.quantile(0.99) == sorted(values)[990]  # the 991st of 1001: 990 would be less than 99 %
    assert sample.quantile(1.0) == max(values)
    assert SortedSample.union([sample, sample]).median() == statistics.median(values)
