"""The disk of a syncer fails while a job runs on it: the job goes on, and a syncer that is killed meanwhile starts again.

The disk is a file system of its own, which only root can mount; elsewhere these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.job_helpers import until
from tests.runtime.test_syncer_restart import CONFIG, Trainer, syncer, versions
from tests.tape_checker import check_run, load_tape

pytestmark = [pytest.mark.process, pytest.mark.slow]

OFTEN = replace(CONFIG, snapshot_interval_s=0.2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        (path / "run").mkdir()
        (tmp_path / "run").symlink_to(path / "run")
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """No byte is left, for the tape neither."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        path.unlink()


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
