"""Run directories are fresh, linked and locked."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime import rundir as rundir_module
from lightning_diloco.runtime.rundir import SUBFOLDERS, lock_run_dir, make_run_dir

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def test_run_goes_to_outputs_by_date_with_its_subfolders_and_the_link(tmp_path: Path):
    run_dir = make_run_dir()
    assert run_dir.parent == tmp_path / "outputs"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run_dir.name)
    assert all((run_dir / name).is_dir() for name in (*SUBFOLDERS, "counters"))
    assert os.readlink(tmp_path / "outputs" / "latest") == run_dir.name
    assert sorted(p.name for p in (tmp_path / "outputs").iterdir()) == sorted([run_dir.name, "latest"])


def test_two_runs_of_one_second_have_two_directories_and_latest_is_the_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rundir_module.time, "strftime", lambda form: "2026-01-02_03-04-05")
    names = [make_run_dir().name for _ in range(3)]
    assert names == ["2026-01-02_03-04-05", "2026-01-02_03-04-05-2", "2026-01-02_03-04-05-3"]
    assert (tmp_path / "outputs" / "latest").resolve().name == names[-1]


def test_given_directory_without_a_tape_is_used_as_it_is(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert make_run_dir("mine") == tmp_path / "mine"
    assert make_run_dir(tmp_path / "mine") == tmp_path / "mine"
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"
    assert not (tmp_path / "latest").exists()


def test_directory_with_a_tape_is_not_used_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for expected in ("mine", "mine-2", "mine-3"):
        with caplog.at_level(logging.WARNING):
            run_dir = make_run_dir("mine")
        assert run_dir == tmp_path / expected
        (run_dir / "tape.jsonl").touch()
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'mine'} holds the tape of an earlier job; this job uses {tmp_path / name}." for name in ("mine-2", "mine-3")
    ]


def test_given_directory_inside_outputs_gets_the_link(tmp_path: Path):
    run_dir = make_run_dir(tmp_path / "elsewhere" / "outputs" / "a")
    assert os.readlink(run_dir.parent / "latest") == "a"
    make_run_dir(tmp_path / "elsewhere" / "outputs" / "b")
    assert os.readlink(run_dir.parent / "latest") == "b"


def test_link_that_cannot_be_set_costs_a_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "outputs" / "latest").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        run_dir = make_run_dir()
    assert run_dir.is_dir()
    assert "latest could not be set" in caplog.text
    assert sorted(p.name for p in (tmp_path / "outputs").iterdir()) == sorted([run_dir.name, "latest"])


def test_path_that_is_a_file_is_refused_with_a_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"run_dir='file': cannot be created"):
        make_run_dir("file")


def test_names_that_are_all_taken_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rundir_module, "_MAX_SUFFIX", 3)
    for name in ("mine", "mine-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "tape.jsonl").touch()
    with pytest.raises(ConfigurationError, match="are taken"):
        make_run_dir("mine")


def test_lock_is_exclusive_until_it_is_closed(tmp_path: Path):
    with lock_run_dir(tmp_path) as lock:
        with pytest.raises(ConfigurationError, match="another syncer holds this run directory"):
            lock_run_dir(tmp_path)
        lock.close()
        lock_run_dir(tmp_path).close()


def test_lock_of_a_dead_process_is_free(tmp_path: Path):
    program = (
        "import sys, time; from pathlib import Path\n"
        "from lightning_diloco.runtime.rundir import lock_run_dir\n"
        "lock = lock_run_dir(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ROOT})
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigurationError, match="another syncer"):
            lock_run_dir(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    lock_run_dir(tmp_path).close()


def test_directory_that_is_missing_cannot_be_locked(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="missing: cannot be written to"):
        lock_run_dir(tmp_path / "missing")
