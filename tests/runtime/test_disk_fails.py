"""The disk of a syncer fails while a job runs on it: the job goes on, and a syncer that is killed meanwhile starts again.

The disk is a file system of its own, which only root can mount; elsewhere these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_diloco.runtime.disk import DISK_FAILED
from tests.disk_kit import WAYS, full, small_disk
from tests.runtime.job_helpers import until
from tests.runtime.test_syncer_restart import CONFIG, Trainer, syncer, versions
from tests.tape_checker import check_run, load_tape

pytestmark = [pytest.mark.process, pytest.mark.slow]

OFTEN = replace(CONFIG, snapshot_interval_s=0.2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    with small_disk(tmp_path / "disk") as path:
        (path / "run").mkdir()
        (tmp_path / "run").symlink_to(path / "run")
        yield path


@contextmanager
def gone(disk: Path) -> Iterator[None]:
    """The folder of the snapshots cannot be written to."""
    folder = disk / "run" / "snapshots"
    os.rename(folder, disk / "kept")
    folder.write_text("no folder")
    try:
        yield
    finally:
        folder.unlink()
        os.rename(disk / "kept", folder)


def run_on_a_failing_disk(run_dir: Path, way: AbstractContextManager[None]) -> tuple[Trainer, list[dict[str, Any]]]:
    """A job whose disk fails, and whose syncer is killed while it does; returns its learner, and the record of the restart."""
    with syncer(run_dir, OFTEN) as job:
        learner = Trainer(job.client(0))
        until(lambda: bool(job.tape("merge")) and versions(job)[-1][1] >= 10)
        with way:
            until(lambda: "The snapshot could not be written" in job.log and "the snapshot before is kept" in job.log)
            steps, merges = learner.steps, learner.client.figures.merges
            until(lambda: learner.steps > steps + 100 and learner.client.figures.merges > merges + 20)
            job.kill()
        job.resume()
        until(lambda: versions(job)[-1][0] == 1, 60)
        learner.end()
        assert job.process.wait(30) == 0, job.log
        return learner, job.tape("restart")


def test_a_job_goes_on_while_no_snapshot_can_be_written_and_after_it(tmp_path, disk):
    learner, restarts = run_on_a_failing_disk(tmp_path / "run", gone(disk))
    summary = check_run(tmp_path / "run")
    assert summary["status"] == "finished" and len(restarts) == 1 and summary["tokens"] == 16 * learner.steps
    assert len(restarts[0]["recalled"]) == len(restarts[0]["versions"]), "the learner had newer versions of all of them"


def test_a_job_whose_tape_has_a_hole_goes_on_with_the_versions_of_its_learners_and_exact_accounts(tmp_path, disk):
    learner, (restart,) = run_on_a_failing_disk(tmp_path / "run", full(disk))
    on_tape = [e["version"] for e in load_tape(tmp_path / "run" / "tape.jsonl") if e["event"] == "merge" and e["version"][0] == 0]
    assert max(n for _, n in restart["versions"]) > max(n for _, n in on_tape), "merges that the tape could not take are in the model"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["tokens"] == 16 * learner.steps
    for fragment in summary["fragments"]:
        assert fragment["merged"] + fragment["discarded"] == summary["tokens"] and fragment["pending"] == 0


def test_a_disk_that_is_free_again_gets_all_that_waited(tmp_path, disk):
    with syncer(tmp_path / "run", OFTEN) as job:
        learner = Trainer(job.client(0))
        until(lambda: bool(job.tape("merge")) and versions(job)[-1][1] >= 10)
        with full(disk):
            merges = learner.client.figures.merges
            until(lambda: learner.client.figures.merges > merges + 20)
        learner.end()
        assert job.process.wait(30) == 0, job.log
        summary = check_run(job.run_dir)
        assert summary["tokens"] == 16 * learner.steps and summary["tokens_pending"] <= 1
        seqs = [e["seq"] for e in load_tape(job.run_dir / "tape.jsonl")]
        assert seqs == list(range(len(seqs)))


@pytest.mark.parametrize("way", WAYS)
def test_a_syncer_that_cannot_write_down_its_start_serves_nothing_and_ends_with_a_sentence(way, tmp_path, disk):
    with syncer(tmp_path / "run", OFTEN) as job:
        learner = Trainer(job.client(0))
        until(lambda: bool(job.tape("merge")) and versions(job)[-1][1] >= 10)
        job.kill()
        identity = (disk / "run" / "snapshots" / "identity.json").read_bytes()
        with WAYS[way](disk):
            command = [sys.executable, "-m", "lightning_diloco", "syncer", "--resume", str(tmp_path / "run"), "--bind", job.endpoint]
            ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == DISK_FAILED and len(ended.stderr.splitlines()) == 1, ended.stderr
        assert "its disk takes nothing" in ended.stderr
        assert (disk / "run" / "snapshots" / "identity.json").read_bytes() == identity, "no epoch is spent on a start that is none"
        job.resume()
        until(lambda: versions(job)[-1][0] == 1, 60)
        learner.end()
        assert job.process.wait(30) == 0, job.log
        assert check_run(tmp_path / "run")["status"] == "finished"
