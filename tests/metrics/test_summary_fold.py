"""Every figure of `summary.json` on tapes whose figures can be told by hand."""

from __future__ import annotations

import pytest

from lightning_diloco.metrics import LedgerError
from lightning_diloco.protocol.records import BatchRecord
from tests.metrics.tape_builder import TapeBuilder, two_learner_run


def test_figures_of_a_run_with_a_death_a_pause_and_carried_work():
    summary = two_learner_run().summary()
    del summary["learners"]
    floats = {name: summary.pop(name) for name in ("goodput", "goodput_alive", "uptime", "mean_members")}
    useful_s = 16 + 12 * (1 - 15 / 35)
    assert floats == pytest.approx({"goodput": useful_s / 40, "goodput_alive": useful_s / 32.5, "uptime": 16 / 21, "mean_members": 1.6})
    by_reason = {r: 0 for r in ("overwritten", "died", "fenced", "nonfinite", "norm", "rollback", "drain")}
    assert summary == {
        "schema": 1,
        "status": "finished",
        "job_id": "j1",
        "config": {"outer_lr": 0.7},
        "versions": {"torch": "2"},
        "startup_s": 3.5,
        "wall_s": 21.0,
        "merges": 5,
        "tokens": 195,
        "tokens_merged": 180,
        "tokens_discarded": 15,
        "tokens_pending": 0,
        "discarded_by_reason": by_reason | {"died": 15},
        "fragments": [
            {"fragment_id": 0, "version": 2, "num_params": 30, "merged": 180, "pending": 0, "discarded": 15},
            {"fragment_id": 1, "version": 3, "num_params": 10, "merged": 180, "pending": 0, "discarded": 15},
        ],
        "bytes_up": 160 + 9 * 100,
        "bytes_down": 7 + 2 * 50 + 20,
        "val": {"val_loss": 1.25},
        "global_sha256": "ab",
        "restarts": {"learners": 1, "syncer": 0},
        "steps_lost": 3,
        "leases": None,
    }


def test_figures_of_the_learners_of_that_run():
    learners = two_learner_run().summary()["learners"]
    assert [learner.pop("batches") for learner in learners] == [[], []]
    assert learners[0] == pytest.approx(
        {
            "learner_id": 0,
            "incarnations": 1,
            "inner_steps": 16,
            "tokens": 160,
            "stall_s": 0.04,
            "stall_p99_s": 0.02,
            "step_median_s": 1.0,
            "rounds_merged": 4,
            "rounds_eligible": 4,
            "participation": 1.0,
            "batch_size": 4,
            "discarded": 0,
            "samples": None,
        }
    )
    assert learners[1] == pytest.approx(
        {
            "learner_id": 1,
            "incarnations": 2,
            "inner_steps": 7,
            "tokens": 35,
            "stall_s": 0.015,
            "stall_p99_s": 0.005,
            "step_median_s": 2.0,
            "rounds_merged": 4,
            "rounds_eligible": 5,
            "participation": 0.8,
            "batch_size": 4,
            "discarded": 15,
            "samples": None,
        }
    )


def test_choices_of_a_batch_are_told_the_first_one_and_the_last_ones():
    tape = TapeBuilder()
    tape.job()
    tape.join(0, batch_size=4)
    for step in range(25):
        tape.add(
            BatchRecord(learner_id=0, incarnation=0, inner_step=step, batch_size=5 + step, accumulate=2, lr_factor=1.5, reason=f"{step}")
        )
    (learner,) = tape.summary()["learners"]
    assert learner["batch_size"] == 29
    assert [choice["inner_step"] for choice in learner["batches"]] == [0, *range(6, 25)]
    assert learner["batches"][0] == {"inner_step": 0, "batch_size": 5, "accumulate": 2, "lr_factor": 1.5, "reason": "0"}


def test_nothing_is_defined_before_the_first_line():
    summary = TapeBuilder().summary()
    assert summary["status"] == "running"
    undefined = ("job_id", "startup_s", "wall_s", "mean_members", "goodput", "goodput_alive", "uptime", "val", "global_sha256")
    assert {name: summary[name] for name in undefined} == dict.fromkeys(undefined)
    counts = ("merges", "tokens", "tokens_merged", "tokens_discarded", "tokens_pending", "bytes_up", "bytes_down", "steps_lost")
    assert {name: summary[name] for name in counts} == dict.fromkeys(counts, 0)
    assert (summary["learners"], summary["fragments"], summary["restarts"]) == ([], [], {"learners": 0, "syncer": 0})


def test_a_learner_that_has_just_joined_has_no_shares():
    tape = TapeBuilder()
    tape.job()
    tape.join(0)
    summary = tape.summary()
    assert (summary["goodput"], summary["goodput_alive"], summary["uptime"], summary["wall_s"]) == (None, None, None, 0.0)
    learner = summary["learners"][0]
    assert (learner["participation"], learner["step_median_s"], learner["stall_p99_s"], learner["batch_size"]) == (None, None, None, 0)


def test_a_run_that_saw_no_first_join_leaves_its_time_to_the_one_before_or_to_the_tape():
    tape = TapeBuilder()
    tape.job()
    tape.now_s = 5.0
    tape.join(0)
    tape.run("stopped", startup_s=None)
    assert tape.summary()["startup_s"] == 5.0
    tape.run("stopped", startup_s=6.5)
    tape.run("finished", startup_s=None)
    assert (tape.summary()["startup_s"], tape.summary()["status"]) == (6.5, "finished")


def test_running_job_is_measured_to_the_last_line_or_to_now():
    tape = TapeBuilder()
    tape.job()
    tape.now_s = 5.0
    tape.join(0, batch_size=2)
    tape.now_s = 15.0
    tape.progress(0, 1, 10, (8.0,), last_step_age_s=2.0)
    assert tape.summary()["wall_s"] == 10.0
    assert tape.summary()["startup_s"] == 5.0
    assert tape.summary(now_t_s=21.0)["wall_s"] == 16.0
    assert tape.summary(now_t_s=21.0)["goodput"] == pytest.approx(0.5)


def test_status_is_the_run_records_then_the_ends_unless_told():
    tape = TapeBuilder()
    tape.job()
    tape.join(0)
    assert tape.summary()["status"] == "running"
    tape.end("stopped")
    assert tape.summary()["status"] == "stopped"
    assert tape.summary(status="running")["status"] == "running"
    assert not tape.fold().has_run_record
    tape.run("failed", val=None)
    assert tape.summary()["status"] == "failed"
    assert tape.summary()["val"] is None
    assert tape.fold().has_run_record


def test_tokens_are_weighted_by_parameters_and_rounded_down():
    tape = TapeBuilder()
    tape.job((30, 10))
    tape.join(0)
    tape.progress(0, 10, 101)
    tape.merge(0, [tape.contribute(0, 0, 5, 50)], (0,))
    tape.merge(1, [tape.contribute(0, 1, 9, 91)], (0,))
    tape.discard(0, 0, 3, "norm")
    tape.discard(0, 1, 2, "overwritten")
    summary = tape.summary()
    assert summary["tokens_merged"] == 60  # (30 * 50 + 10 * 91) / 40 = 60.25
    assert summary["tokens_discarded"] == 2  # (30 * 3 + 10 * 2) / 40 = 2.75
    assert summary["tokens_pending"] == 39
    assert summary["discarded_by_reason"]["norm"] == 2  # 2.25
    assert summary["discarded_by_reason"]["overwritten"] == 0  # 0.5
    assert summary["learners"][0]["discarded"] == 2
    assert [f["pending"] for f in summary["fragments"]] == [48, 8]


def test_versions_go_on_from_the_founding():
    tape = TapeBuilder()
    tape.job((30, 10), founded_n=(7, 4))
    tape.join(0)
    tape.progress(0, 1, 5)
    tape.merge(0, [tape.contribute(0, 0, 1, 5)], (0,))
    summary = tape.summary()
    assert [f["version"] for f in summary["fragments"]] == [8, 4]
    assert summary["merges"] == 1


def test_rolled_back_merges_are_taken_out_of_every_account():
    tape = TapeBuilder()
    tape.job((30, 10))
    tape.join(0)
    tape.progress(0, 10, 100)
    tape.merge(0, [tape.contribute(0, 0, 4, 40)], (0, 1))
    tape.merge(0, [tape.contribute(0, 0, 6, 60)], (0, 1))
    tape.merge(1, [tape.contribute(0, 1, 4, 40)], (0, 1))
    tape.end("failed")
    tape.restart((1, 1))
    tape.discard(0, 0, 60, "rollback")
    summary = tape.summary()
    assert summary["status"] == "running"
    assert summary["merges"] == 2
    assert [(f["version"], f["merged"], f["pending"], f["discarded"]) for f in summary["fragments"]] == [(1, 40, 0, 60), (1, 40, 60, 0)]
    assert (summary["learners"][0]["rounds_merged"], summary["learners"][0]["rounds_eligible"]) == (2, 2)


def test_contribution_merged_before_its_tokens_were_reported_leaves_nothing_pending():
    tape = TapeBuilder()
    tape.job((30, 10))
    tape.join(0)
    tape.progress(0, 2, 20)
    tape.merge(0, [tape.contribute(0, 0, 3, 30)], (0,))
    summary = tape.summary()
    assert summary["tokens"] == 30
    assert [f["pending"] for f in summary["fragments"]] == [0, 30]


def test_more_merged_than_trained_is_an_error_after_the_end_that_names_learner_and_fragment():
    tape = TapeBuilder()
    tape.job((30, 10))
    tape.join(3)
    tape.progress(3, 2, 20)
    tape.merge(1, [tape.contribute(3, 1, 3, 30)], (3,))
    tape.end()
    with pytest.raises(LedgerError, match=r"Learner 3, fragment 1: merged \+ discarded = 30 tokens, but .* only 20"):
        tape.summary()
    assert tape.summary(is_strict=False)["tokens"] == 30


def test_counters_of_a_dead_process_supersede_its_report_only_when_larger():
    tape = TapeBuilder()
    tape.job()
    tape.join(0)
    tape.progress(0, 5, 50)
    tape.counters(0, 7, 70)
    tape.join(0, 1)
    tape.progress(0, 5, 50, incarnation=1)
    tape.counters(0, 4, 40, incarnation=1)
    learner = tape.summary()["learners"][0]
    assert (learner["inner_steps"], learner["tokens"], learner["incarnations"]) == (12, 120, 2)


def test_steps_lost_are_counted_at_the_rate_of_the_life_that_died():
    tape = TapeBuilder()
    tape.job((30, 10))
    tape.join(0)
    tape.counters(0, 10, 100)
    tape.leave(0, reason="died")
    tape.discard(0, 0, 20)
    tape.discard(0, 1, 60)  # weighted: 30 tokens of 10 a step
    tape.discard(0, 1, 40, "norm")
    tape.join(0, 1)  # a life without tokens yet: what follows still belongs to the first one
    tape.discard(0, 0, 10)
    tape.discard(0, 1, 10)  # weighted: 10 more
    tape.progress(0, 10, 500, incarnation=1)
    tape.discard(0, 0, 100)
    tape.discard(0, 1, 100)  # weighted: 100 tokens of 50 a step
    assert tape.summary()["steps_lost"] == 4 + 2


def test_died_tokens_of_a_learner_that_never_reported_lose_no_known_steps():
    tape = TapeBuilder()
    tape.job()
    tape.join(0)
    tape.discard(0, 0, 20)
    assert tape.summary()["steps_lost"] == 0


def test_two_contributions_of_one_learner_in_a_merge_are_one_member():
    """Of two lives: what a dead one had handed over may be merged with the next one's work."""
    tape = TapeBuilder()
    tape.job((30, 10))
    tape.join(0)
    tape.progress(0, 4, 40, (1.0,) * 4)
    first = tape.contribute(0, 0, 4, 40, "carried")
    tape.leave(0, reason="died")
    tape.join(0, 1)
    tape.progress(0, 2, 20, (1.0,) * 2, incarnation=1)
    tape.merge(0, [first, tape.contribute(0, 0, 2, 20, incarnation=1)], (0,))
    assert tape.summary()["mean_members"] == 1.0
