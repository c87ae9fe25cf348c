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


def test_steps_of_a_report_that_was_not_sent_come_first_in_the_next_one_in_their_order():
    times = StepTimes()
    times.start()
    stepped(times, 1.0, 2.0, 3.0)
    assert times.take()[2] == (1.0, 2.0, 3.0)
    stepped(times, 4.0)
    times.give_back()
    stepped(times, 5.0)
    assert times.take()[2] == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert times.take()[2] == ()


def test_what_was_sent_is_not_given_back_twice():
    times = StepTimes()
    times.start()
    stepped(times, 1.0)
    times.take()
    times.give_back()
    times.give_back()
    assert times.take()[2] == (1.0,)


def test_the_walk_back_in_time_from_a_later_report_reaches_the_join():
    """End of the last step = now - age; its gaps walk back from there to the moment of the join."""
    times = StepTimes()
    times.start()
    joined_s = time.monotonic()
    stepped(times, 1.0, 2.0)
    times.take()
    times.give_back()
    stepped(times, 3.0)
    last_end_s = time.monotonic()
    time.sleep(0.05)
    gaps, _, stalls, age_s = times.take()
    assert stalls == (1.0, 2.0, 3.0) and age_s >= 0.05
    assert abs(last_end_s - joined_s - sum(gaps)) < 0.002


def test_where_there_is_no_room_for_all_steps_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(figures, "MAX_WAITING", 4)
    times = StepTimes()
    times.start()
    stepped(times, 1.0, 2.0, 3.0)
    times.take()
    stepped(times, 4.0, 5.0)
    times.give_back()
    assert times.take()[2] == (2.0, 3.0, 4.0, 5.0)
    stepped(times, 6.0)
    times.take()
    stepped(times, 7.0, 8.0, 9.0, 10.0)
    times.give_back()
    assert times.take()[2] == (7.0, 8.0, 9.0, 10.0)


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
        train(client, 30)
        socket.is_full = True
        until(lambda: train(client, 5) or socket.refused >= 3)
        socket.is_full = False
        train(client, 30)
        client.leave("limit")
        steps = client.figures.inner_steps
        summary = job.finish()
    reports = [e for e in load_tape(tmp_path / "tape.jsonl") if e["event"] == "progress"]
    assert sum(len(e["step_gaps_s"]) for e in reports) == steps and summary["uptime"] > 0.9


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
