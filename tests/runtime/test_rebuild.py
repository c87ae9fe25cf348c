"""A syncer whose run directory is lost takes the job from its learners: real processes, sockets and files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_diloco.cli.main import main
from lightning_diloco.protocol.members import SILENT_S
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from tests.runtime.job_helpers import make_module, until
from tests.runtime.test_syncer_restart import Syncer, Trainer, ending, syncer, versions
from tests.runtime.transport_proxy import TransportProxy
from tests.tape_checker import check_run

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]


class Rebuilt(Syncer):
    """Another syncer at the same address, with a folder of its own."""

    def __init__(self, lost: Syncer, run_dir: Path) -> None:
        self.run_dir, self.config, self.endpoint = run_dir, lost.config, lost.endpoint
        command = [sys.executable, "-m", "lightning_diloco", "syncer", "--rebuild", "--run-dir", str(run_dir), "--bind", lost.endpoint]
        with run_dir.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_until_it_serves(self) -> None:
        until(lambda: bool((self.run_dir / "tape.jsonl").exists() and self.tape("restart")) or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.log


def rebuilt(lost: Syncer, run_dir: Path) -> AbstractContextManager[Rebuilt]:
    return ending(Rebuilt(lost, run_dir))


def lose(job: Syncer) -> None:
    """The machine of the syncer is gone, with its disk."""
    job.kill()
    shutil.rmtree(job.run_dir)


def newest(job: Syncer) -> dict[int, int]:
    """n of every fragment's newest version."""
    return {e["fragment_id"]: e["version"][1] for e in job.tape("merge")}


def port_of(job: Syncer) -> int:
    return int(job.endpoint.rsplit(":", 1)[1])


def tokens_of(run_dir: Path) -> dict[int, int]:
    return {row["learner_id"]: row["tokens"] for row in json.loads((run_dir / "summary.json").read_text())["learners"]}


def test_a_job_whose_run_directory_is_lost_goes_on_from_its_learners(tmp_path):
    with syncer(tmp_path / "run") as job:
        learners = [Trainer(job.client(0))]
        until(lambda: len(job.tape("join")) == 1, 60)
        learners.append(Trainer(job.client(1)))
        until(lambda: len(job.tape("join")) == 2 and bool(job.tape("merge")) and versions(job)[-1][1] >= 20, 60)
        lineage, before = job.tape("job")[0]["lineage"], newest(job)
        lose(job)
        with rebuilt(job, tmp_path / "again") as again:
            # A fresh learner comes before there is a job (PROTOCOL.md section 12, interleaving 7): it waits, and founds nothing.
            (again.run_dir / "counters").mkdir(parents=True, exist_ok=True)
            late = Trainer(again.client(2))
            again.wait_until_it_serves()
            (founding,), (restart,) = again.tape("job"), again.tape("restart")
            assert founding["lineage"] == lineage and founding["is_rebuilt"] and restart["epoch"] == 1
            assert all(n >= before[i] - 2 for i, (_, n) in enumerate(restart["versions"])), "a merge or two were not published"
            assert restart["momenta"] == [None] * len(restart["versions"])
            until(lambda: bool(again.tape("merge")) and versions(again)[-1][1] >= restart["versions"][0][1] + 10, 60)
            until(lambda: any(e["learner_id"] == 2 and e["role"] == "joiner" for e in again.tape("join")), 60)
            for learner in (*learners, late):
                learner.end()
            assert again.process.wait(30) == 0, again.log
            check_run(again.run_dir)
            # Every step of the two is in the accounts, also those before the loss.
            told = tokens_of(again.run_dir)
            assert all(told[i] == 16 * learner.steps for i, learner in enumerate((*learners, late)))
            final = load_file(again.run_dir / "global.safetensors")
            assert all(torch.equal(final[name], value) for name, value in late.client._module.named_parameters()), "it left last"
            assert "the outer momentum, which begins at zero" in again.log and "Traceback" not in again.log


@pytest.mark.slow
def test_what_ended_lives_gave_is_in_the_accounts(tmp_path):
    """Learner 0 is in its second life, learner 1 is gone: the model has work of both that no running process can tell of."""
    with syncer(tmp_path / "run") as job:
        first = Trainer(job.client(0))
        until(lambda: len(job.tape("join")) == 1, 60)
        gone = Trainer(job.client(1))
        until(lambda: bool(job.tape("merge")) and versions(job)[-1][1] >= 12, 60)
        third = Trainer(job.client(2))
        until(lambda: len(job.tape("join")) == 3, 60)
        for learner in (first, gone):
            learner.die()
        time.sleep(SILENT_S + 2.0)  # its id is free when it was silent for so long
        second = Trainer(job.client(0))
        until(lambda: any(e["learner_id"] == 0 and e["incarnation"] == 1 for e in job.tape("join")), 60)
        seen = versions(job)[-1][1]
        until(lambda: versions(job)[-1][1] >= seen + 10, 60)
        lose(job)
        with rebuilt(job, tmp_path / "again") as again:
            again.wait_until_it_serves()
            for learner in (second, third):
                learner.end()
            assert again.process.wait(30) == 0, again.log
            summary = check_run(again.run_dir)
            told = tokens_of(again.run_dir)
            assert told[2] == 16 * third.steps
            assert 16 * second.steps < told[0] <= 16 * (second.steps + first.steps) and 0 < told[1] <= 16 * gone.steps
            assert summary["status"] == "finished"


@pytest.mark.slow
def test_learners_of_two_jobs_at_one_address_are_refused_and_nothing_is_written(tmp_path):
    with syncer(tmp_path / "run") as job, syncer(tmp_path / "other") as other, ExitStack() as stack:
        ways = [stack.enter_context(TransportProxy(port_of(x))) for x in (job, other)]
        learners = []
        for one, way in zip((job, other), ways, strict=True):
            client = LearnerClient(make_module(0), ClientOptions(endpoint=f"tcp://127.0.0.1:{way.port}", config=one.config, learner_id=0))
            learners.append(Trainer(client))
        until(lambda: bool(job.tape("merge") and other.tape("merge")), 60)
        for one, way in zip((job, other), ways, strict=True):
            way.cut(stay_closed=True)
            way._target_port = port_of(job)
            lose(one)
        with rebuilt(job, tmp_path / "again") as again:
            until(lambda: "waiting at" in again.log, 60)
            for way in ways:
                way.reopen()
            assert again.process.wait(60) == 2, again.log
            assert "hold 2 histories" in again.log and "Traceback" not in again.log
            assert not (again.run_dir / "tape.jsonl").exists()
        for learner in learners:
            learner.die()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--run-dir", "{dir}", "--bind", "tcp://127.0.0.1:0"], "the address that their syncer had"),
        (["--resume", "{dir}", "--bind", "tcp://127.0.0.1:7777"], "Say --resume"),
        (["--bind", "tcp://127.0.0.1:7777"], "--run-dir DIR is required"),
    ],
    ids=["any port", "with resume", "no folder"],
)
def test_wrong_use_is_one_sentence(options, words, tmp_path, capsys):
    assert main(["syncer", "--rebuild", *(o.format(dir=tmp_path) for o in options)]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_folder_that_holds_a_job_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "tape.jsonl").write_text("")
    assert main(["syncer", "--rebuild", "--run-dir", str(tmp_path), "--bind", "tcp://127.0.0.1:1"]) == 2
    assert "holds the tape of a job" in capsys.readouterr().err
