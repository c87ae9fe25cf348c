"""A real syncer process that is killed and starts again with `--resume`: learners go on, nothing is merged twice, accounts are exact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file

from lightning_diloco.config import SyncConfig
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from tests.runtime.job_helpers import CONFIG as SMALL
from tests.runtime.job_helpers import Background, make_module, step, until
from tests.tape_checker import check_run, load_tape

pytestmark = pytest.mark.process

CONFIG = replace(SMALL, outer_lr=0.5, outer_momentum=0.3)
"""An outage is hundreds of steps of this toy: what comes after it must not be taken too far."""


S = TypeVar("S", bound="Syncer")


class Syncer:
    """A syncer by hand, which can be killed and started again at the same address."""

    def __init__(self, run_dir: Path, config: SyncConfig = CONFIG) -> None:
        self.run_dir, self.config = run_dir, config
        self.process = self._start("--run-dir", "tcp://127.0.0.1:0")
        self.endpoint = json.loads((run_dir / "syncer.json").read_text())["endpoint"]

    def _start(self, option: str, bind: str) -> subprocess.Popen[bytes]:
        (self.run_dir / "syncer.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "lightning_diloco", "syncer", option, str(self.run_dir), "--bind", bind]
        with self.run_dir.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(lambda: (self.run_dir / "syncer.json").exists() or process.poll() is not None, 60)
        assert process.poll() is None, self.log
        return process

    @property
    def log(self) -> str:
        return self.run_dir.with_suffix(".log").read_text()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def resume(self) -> None:
        self.process = self._start("--resume", self.endpoint)

    def client(self, learner_id: int) -> LearnerClient:
        options = ClientOptions(
            endpoint=self.endpoint, config=self.config, counters_path=self.run_dir / "counters", learner_id=learner_id, join_timeout_s=60
        )
        return LearnerClient(make_module(learner_id), options)

    def tape(self, *events: str) -> list[dict[str, Any]]:
        return [e for e in load_tape(self.run_dir / "tape.jsonl") if e["event"] in events]


@contextmanager
def syncer(run_dir: Path, config: SyncConfig = CONFIG) -> Iterator[Syncer]:
    with ending(Syncer(run_dir, config)) as started:
        yield started


@contextmanager
def ending(started: S) -> Iterator[S]:
    """Whatever happens, its process ends."""
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.kill()


class Trainer:
    """A learner that trains until it is told to leave; keeps the time of its longest step."""

    def __init__(self, client: LearnerClient) -> None:
        self.client = client
        self.is_over = self.is_dying = False
        self.longest_s = 0.0
        self.steps = 0
        self.run = Background(self._train)

    def _train(self) -> None:
        client = self.client
        client.join()
        optimizer = torch.optim.SGD(client._module.parameters(), lr=0.02)
        while not self.is_over:
            start_s = time.monotonic()
            step(client._module, optimizer, self.steps)
            time.sleep(0.005)
            client.boundary(tokens=16)
            self.longest_s, self.steps = max(self.longest_s, time.monotonic() - start_s), self.steps + 1
        if not self.is_dying:
            client.leave("limit")
            client.weights.load_global()
        client.close()

    def end(self) -> None:
        self.is_over = True
        self.run.result()

    def die(self) -> None:
        """Go without a word."""
        self.is_dying = True
        self.end()


def versions(syncer: Syncer, fragment_id: int = 0) -> list[tuple[int, int]]:
    return [tuple(e["version"]) for e in syncer.tape("merge") if e["fragment_id"] == fragment_id]


def told_steps(syncer: Syncer, learner_id: int) -> list[int]:
    """Numbers of the steps whose times are on the tape."""
    reports = [e for e in syncer.tape("progress") if e["learner_id"] == learner_id]
    return [e["first_gap"] + i for e in reports for i in range(len(e["step_gaps_s"]))]


def kill_between_steps(job: Syncer, learners: list[Trainer], *, after_merges: int) -> None:
    """Kill the syncer, and see the learners step on."""
    until(lambda: bool(job.tape("merge")) and versions(job)[-1][1] >= after_merges, 60)
    job.kill()
    before = [learner.steps for learner in learners]
    until(lambda: all(learner.steps > steps + 20 for learner, steps in zip(learners, before, strict=True)), 60)


def test_learners_go_on_while_the_syncer_is_killed_and_starts_again(tmp_path):
    with syncer(tmp_path / "run") as job:
        learners = [Trainer(job.client(0))]
        until(lambda: len(job.tape("join")) == 1)
        learners.append(Trainer(job.client(1)))
        until(lambda: len(job.tape("join")) == 2)
        for epoch in (1, 2):
            kill_between_steps(job, learners, after_merges=20 * epoch)
            job.resume()
            until(lambda epoch=epoch: versions(job)[-1][0] == epoch)
        for learner in learners:
            learner.end()
        assert job.process.wait(30) == 0, job.log
        restarts, merges = job.tape("restart"), versions(job)
        assert [r["epoch"] for r in restarts] == [1, 2] and merges == sorted(merges)
        for restart in restarts:
            n = restart["versions"][0][1]
            assert next(v for v in merges if v[0] == restart["epoch"]) == (restart["epoch"], n + 1), "n goes on over epochs"
        summary = check_run(job.run_dir)
        assert summary["status"] == "finished" and summary["tokens"] == 16 * sum(learner.steps for learner in learners)
        assert summary["tokens_pending"] <= 1 and summary["discarded_by_reason"]["died"] == 0
        for learner_id, learner in enumerate(learners):
            assert told_steps(job, learner_id) == list(range(learner.steps)), (
                "each step is on the tape, once, also those told to a dead one"
            )
        final = load_file(job.run_dir / "global.safetensors")
        held_by_the_last = dict(learners[-1].client._module.named_parameters())
        assert all(torch.equal(final[name], value) for name, value in held_by_the_last.items())


def test_a_job_whose_processes_have_all_ended_is_continued_by_others(tmp_path):
    with syncer(tmp_path / "run") as job:
        first = Trainer(job.client(0))
        until(lambda: bool(job.tape("merge")) and versions(job)[-1][1] >= 10)
        first.end()
        assert job.process.wait(30) == 0, job.log
        end = job.tape("end")[0]
        job.resume()
        second = Trainer(job.client(0))
        until(lambda: versions(job)[-1][0] == 1 and versions(job)[-1][1] >= end["versions"][0] + 5)
        second.end()
        assert job.process.wait(30) == 0, job.log
        (restart,) = job.tape("restart")
        assert [v[1] for v in restart["versions"]] == end["versions"] and restart["recalled"] == []
        summary = check_run(job.run_dir)
        assert summary["learners"][0]["incarnations"] == 2 and summary["merges"] == sum(f["version"] for f in summary["fragments"])
        assert summary["tokens"] == 16 * (first.steps + second.steps)


@pytest.mark.slow
def test_a_syncer_that_is_killed_before_the_founding_can_be_founded_after_it(tmp_path):
    with syncer(tmp_path / "run") as job:
        job.kill()
        job.resume()
        learner = Trainer(job.client(0))
        until(lambda: bool(job.tape("merge")))
        learner.end()
        assert job.process.wait(30) == 0, job.log
        assert job.tape("job")[0]["epoch"] == 1 and check_run(job.run_dir)["status"] == "finished"


@pytest.mark.slow
def test_a_syncer_whose_snapshots_are_gone_takes_all_from_its_learners(tmp_path):
    with syncer(tmp_path / "run") as job:
        learner = Trainer(job.client(0))
        until(lambda: bool(job.tape("merge")) and versions(job)[-1][1] >= 20)
        job.kill()
        for path in (job.run_dir / "snapshots").glob("0*"):
            os.rename(path, tmp_path / path.name)
        job.resume()
        until(lambda: versions(job)[-1][0] == 1)
        learner.end()
        assert job.process.wait(30) == 0, job.log
        assert len(job.tape("restart")[0]["recalled"]) == len(job.tape("job")[0]["fragments"])
        assert "its outer momentum is lost" in job.log
        assert check_run(job.run_dir)["status"] == "finished"
