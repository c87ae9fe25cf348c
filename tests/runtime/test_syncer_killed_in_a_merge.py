"""A real syncer process that is killed at a known moment of a merge, or between its line on the tape and its publication's arrival.

One learner trains alone, by the same exact number a step, with an outer optimizer that hands on what it is given: the published weights
count the steps that are in them. Work that was merged twice, or not at all, is a wrong number.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from lightning_diloco.runtime.snapshot import SnapshotStore
from tests.runtime.halting_syncer import MOMENTS
from tests.runtime.job_helpers import CONFIG as SMALL
from tests.runtime.job_helpers import Background, until
from tests.runtime.test_syncer_restart import Syncer, ending
from tests.runtime.transport_proxy import TransportProxy
from tests.tape_checker import check_run

pytestmark = pytest.mark.process

WIDTH = 64
STEP = 2.0**-12
"""Thousands of these add up without rounding."""
CONFIG = replace(SMALL, num_fragments=2, outer_lr=1.0, outer_momentum=0.0, wire_dtype="fp32", norm_gate=None, snapshot_interval_s=0.3)


class HaltingSyncer(Syncer):
    """As `Syncer`, by the entry of `halting_syncer`."""

    def __init__(self, run_dir: Path, config: SyncConfig = CONFIG, *, bulk_port: int | None = None) -> None:
        self.folder = run_dir.with_name("moments")
        self.folder.mkdir()
        if bulk_port is not None:
            (self.folder / "bulk").write_text(f"tcp://127.0.0.1:{bulk_port}")
        super().__init__(run_dir, config)

    def _start(self, option: str, bind: str) -> subprocess.Popen[bytes]:
        (self.run_dir / "syncer.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.runtime.halting_syncer", str(self.folder), "syncer", option, str(self.run_dir)]
        with self.run_dir.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen([*command, "--bind", bind], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(lambda: (self.run_dir / "syncer.json").exists() or process.poll() is not None, 60)
        assert process.poll() is None, self.log
        return process

    def halt_at(self, moment: str) -> dict[str, int]:
        """Have the next merge stand still there; which merge it is."""
        (self.folder / "halted").unlink(missing_ok=True)
        (self.folder / "halt").write_text(moment)
        until((self.folder / "halted").exists, 30)
        return json.loads((self.folder / "halted").read_text())

    def go_on(self) -> None:
        (self.folder / "halt").unlink()

    def merges(self, which: dict[str, int]) -> list[dict[str, Any]]:
        """Lines of this merge on the tape, of whatever epoch."""
        return [e for e in self.tape("merge") if (e["fragment_id"], e["version"][1]) == (which["fragment_id"], which["n"])]


class Counting:
    """A learner whose every step adds the same number to every parameter."""

    def __init__(self, job: HaltingSyncer) -> None:
        self.module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))
        for parameter in self.module.parameters():
            nn.init.zeros_(parameter)
        counters = job.run_dir / "counters"
        options = ClientOptions(endpoint=job.endpoint, config=job.config, counters_path=counters, learner_id=0, join_timeout_s=60)
        self.client = LearnerClient(self.module, options)
        self.steps = 0
        self.is_over = False
        self._run = Background(self._train)

    def _train(self) -> None:
        self.client.join()
        while not self.is_over:
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter.add_(STEP)
            time.sleep(0.005)
            self.client.boundary(tokens=16)
            self.steps += 1
        self.client.leave("limit")
        self.client.close()

    def step_on(self, count: int) -> None:
        """Wait until it has done so many steps more."""
        goal = self.steps + count
        until(lambda: self.steps >= goal, 30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.is_over = True

    def end(self) -> None:
        self.is_over = True
        self._run.result()


def has_merged(job: HaltingSyncer, count: int, epoch: int = 0) -> bool:
    return len([e for e in job.tape("merge") if e["version"][0] == epoch]) >= count


def snapshot_version(job: HaltingSyncer, fragment_id: int) -> tuple[int, int] | None:
    """What the newest snapshot has of a fragment."""
    found = SnapshotStore(job.run_dir).read([WIDTH * WIDTH] * 2)[fragment_id]
    return None if found is None else (found.version.epoch, found.version.n)


def check_the_end(job: HaltingSyncer, learner: Counting) -> None:
    """Every step is in the published weights once, and in the accounts."""
    assert job.process.wait(30) == 0, job.log
    summary = check_run(job.run_dir)
    assert summary["status"] == "finished" and summary["tokens"] == summary["tokens_merged"] == 16 * learner.steps
    assert summary["tokens_discarded"] == summary["tokens_pending"] == 0
    for name, values in load_file(job.run_dir / "global.safetensors").items():
        assert torch.equal(values, torch.full_like(values, STEP * learner.steps)), f"{name}: {values.unique() / STEP} of {learner.steps}"


def test_a_merge_in_which_its_syncer_was_killed_is_made_once_by_the_next_one(tmp_path):
    """One job, three kills: before the merge, between it and the outer step, and after the step."""
    with ending(HaltingSyncer(tmp_path / "run")) as job, Counting(job) as learner:
        for epoch, moment in enumerate(MOMENTS):
            until(lambda epoch=epoch: has_merged(job, 10, epoch), 60)
            which = job.halt_at(moment)
            learner.step_on(20)
            job.kill()
            job.go_on()
            last = [e for e in job.tape("round_open", "round_cancel", "merge") if e["fragment_id"] == which["fragment_id"]][-1]
            taken = [e for e in job.tape("contribution") if e["fragment_id"] == which["fragment_id"]][-1]
            assert last["event"] == "round_open", "its round is open"
            assert taken["outcome"] == "folded" and taken["seq"] > last["seq"], "what it was about to merge is on the tape"
            assert job.merges(which) == [], "and no line says that it was merged"
            job.resume()
            until(lambda which=which: bool(job.merges(which)), 60)
            restart, (merge,) = job.tape("restart")[-1], job.merges(which)
            assert restart["epoch"] == epoch + 1 and restart["versions"][which["fragment_id"]] == [epoch + 1, which["n"] - 1]
            assert merge["version"] == [epoch + 1, which["n"]]
        learner.end()
        check_the_end(job, learner)


@pytest.mark.parametrize("is_in_a_snapshot", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_work_of_a_version_that_is_on_the_tape_and_reached_nobody_is_in_the_model_once(tmp_path, is_in_a_snapshot):
    """The publication is on its way, in a proxy that holds it, when the syncer is killed; a snapshot has the version, or nobody."""
    config = replace(CONFIG, snapshot_interval_s=0.1 if is_in_a_snapshot else 600.0)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        with ending(HaltingSyncer(tmp_path / "run", config, bulk_port=port.getsockname()[1])) as job, Counting(job) as learner:
            target = int(json.loads((job.run_dir / "syncer.json").read_text())["bulk"].rsplit(":", 1)[1])
            with TransportProxy(target, listener=port.dup()) as proxy:
                until(lambda: has_merged(job, 10), 60)
                which = job.halt_at("stepped")
                fragment_id, n = which["fragment_id"], which["n"]
                proxy.hold_from_bytes = 1024  # its announcement passes, its values do not
                job.go_on()
                until(lambda: bool(job.merges(which)) and proxy.num_held_bytes >= 3 * WIDTH * WIDTH)
                learner.step_on(20)
                until(lambda: not is_in_a_snapshot or snapshot_version(job, fragment_id) == (0, n))
                assert learner.client._machine.state.fragments[fragment_id].held.n == n - 1, "it has not arrived"
                job.kill()
                proxy.cut()
            (job.folder / "bulk").unlink()
            job.resume()
            until(lambda: has_merged(job, 10, epoch=1), 60)
            learner.end()
            (restart,) = job.tape("restart")
            assert restart["versions"][fragment_id] == [1, n if is_in_a_snapshot else n - 1]
            check_the_end(job, learner)
