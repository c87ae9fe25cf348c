"""Reports that are not sent: no step time is lost, their order and their place in time stay."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from lightning_diloco.protocol.messages import Heartbeat
from lightning_diloco.protocol.wire import decode_from_learner
from lightning_diloco.runtime import figures
from lightning_diloco.runtime.figures import StepTimes
from tests.runtime.job_helpers import make_module, running_job, step, train, until
from tests.tape_checker import load_tape


@pytest.fixture(scope="module", autouse=True)
def _loaded_optimizer():
    """The first step of a process loads half of torch, which would be a gap in the uptime."""
    module = make_module()
    step(module, torch.optim.SGD(module.parameters(), lr=0.02), 0)


def stepped(times: StepTimes, *stalls_s: float) -> None:
    """A step for each stall; the stall serves as its name."""
    for stall_s in stalls_s:
        time.sleep(0.002)
        times.step(stall_s)


def test_what_is_not_confirmed_is_told_again_before_what_came_later():
    times = StepTimes()
    times.start()
    stepped(times, 1.0, 2.0, 3.0)
    assert (times.take().first, times.take().stalls_s) == (0, (1.0, 2.0, 3.0))
    stepped(times, 4.0)
    times.confirm(2)
    stepped(times, 5.0)
    taken = times.take()
    assert (taken.first, taken.stalls_s) == (2, (3.0, 4.0, 5.0))
    times.confirm(5)
    times.confirm(2)
    assert (times.take().first, times.take().stalls_s) == (5, ())


def test_what_was_not_told_cannot_be_confirmed():
    times = StepTimes()
    times.start()
    stepped(times, 1.0, 2.0)
    times.take()
    stepped(times, 3.0)
    times.confirm(99)
    assert (times.take().first, times.take().stalls_s) == (2, (3.0,))


def test_the_walk_back_in_time_from_a_later_report_reaches_the_join():
    """End of the last step = now - age; its gaps walk back from there to the moment of the join."""
    times = StepTimes()
    times.start()
    joined_s = time.monotonic()
    stepped(times, 1.0, 2.0)
    times.take()
    stepped(times, 3.0)
    last_end_s = time.monotonic()
    time.sleep(0.05)
    taken = times.take()
    assert taken.stalls_s == (1.0, 2.0, 3.0) and taken.age_s >= 0.05
    assert abs(last_end_s - joined_s - sum(taken.gaps_s)) < 0.002


def test_steps_wait_while_nobody_hears_and_the_age_is_that_of_what_was_told():
    times = StepTimes()
    times.start()
    stepped(times, 1.0)
    told_s = time.monotonic()
    assert times.take().stalls_s == (1.0,)
    stepped(times, *[2.0] * 10)
    silent = times.take(is_heard=False)
    assert silent.stalls_s == () and abs(silent.age_s - (time.monotonic() - told_s)) < 0.01
    assert len(times.take().stalls_s) == 11


def test_where_there_is_no_room_for_all_steps_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(figures, "MAX_WAITING", 4)
    times = StepTimes()
    times.start()
    stepped(times, 1.0, 2.0, 3.0)
    times.take()
    stepped(times, 4.0, 5.0)
    taken = times.take()
    assert (taken.first, taken.stalls_s) == (1, (2.0, 3.0, 4.0, 5.0))


class FullSocket:
    """Stands before a client's transport; while `is_full` no report is taken, as by a socket whose queue is full."""

    def __init__(self, client: Any) -> None:
        self.is_full = False
        self.refused = 0
        self._send = client._loop._transport.send_control
        client._loop._transport.send_control = self.send_control

    def send_control(self, peer: bytes, data: bytes) -> bool:
        if self.is_full and isinstance(decode_from_learner(data)[1], Heartbeat):
            self.refused += 1
            return False
        return self._send(peer, data)


def test_step_times_of_reports_that_the_socket_did_not_take_are_on_the_tape_in_the_end(tmp_path):
    with running_job(tmp_path) as job:
        client = job.client(0)
        client.join()
        socket = FullSocket(client)
        start_s = time.monotonic()
        train(client, 30)
        socket.is_full = True
        until(lambda: train(client, 5) or socket.refused >= 3)
        socket.is_full = False
        train(client, 30)
        took_s = time.monotonic() - start_s
        client.leave("limit")
        steps = client.figures.inner_steps
        job.finish()
    gaps_s = [gap_s for e in load_tape(tmp_path / "tape.jsonl") if e["event"] == "progress" for gap_s in e["step_gaps_s"]]
    assert len(gaps_s) == steps and sum(gaps_s) > 0.95 * took_s


def test_a_report_that_the_socket_does_not_take_is_tried_again_at_its_time_and_not_at_every_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MAX_STEPS_PER_REPORT", 10)
    with running_job(tmp_path) as job:
        client = job.client(0)
        client.join()
        socket = FullSocket(client)
        socket.is_full = True
        start_s = time.monotonic()
        train(client, 150)
        heartbeats = (time.monotonic() - start_s) / job.config.heartbeat_s
        assert 1 <= socket.refused <= heartbeats + 2
        socket.is_full = False
        client.leave("limit")
        job.finish()
