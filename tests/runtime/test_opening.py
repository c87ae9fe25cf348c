"""What a run directory must hold for a job to be gone on with: damage is a sentence, and nothing is founded twice."""

from __future__ import annotations

import errno
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_diloco.cli.main import main
from lightning_diloco.errors import ConfigurationError
from lightning_diloco.protocol.records import RoundCancelRecord
from lightning_diloco.runtime import snapshot, tape
from lightning_diloco.runtime.opening import open_job
from lightning_diloco.runtime.snapshot import SnapshotStore
from lightning_diloco.runtime.tape import TAPE_NAME, TapeWriter
from tests.runtime.job_helpers import CONFIG, running_job, whole_life


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """The run directory of a job that has ended."""
    run_dir = tmp_path_factory.mktemp("run")
    with running_job(run_dir) as job:
        whole_life(job.client(0), 12)
        job.finish()
    return run_dir


def copy_of(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


def test_every_start_raises_the_epoch(ended, tmp_path):
    run_dir = copy_of(ended, tmp_path)
    openings = [open_job(run_dir, SnapshotStore(run_dir), resume=True) for _ in range(2)]
    assert [o.identity.epoch for o in openings] == [1, 2] and all(o.resumption is not None for o in openings)
    assert all(f is not None for f in openings[1].fragments)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tape.jsonl", "is gone or empty. Put the tape back"),
        ("snapshots/founding.json", "tells of a founding that"),
        ("snapshots/static.bin", "cannot be gone on with"),
        ("snapshots/identity.json", "holds no job"),
    ],
)
def test_a_job_that_lacks_a_file_is_not_founded_again(ended, tmp_path, name, words, capsys):
    run_dir = copy_of(ended, tmp_path)
    (run_dir / name).unlink()
    with pytest.raises(ConfigurationError, match=words):
        open_job(run_dir, SnapshotStore(run_dir), resume=True)
    assert main(["syncer", "--resume", str(run_dir)]) == 2
    assert words in capsys.readouterr().err


def test_a_long_tape_is_folded_line_by_line(ended, tmp_path, monkeypatch):
    run_dir = copy_of(ended, tmp_path)
    before = open_job(run_dir, SnapshotStore(run_dir), resume=True)
    writer = TapeWriter(run_dir / TAPE_NAME, now=lambda: 1e9, t0_s=0.0)
    for i in range(20_000):
        writer.write(RoundCancelRecord(fragment_id=0, round_id=i, contributions=0, quorum=1))
    writer.close()
    monkeypatch.setattr(tape, "_PORTION_BYTES", 1 << 14)
    tracemalloc.start()
    try:
        opening = open_job(run_dir, SnapshotStore(run_dir), resume=True)
        assert tracemalloc.get_traced_memory()[1] < (run_dir / TAPE_NAME).stat().st_size / 4
    finally:
        tracemalloc.stop()
    assert opening.elapsed_s == 1e9, "the second of the last line"
    assert opening.resumption is not None and before.resumption is not None
    assert opening.resumption.history.last_seq == before.resumption.history.last_seq


def test_a_directory_of_a_job_is_not_taken_for_a_new_one(ended, tmp_path):
    run_dir = copy_of(ended, tmp_path)
    (run_dir / "tape.jsonl").unlink()
    with pytest.raises(ConfigurationError, match="holds an earlier job"):
        open_job(run_dir, SnapshotStore(run_dir), resume=False)


@pytest.mark.parametrize("name", [".static.bin", "founding.tmp"])
def test_a_founding_that_the_disk_refused_is_written_before_the_first_snapshot(name, tmp_path, monkeypatch, caplog):
    real, refusals, early = snapshot.write_file, [3], list[Path]()

    def write_file(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == name and refusals[0]:
            refusals[0] -= 1
            early.extend(path.parent.glob("[0-9]*"))
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *arguments, **options)

    monkeypatch.setattr(snapshot, "write_file", write_file)
    with running_job(tmp_path, config=replace(CONFIG, snapshot_interval_s=0.02)) as job:
        whole_life(job.client(0), 60)
        job.finish()
    assert refusals == [0] and not early, "no snapshot without its founding"
    assert "until it is there the run cannot be resumed" in caplog.text
    assert caplog.text.count("the founding is written now") == 1
    opening = open_job(tmp_path, SnapshotStore(tmp_path), resume=True)
    assert opening.resumption is not None and all(f is not None for f in opening.fragments)
