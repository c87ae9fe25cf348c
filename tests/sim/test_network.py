"""A wire's arithmetic: latency, bandwidth, one payload after the other, cuts."""

from __future__ import annotations

import pytest

from lightning_diloco.sim.engine import Engine
from lightning_diloco.sim.network import Wire
from lightning_diloco.sim.options import Cut, Link

LINK = Link(latency_s=0.5, up_bytes_per_s=10.0, down_bytes_per_s=20.0)


def arrivals(cuts, sends):
    """Times at which what is sent arrives; `sends`: (time, method name, bytes or None)."""
    engine, seen = Engine(), []
    wire = Wire(engine, LINK, cuts)
    for i, (at_s, method, size) in enumerate(sends):
        arguments = () if size is None else (size,)
        engine.schedule(
            lambda i=i, method=method, arguments=arguments: getattr(wire, method)(*arguments, lambda: seen.append((i, engine.now_s))),
            at_s=at_s,
        )
    engine.run()
    return [now_s for _, now_s in sorted(seen)]


def test_a_control_message_takes_the_latency():
    assert arrivals([], [(1.0, "control", None), (1.0, "control", None)]) == [1.5, 1.5]


def test_payloads_of_one_direction_go_one_after_the_other_and_the_other_direction_is_free():
    assert arrivals([], [(0.0, "up", 10), (0.0, "up", 10), (0.0, "down", 10), (5.0, "up", 10)]) == [1.5, 2.5, 1.0, 6.5]


def test_control_does_not_wait_for_payloads():
    assert arrivals([], [(0.0, "up", 1000), (0.0, "control", None)]) == [100.5, 0.5]


@pytest.mark.parametrize(
    ("at_s", "arrives_s"),
    [(0.0, 1.5), (1.0, 2.5), (1.5, 6.0), (3.0, 6.5), (5.0, 6.5)],
)
def test_a_payload_stops_at_a_cut_and_goes_on_after_it(at_s, arrives_s):
    # One second of sending; nothing is sent from 2 to 5.
    assert arrivals([Cut(learner_id=0, at_s=2.0, for_s=3.0)], [(at_s, "up", 10)]) == [arrives_s]


def test_a_control_message_waits_for_the_end_of_a_cut_and_keeps_its_order():
    cuts = [Cut(learner_id=0, at_s=2.0, for_s=3.0), Cut(learner_id=0, at_s=5.0, for_s=1.0)]
    assert arrivals(cuts, [(1.9, "control", None), (2.0, "control", None), (4.0, "control", None), (6.0, "control", None)]) == [
        2.4,
        6.5,
        6.5,
        6.5,
    ]


def test_a_wire_tells_when_it_opens():
    engine = Engine()
    wire = Wire(engine, LINK, [Cut(learner_id=0, at_s=2.0, for_s=3.0)])
    seen = []
    for at_s in (1.0, 2.0, 4.0, 5.0):
        engine.schedule(lambda: seen.append(wire.opens_s()), at_s=at_s)
    engine.run()
    assert seen == [1.0, 5.0, 5.0, 5.0]
