"""The engine's contract: order, clock, refusals."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.sim import Engine


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 1)), max_size=40))
def test_callbacks_run_by_time_then_priority_then_order_of_scheduling(entries):
    engine, seen = Engine(), []
    for i, (time_s, priority) in enumerate(entries):
        engine.schedule(lambda i=i: seen.append((engine.now_s, i)), at_s=float(time_s), priority=priority)
    engine.run()
    expected = sorted(range(len(entries)), key=lambda i: (*entries[i], i))
    assert [i for _, i in seen] == expected
    assert [now_s for now_s, _ in seen] == [entries[i][0] for i in expected]


def test_a_callback_may_schedule_at_the_present_time_and_runs_after_those_that_wait_there():
    engine, seen = Engine(), []

    def first():
        engine.schedule(lambda: seen.append("third"))
        seen.append("first")

    engine.schedule(first, at_s=1.0)
    engine.schedule(lambda: seen.append("second"), at_s=1.0)
    assert engine.run() == 1.0
    assert seen == ["first", "second", "third"]


def test_until_is_inclusive_and_what_lies_after_it_is_kept():
    engine, seen = Engine(), []
    for time_s in (1.0, 2.0, 3.0):
        engine.schedule(lambda: seen.append(engine.now_s), at_s=time_s)
    assert engine.run(2.0) == 2.0
    assert engine.run(2.5) == 2.5
    assert (seen, len(engine)) == ([1.0, 2.0], 1)
    assert engine.run() == 3.0
    assert (seen, len(engine)) == ([1.0, 2.0, 3.0], 0)


def test_time_does_not_pass_the_last_callback():
    engine = Engine()
    engine.schedule(lambda: None, delay_s=1.0)
    assert engine.run(100.0) == 1.0


def test_a_run_before_the_present_does_not_turn_the_clock_back():
    engine = Engine()
    engine.schedule(lambda: None, at_s=2.0)
    engine.schedule(lambda: None, at_s=3.0)
    engine.run(2.0)
    assert engine.run(1.0) == 2.0


def test_stop_returns_after_the_present_callback():
    engine, seen = Engine(), []
    engine.schedule(engine.stop, at_s=1.0)
    engine.schedule(lambda: seen.append("later"), at_s=1.0)
    assert engine.run() == 1.0
    assert seen == []
    engine.run()
    assert seen == ["later"]


def test_what_a_callback_raises_passes_through_and_the_rest_can_go_on():
    engine, seen = Engine(), []
    engine.schedule(lambda: [][0], at_s=1.0)
    engine.schedule(lambda: seen.append("after"), at_s=2.0)
    with pytest.raises(IndexError):
        engine.run()
    engine.run()
    assert seen == ["after"]


@pytest.mark.parametrize("when", [{"at_s": 1.0}, {"delay_s": -0.1}, {"at_s": math.inf}, {"at_s": math.nan}, {"delay_s": math.nan}])
def test_the_past_the_infinite_and_no_number_are_refused(when):
    engine = Engine()
    engine.schedule(lambda: None, at_s=2.0)
    engine.run()
    with pytest.raises(ConfigurationError, match=r"must be finite and not before the present, 2\.0 s"):
        engine.schedule(lambda: None, **when)
