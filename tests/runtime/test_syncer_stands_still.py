"""A syncer that does nothing for some seconds (stopped, swapped out): learners step on, and their steps are on the tape in their place."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch

from tests.runtime.job_helpers import make_module, running_job, step, sum_up, train
from tests.runtime.test_service_process import syncer
from tests.tape_checker import load_tape

STOPPED_S = 4.0
QUEUE_STEPS = 5000


@pytest.fixture(scope="module", autouse=True)
def _loaded_optimizer():
    """The first step of a process loads half of torch, which would be a gap in the uptime."""
    module = make_module()
    step(module, torch.optim.SGD(module.parameters(), lr=0.02), 0)


def reports(run_dir: Any) -> list[dict[str, Any]]:
    return [e for e in load_tape(run_dir / "tape.jsonl") if e["event"] == "progress"]


@pytest.mark.process
def test_all_steps_are_on_the_tape_at_their_time_though_the_syncers_process_was_stopped(tmp_path):
    run_dir = tmp_path / "run"
    with syncer(run_dir, supervised=True) as process:
        client = process.client(0, token="job")
        client.join()
        train(client, 300, sleep_s=0.001)
        os.kill(process.process.pid, signal.SIGSTOP)
        end_s = time.monotonic() + STOPPED_S
        while time.monotonic() < end_s:
            train(client, 20, sleep_s=0.0005)
        os.kill(process.process.pid, signal.SIGCONT)
        train(client, 300, sleep_s=0.001)
        steps = client.figures.inner_steps
        client.leave("limit")
        client.close()
        process.tell(command="finish", status="finished")
        assert process.end()[0] == 0
    summary = sum_up(run_dir, "finished")
    assert summary["tokens"] == steps * 16 and summary["uptime"] >= 0.95 and summary["goodput"] >= 0.9
    told = reports(run_dir)
    assert sum(len(e["step_gaps_s"]) for e in told) == steps
    # The end of a report's last step, less its gaps, is the end of the report before it, also for those that waited for the syncer.
    ends_s = [e["t_s"] - e["last_step_age_s"] for e in told]
    walks = [(later - earlier, sum(e["step_gaps_s"])) for earlier, later, e in zip(ends_s, ends_s[1:], told[1:], strict=False)]
    assert len(walks) > 20 and max(abs(between - gaps) for between, gaps in walks) < 0.3


def test_words_that_are_out_of_date_do_not_push_reports_out_of_the_queue_to_a_syncer_that_stands_still(tmp_path):
    """In one process the queue holds some two thousand messages, and a learner of fast steps says more than that in a few seconds."""
    with running_job(tmp_path) as job:
        client = job.client(0)
        client.join()
        train(client, 20)
        transport, goes_on = job.service._transport, threading.Event()
        poll = transport.poll

        def stand_still(timeout_s: float) -> Any:
            assert goes_on.wait(60)
            return poll(timeout_s)

        transport.poll = stand_still
        train(client, QUEUE_STEPS, sleep_s=0.0)
        goes_on.set()
        train(client, 50)
        client.leave("limit")
        summary = job.finish()
        assert client._loop._transport.stats.drops.get("control_unsent", 0) == 0
    assert sum(len(e["step_gaps_s"]) for e in reports(tmp_path)) == QUEUE_STEPS + 70 and summary["uptime"] >= 0.95
