"""A learner's process is stopped and wakes up: nobody waits, and it goes on where it was, or is fenced if it was replaced meanwhile."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from lightning_diloco.runtime.client import LearnerClient
from tests.runtime.job_helpers import CONFIG, sum_up, until
from tests.runtime.test_service_process import Syncer, learner_process, syncer
from tests.tape_checker import load_tape

pytestmark = pytest.mark.process

WIDTH = 64
JOB = dataclasses.replace(CONFIG, norm_gate=None, grace_fraction=0.0)


def stack() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))


def drift(client: LearnerClient, num_steps: int) -> None:
    """Inner steps of a learner whose parameters move a little, 16 tokens each."""
    for _ in range(num_steps):
        with torch.no_grad():
            for parameter in client._module.parameters():
                parameter.add_(1e-4)
        time.sleep(0.005)
        client.boundary(tokens=16)


def wish(process: Syncer, learner_id: int, **fields: Any) -> dict[str, Any]:
    config = {"width": WIDTH, "config": JOB.as_dict(), "run_dir": str(process.run_dir), "token": "job"}
    return {**config, "endpoint": process.endpoint, "learner_id": learner_id, "sleep_s": 0.005, **fields}


def merges_of(run_dir: Path, learner_id: int) -> int:
    merges = [e for e in load_tape(run_dir / "tape.jsonl") if e["event"] == "merge"]
    return sum(learner_id in {m["learner_id"] for m in e["members"]} for e in merges)


def last_t_s(run_dir: Path) -> float:
    return load_tape(run_dir / "tape.jsonl")[-1]["t_s"]


def stop_and_go_on(run_dir: Path, *, stopped_s: float, limit_s: float, num_steps: int, num_merges: int) -> dict[str, Any]:
    """One of two learners stands still for so long, and until the other one has had so many merges; then it does the rest of its steps.

    Returns the summary, whose tokens are held against the steps that both have done.
    """
    with syncer(run_dir, supervised=True, num_slots=2) as process:
        survivor = process.client(0, stack(), config=JOB, token="job")
        survivor.join()
        with learner_process(**wish(process, 1, steps=num_steps)) as stopped:
            assert json.loads(stopped.stdout.readline())["incarnation"] == 0
            until(lambda: drift(survivor, 10) or merges_of(run_dir, 1) > 5, 60)
            os.kill(stopped.pid, signal.SIGSTOP)
            until(lambda: psutil.Process(stopped.pid).status() == psutil.STATUS_STOPPED)
            stopped_at_s, before = last_t_s(run_dir), merges_of(run_dir, 0)
            until(lambda: drift(survivor, 10) or last_t_s(run_dir) > stopped_at_s + stopped_s, limit_s)
            until(lambda: drift(survivor, 10) or merges_of(run_dir, 0) > before + num_merges, limit_s - stopped_s)
            ours = merges_of(run_dir, 1)
            os.kill(stopped.pid, signal.SIGCONT)
            until(lambda: drift(survivor, 10) or merges_of(run_dir, 1) > ours + 10, 60)
            survivor.leave("limit")
            survivor.close()
            assert stopped.wait(120) == 0
        process.tell(command="finish", status="finished")
        assert process.end()[0] == 0
    summary = sum_up(run_dir, "finished")
    assert [x["tokens"] for x in summary["learners"]] == [16 * survivor.figures.inner_steps, 16 * num_steps]
    return summary


def all_merged_in_one_life(summary: dict[str, Any]) -> bool:
    one_life = [x["incarnations"] for x in summary["learners"]] == [1, 1]
    return one_life and summary["tokens_merged"] == summary["tokens"] and summary["tokens_pending"] == summary["tokens_discarded"] == 0


def test_a_learner_that_was_stopped_for_longer_than_ten_heartbeats_goes_on_in_the_same_life(tmp_path):
    """Ten heartbeats, 2 s here: after so long a member counts as silent. A round that waited would do so for 10 s."""
    summary = stop_and_go_on(tmp_path / "run", stopped_s=2.5, limit_s=9.0, num_steps=300, num_merges=10)
    assert all_merged_in_one_life(summary), summary


@pytest.mark.slow
def test_a_learner_that_was_stopped_for_half_a_minute_goes_on_in_the_same_life(tmp_path):
    summary = stop_and_go_on(tmp_path / "run", stopped_s=30.0, limit_s=120.0, num_steps=6000, num_merges=50)
    assert all_merged_in_one_life(summary), summary


@pytest.mark.slow
def test_a_learner_that_was_replaced_while_it_was_stopped_is_fenced_and_changes_nothing(tmp_path):
    run_dir = tmp_path / "run"
    with syncer(run_dir, supervised=True, num_slots=2) as process:
        survivor = process.client(0, stack(), config=JOB, token="job")
        survivor.join()
        with learner_process(**wish(process, 1, steps=100_000)) as stopped:
            until(lambda: drift(survivor, 10) or merges_of(run_dir, 1) > 5, 60)
            os.kill(stopped.pid, signal.SIGSTOP)
            with learner_process(**wish(process, 1, steps=400, takeover_token="over")) as successor:
                until(lambda: drift(survivor, 10) or successor.poll() is not None, 120)
                assert successor.returncode == 0
            os.kill(stopped.pid, signal.SIGCONT)
            until(lambda: drift(survivor, 10) or stopped.poll() is not None, 60)
            assert stopped.returncode != 0
            survivor.leave("limit")
            survivor.close()
        process.tell(command="finish", status="finished")
        assert process.end()[0] == 0
    summary = sum_up(run_dir, "finished")
    fenced = [e for e in load_tape(run_dir / "tape.jsonl") if e["event"] == "leave" and e["reason"] == "fenced"]
    assert len(fenced) == 1 and summary["learners"][1]["incarnations"] == 2
    after = [
        e for e in load_tape(run_dir / "tape.jsonl") if e["seq"] > fenced[0]["seq"] and e.get("learner_id") == 1 and "incarnation" in e
    ]
    assert after and all(e["incarnation"] != fenced[0]["incarnation"] or e["event"] == "discard" for e in after)
