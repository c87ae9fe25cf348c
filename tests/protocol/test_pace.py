"""Pace on its own: offsets, the limit per step, outages, joiners, and learners that report in turn."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diloco.protocol.pace import Pace


def drive(pace: Pace, steps: dict[int, int], order: list[int], count: int, quorum: int = 1) -> list[tuple[int, int]]:
    """Let the learners do `count` steps each, reporting in this order; returns (step of the first one, fragment) of each opening."""
    opened = []
    for _ in range(count):
        for learner in order:
            steps[learner] += 1
            for fragment_id in pace.due(dict(steps), quorum):
                if pace.allowance <= 0:
                    break
                pace.opened(fragment_id, dict(steps))
                opened.append((steps[order[0]], fragment_id))
    return opened


def test_first_rounds_are_spread_over_the_interval():
    pace = Pace(num_fragments=4, sync_interval_steps=8)
    pace.admit(0, 0, staggered=True)
    opened = drive(pace, {0: 0}, [0], 24)
    assert [s for s, p in opened if p == 0] == [1, 9, 17]
    for p in (1, 2, 3):
        assert [s for s, q in opened if q == p] == [2 * p, 2 * p + 8, 2 * p + 16]


def two_learners(pace: Pace) -> dict[int, int]:
    """As in a job: the first step of one makes it active, the other one comes a moment later. Returns their counters."""
    pace.admit(0, 0, staggered=True)
    drive(pace, {0: 0}, [0], 1)
    pace.admit(1, 1, staggered=False)
    return {0: 1, 1: 1}


@pytest.mark.parametrize(("num_fragments", "interval"), [(24, 24), (7, 3), (3, 7), (1, 1), (100, 6)])
def test_no_step_opens_more_than_its_share_and_one(num_fragments, interval):
    pace = Pace(num_fragments=num_fragments, sync_interval_steps=interval)
    pace.admit(0, 0, staggered=True)
    opened = drive(pace, {0: 0}, [0], 10 * interval)
    per_step = Counter(s for s, _ in opened)
    assert max(per_step.values()) <= -(-num_fragments // interval) + 1
    assert set(Counter(p for _, p in opened).values()) <= {9, 10}
    assert {p for _, p in opened} == set(range(num_fragments))


@pytest.mark.parametrize("interval", [1, 2, 4, 24])
@pytest.mark.parametrize("quorum", [1, 2])
def test_two_equal_learners_that_report_in_turn_do_not_raise_the_rate(interval, quorum):
    pace = Pace(num_fragments=1, sync_interval_steps=interval)
    steps = two_learners(pace)
    opened = [s for s, _ in drive(pace, steps, [0, 1], 10 * interval, quorum)]
    assert opened == [1 + interval * i for i in range(1, 11)]


def test_a_learner_that_reports_before_the_other_from_now_on_does_not_raise_the_rate():
    pace = Pace(num_fragments=1, sync_interval_steps=4)
    steps = two_learners(pace)
    first = [s for s, _ in drive(pace, steps, [0, 1], 16)]
    second = [s for s, _ in drive(pace, steps, [1, 0], 16)]
    assert first + second == [5, 9, 13, 17, 21, 25, 29, 33]


def test_with_a_full_quorum_the_slowest_learner_sets_the_pace():
    pace = Pace(num_fragments=1, sync_interval_steps=4)
    steps = two_learners(pace)
    opened = []
    for t in range(1, 49):
        steps[0] += 1
        if t % 3 == 0:
            steps[1] += 1
        for fragment_id in pace.due(dict(steps), 2):
            pace.opened(fragment_id, dict(steps))
            opened.append(steps[1])
    assert opened == [5, 9, 13, 17]


def test_most_overdue_fragment_goes_first():
    pace = Pace(num_fragments=3, sync_interval_steps=3)
    pace.admit(0, 0, staggered=True)
    assert pace.due({0: 2}, 1) == [0, 1, 2]
    pace.opened(0, {0: 2})
    assert pace.due({0: 4}, 1) == [1, 2]


def test_unused_rounds_do_not_pile_up():
    pace = Pace(num_fragments=24, sync_interval_steps=24)
    pace.admit(0, 0, staggered=True)
    for step in range(1, 24):
        pace.due({0: step}, 1)
    assert pace.allowance == 2


def test_an_interval_that_nobody_saw_does_not_send_the_whole_model_at_once():
    pace = Pace(num_fragments=24, sync_interval_steps=24)
    pace.admit(0, 0, staggered=True)
    steps = {0: 0}
    drive(pace, steps, [0], 48)
    steps[0] += 500
    per_step = Counter(s for s, _ in drive(pace, steps, [0], 60))
    assert max(per_step.values()) == 2
    assert sum(per_step.values()) >= 48


def test_an_outage_staggers_the_rounds_anew():
    pace = Pace(num_fragments=4, sync_interval_steps=8)
    pace.admit(0, 0, staggered=True)
    steps = {0: 0}
    drive(pace, steps, [0], 30)
    pace.remove(0)
    steps[0] = 1000
    pace.admit(0, 1000, staggered=True)
    assert drive(pace, steps, [0], 8) == [(1001, 0), (1002, 1), (1004, 2), (1006, 3)]


def test_a_joiner_changes_neither_the_pace_nor_the_spread():
    pace = Pace(num_fragments=4, sync_interval_steps=8)
    pace.admit(0, 0, staggered=True)
    steps = {0: 0}
    drive(pace, steps, [0], 20)
    pace.admit(1, 0, staggered=False)
    steps[1] = 0
    opened = drive(pace, steps, [0, 1], 16, quorum=2)
    assert max(Counter(s for s, _ in opened).values()) == 1
    assert Counter(p for _, p in opened) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_rounds_go_on_when_the_leader_is_removed():
    pace = Pace(num_fragments=1, sync_interval_steps=4)
    steps = two_learners(pace)
    drive(pace, steps, [0], 400)
    pace.remove(0)
    assert [s for s, _ in drive(pace, {1: 1}, [1], 16)] == [6, 10, 14]


def test_rounds_go_on_while_the_leader_rests_and_it_keeps_its_place():
    pace = Pace(num_fragments=1, sync_interval_steps=4)
    steps = two_learners(pace)
    drive(pace, steps, [0], 400)
    slow = {1: 1}
    assert [s for s, _ in drive(pace, slow, [1], 16)] == [6, 10, 14]
    steps[1] = slow[1]
    opened = [s for s, _ in drive(pace, steps, [0, 1], 12)]
    assert len(opened) == 3, "neither a burst nor a gap when it is back"


def test_validation_of_the_only_learner_does_not_begin_the_spread_anew():
    pace = Pace(num_fragments=4, sync_interval_steps=8)
    pace.admit(0, 0, staggered=True)
    steps = {0: 0}
    opened = []
    for _ in range(16):
        opened += drive(pace, steps, [0], 3)
        pace.due({}, 1)
    assert Counter(p for _, p in opened) == {0: 6, 1: 6, 2: 6, 3: 6}


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["step", "step", "step", "ask", "leave", "come", "rest", "wake"]), st.integers(0, 3), st.integers(1, 3)),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(operations=OPERATIONS, interval=st.integers(1, 12), num_fragments=st.integers(1, 5), min_quorum=st.integers(1, 3))
def test_what_is_remembered_between_events_never_changes_the_answer(operations, interval, num_fragments, min_quorum):
    pace = Pace(num_fragments=num_fragments, sync_interval_steps=interval)
    steps: dict[int, int] = {}
    resting: set[int] = set()
    for what, learner, number in operations:
        if what == "come" and learner not in steps:
            steps[learner] = 20 * number
            pace.admit(learner, 20 * number, staggered=len(steps) == 1)
        elif what == "leave" and steps.pop(learner, None) is not None:
            resting.discard(learner)
            pace.remove(learner)
        elif what == "step" and learner in steps and learner not in resting:
            steps[learner] += number
        elif what in ("rest", "wake"):
            (resting.add if what == "rest" and learner in steps else resting.discard)(learner)
        active = {i: step for i, step in steps.items() if i not in resting}
        quorum = max(1, min(number if what == "ask" else min_quorum, len(active)))
        due = pace.due(active, quorum)
        if pace.allowance > 0:
            assert due == looked_at_anew(pace, active, quorum, interval)
        for fragment_id in due[: pace.allowance]:
            pace.opened(fragment_id, active)


def looked_at_anew(pace: Pace, active: dict[int, int], quorum: int, interval: int) -> list[int]:
    """The rule by its definition: a quorum did H steps since the fragment's last opening; most overdue first."""
    overdue = []
    for fragment_id, since in enumerate(pace._since):
        done = sorted((step - since[i] for i, step in active.items()), reverse=True)
        if len(done) >= quorum and done[quorum - 1] >= interval:
            overdue.append((-done[quorum - 1], fragment_id))
    return [fragment_id for _, fragment_id in sorted(overdue)]


@pytest.mark.parametrize("rested", ["a learner rests", "the quorum falls"])
def test_what_was_not_due_for_others_is_looked_at_anew(rested):
    pace = Pace(num_fragments=1, sync_interval_steps=4)
    pace.admit(0, 100, staggered=True)
    pace.admit(1, 100, staggered=False)
    pace.opened(0, {0: 100, 1: 100})
    for step in range(101, 104):
        assert pace.due({0: step, 1: 100}, 2) == []
    steps = {0: 104} if rested == "a learner rests" else {0: 104, 1: 100}
    assert pace.due(steps, 1) == [0]


def test_the_fragments_of_those_that_stay_are_due_although_the_sum_of_counters_fell():
    pace = Pace(num_fragments=1, sync_interval_steps=4)
    pace.admit(0, 100, staggered=True)
    pace.admit(1, 100, staggered=False)
    pace.opened(0, {0: 100, 1: 100})
    assert pace.due({0: 101, 1: 101}, 1) == []
    for step in range(102, 104):
        assert pace.due({0: step}, 1) == []
    assert pace.due({0: 104}, 1) == [0]
