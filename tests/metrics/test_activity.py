"""Step times, presence, goodput and uptime where the arithmetic can be done by hand."""

from __future__ import annotations

import pytest

from lightning_diloco.metrics.activity import union_length_s
from tests.metrics.tape_builder import TapeBuilder


def started(*learners: int, num_slots: int | None = None) -> TapeBuilder:
    tape = TapeBuilder()
    tape.job(num_slots=num_slots)
    for learner in learners:
        tape.join(learner)
    return tape


def test_union_counts_overlaps_once_and_cuts_at_the_ends():
    assert union_length_s([(0, 2), (1, 3), (5, 6), (5.5, 5.7), (9, 8)], 0.5, 5.9) == pytest.approx(2.5 + 0.9)
    assert union_length_s([], 0, 1) == 0


def test_configured_slot_that_never_joined_counts_from_t0():
    tape = started(0, num_slots=3)
    tape.now_s = 10.0
    tape.progress(0, 9, 90, (1.0,) * 9)
    assert tape.summary()["goodput"] == pytest.approx(9 / 30)
    assert tape.summary()["goodput_alive"] == pytest.approx(9 / 10)


def test_open_number_of_slots_counts_each_learner_from_its_join():
    tape = started(0)
    tape.now_s = 6.0
    tape.join(5)
    tape.now_s = 10.0
    tape.progress(0, 10, 90, (1.0,) * 10)
    tape.progress(5, 2, 20, (1.0,) * 2)
    assert tape.summary()["goodput"] == pytest.approx(12 / 14)


def test_pauses_and_absence_are_no_step_time():
    tape = started(0)
    tape.now_s = 10.0
    tape.progress(0, 2, 20, (4.0, 6.0), paused_s=(1.0, 7.0))  # a pause cannot exceed its gap
    assert tape.summary()["goodput"] == pytest.approx(3 / 10)
    assert tape.summary()["learners"][0]["step_median_s"] == pytest.approx(1.5)


def test_jitter_cannot_lift_goodput_above_one():
    tape = started(0)
    tape.now_s = 10.0
    tape.progress(0, 10, 90, (1.001,) * 10)
    assert tape.summary()["goodput"] == 1.0


def test_presence_of_overlapping_lives_counts_once():
    tape = started(0)
    tape.now_s = 4.0
    tape.join(0, 1)  # took over
    tape.now_s = 6.0
    tape.leave(0, 0, "fenced")
    tape.leave(0, 0, "fenced")  # said twice, counted once
    tape.now_s = 10.0
    tape.progress(0, 5, 5, (1.0,) * 5, incarnation=1)
    assert tape.summary()["goodput_alive"] == pytest.approx(5 / 10)


def test_life_that_was_taken_for_dead_and_spoke_again_is_one_life_with_a_hole():
    tape = started(0)
    tape.now_s = 4.0
    tape.progress(0, 4, 40, (1.0,) * 4)
    tape.leave(0, 0, "died")
    tape.now_s = 8.0
    tape.join(0)
    tape.now_s = 10.0
    tape.progress(0, 6, 60, (5.0, 1.0))
    summary = tape.summary()
    assert summary["learners"][0]["incarnations"] == 1
    assert summary["goodput_alive"] == 1.0  # 10 s of steps over 6 s of membership, cut
    assert summary["uptime"] == pytest.approx(5 / 10)  # 0..4 and 9..10; the gap of 5 s is longer than 3 medians


def test_uptime_takes_gaps_up_to_three_medians_or_one_second():
    tape = started(0)
    tape.now_s = 40.0
    tape.progress(0, 8, 8, (2.0, 2.0, 2.0, 6.0, 6.1, 2.0, 2.0, 2.0), last_step_age_s=10.0)
    # Gaps walk back from 30: the first one starts at 5.9 by its lengths, at the join by the rule.
    assert tape.summary()["uptime"] == pytest.approx((30 - 6.1) / 40)
    quick = started(0)
    quick.now_s = 1.3
    quick.progress(0, 4, 4, (0.1, 1.0, 0.1, 0.1))
    assert quick.summary()["uptime"] == pytest.approx(1.0)


def test_jitter_of_transmission_leaves_no_hole_between_two_reports():
    tape = started(0)
    tape.now_s = 2.0
    tape.progress(0, 4, 4, (0.5,) * 4)
    tape.now_s = 4.2  # 0.2 s late
    tape.progress(0, 8, 8, (0.5,) * 4)
    tape.now_s = 6.0
    tape.progress(0, 12, 12, (0.5,) * 4)
    assert tape.summary()["uptime"] == pytest.approx(1.0)


def test_a_step_that_is_counted_late_leaves_no_hole_in_reports_that_come_late():
    tape = started(0)
    tape.now_s = 2.0
    tape.progress(0, 4, 4, (0.5,) * 4)
    tape.now_s = 30.0  # the syncer was away; what was told meanwhile comes at once
    tape.progress(0, 7, 7, (0.5,) * 4)  # the fourth step's boundary found the exchange busy
    tape.progress(0, 12, 12, (0.5,) * 4)
    assert tape.summary()["uptime"] == pytest.approx(1.0)


def test_missing_report_leaves_a_hole():
    tape = started(0)
    tape.now_s = 2.0
    tape.progress(0, 4, 4, (0.5,) * 4)
    tape.now_s = 6.0
    tape.progress(0, 12, 12, (0.5,) * 4, first_gap=8)  # steps 5 to 8 were never reported one by one
    assert tape.summary()["uptime"] == pytest.approx(4 / 6)
    assert tape.summary()["learners"][0]["inner_steps"] == 12


def test_steps_without_gaps_are_a_hole_until_their_gaps_are_told():
    tape = started(0)
    tape.now_s = 4.0
    tape.progress(0, 4, 4)
    tape.now_s = 5.0
    assert tape.summary()["uptime"] == 0.0
    tape.progress(0, 5, 5, (1.0,) * 5)
    assert tape.summary()["uptime"] == pytest.approx(1.0)


def test_report_of_a_process_that_never_joined_enters_no_list():
    tape = TapeBuilder()
    tape.job()
    tape.now_s = 1.0
    tape.progress(4, 2, 2, (0.5, 0.5))
    tape.leave(4)
    assert tape.summary()["learners"] == []
    assert tape.summary()["goodput"] is None
    tape.join(0)
    tape.now_s = 3.0
    tape.progress(0, 2, 2, (1.0, 1.0))
    assert tape.summary()["tokens"] == 2
    assert tape.summary()["goodput"] == pytest.approx(1.0)
