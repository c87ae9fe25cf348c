"""The time that a step is to take: the median over the learners, once, and from steps that say something."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol.job import JobOptions
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.records import ProgressRecord
from lightning_diloco.protocol.step_target import WAIT_S, StepTarget


def told(target: StepTarget, members: list[Member], times_s: list[float], now_s: float, *, count: int = 10, paused_s: float = 0.0) -> None:
    """Each of the first learners, as many as there are times, tells so many steps."""
    for member, step_s in zip(members, times_s, strict=False):
        gaps = (5.0, 5.0, *(step_s + paused_s for _ in range(count - 2)))
        record = ProgressRecord(
            learner_id=member.learner_id,
            incarnation=0,
            inner_steps=count,
            tokens=count,
            step_gaps_s=gaps,
            paused_s=(0.0, 0.0, *(paused_s for _ in range(count - 2))) if paused_s else (),
        )
        target.told(member.learner_id, record, members, now_s)


def members(count: int) -> list[Member]:
    return [Member(i, 0, f"s{i}", "joined") for i in range(count)]


@pytest.mark.parametrize(("times_s", "expected"), [([0.1, 0.2, 0.9], 0.2), ([0.1, 0.3], 0.2), ([0.05, 0.05, 0.1, 0.4], 0.075)])
def test_it_is_the_median_without_the_first_steps(times_s, expected):
    target = StepTarget(JobOptions(job_id="j", lineage="l", num_slots=len(times_s)))
    everybody = members(len(times_s))
    told(target, everybody, times_s[:-1], 1.0)
    assert target.target_s == 0.0
    told(target, everybody[-1:], times_s[-1:], 1.0, count=9)
    assert target.target_s == 0.0
    told(target, everybody, times_s, 2.0)
    assert target.target_s == pytest.approx(expected)


def test_pauses_are_no_part_of_a_step():
    target = StepTarget(JobOptions(job_id="j", lineage="l", num_slots=1))
    told(target, members(1), [0.1], 1.0, paused_s=3.0)
    assert target.target_s == pytest.approx(0.1)


def test_it_stays_what_it_was():
    target = StepTarget(JobOptions(job_id="j", lineage="l", num_slots=1))
    told(target, members(1), [0.1], 1.0)
    told(target, members(1), [9.0], 2.0, count=40)
    assert target.target_s == pytest.approx(0.1)


@pytest.mark.parametrize("num_slots", [None, 3])
def test_who_does_not_come_is_not_waited_for_without_end(num_slots):
    target = StepTarget(JobOptions(job_id="j", lineage="l", num_slots=num_slots))
    everybody = members(1)
    told(target, everybody, [0.1], 1.0)
    assert target.target_s == 0.0
    told(target, everybody, [0.1], 1.0 + WAIT_S)
    assert target.target_s == pytest.approx(0.1)
