"""`summary.json` follows the tape, is replaced whole, and no error of it ends a run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from lightning_diloco.metrics import LedgerError
from lightning_diloco.protocol.records import encode_line
from lightning_diloco.runtime import summary as summary_module
from lightning_diloco.runtime.summary import SummaryKeeper, write_summary
from lightning_diloco.runtime.tape import TapeError
from tests.metrics.tape_builder import TapeBuilder, two_learner_run
from tests.tape_checker import check_run


def read(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def append(run_dir: Path, tape: TapeBuilder, start: int = 0, end: int | None = None) -> None:
    with (run_dir / "tape.jsonl").open("ab") as file:
        file.write(b"".join(map(encode_line, tape.lines[start:end])))


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path):
    write_summary(tmp_path, {"a": math.nan, "b": [1.5, math.inf], "c": {"d": (-math.inf, 2)}, 3: True})
    assert read(tmp_path) == {"a": None, "b": [1.5, None], "c": {"d": [None, 2]}, "3": True}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_failed_writing_leaves_the_old_summary_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_summary(tmp_path, {"a": 1})

    def fsync(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(summary_module.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        write_summary(tmp_path, {"a": 2})
    assert read(tmp_path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_keeper_follows_the_tape_and_ends_with_the_whole_of_it(tmp_path: Path):
    tape = two_learner_run()
    keeper = SummaryKeeper(tmp_path, period_s=5.0)
    keeper.known = {"startup_s": 9.5, "restarts": {"learners": 2, "syncer": 0}}
    assert keeper.tick(100.0)
    assert read(tmp_path)["job_id"] is None
    append(tmp_path, tape, 0, 20)
    assert not keeper.tick(104.9)
    assert read(tmp_path)["job_id"] is None
    assert keeper.tick(105.0)
    running = read(tmp_path)
    assert (running["status"], running["startup_s"], running["restarts"]["learners"]) == ("running", 9.5, 2)
    assert 0 < running["tokens"] < 195
    append(tmp_path, tape, 20)
    final = keeper.finish()
    assert final == tape.summary()
    assert final == read(tmp_path)
    assert keeper.error is None
    check_run(tmp_path)


def test_known_figures_stand_until_the_run_record(tmp_path: Path):
    tape = two_learner_run()
    append(tmp_path, tape, 0, -1)
    keeper = SummaryKeeper(tmp_path)
    keeper.known = {"startup_s": 9.5}
    assert keeper.finish()["startup_s"] == 9.5
    append(tmp_path, tape, len(tape.lines) - 1)
    assert keeper.finish()["startup_s"] == 3.5


def test_status_is_running_while_it_ticks_even_after_the_end_record(tmp_path: Path):
    append(tmp_path, two_learner_run(), 0, -1)
    keeper = SummaryKeeper(tmp_path)
    assert keeper.tick(0.0)
    assert read(tmp_path)["status"] == "running"
    assert keeper.finish()["status"] == "finished"


def test_ledger_violation_is_loud_and_the_summary_is_written_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tape = TapeBuilder()
    tape.job()
    tape.join(0)
    tape.progress(0, 2, 20)
    tape.merge(0, [tape.contribute(0, 0, 3, 30)], (0,))
    tape.end()
    append(tmp_path, tape)
    keeper = SummaryKeeper(tmp_path)
    with caplog.at_level(logging.ERROR):
        summary = keeper.finish()
    assert isinstance(keeper.error, LedgerError)
    assert "Learner 0, fragment 0" in caplog.text
    assert summary["tokens"] == 30
    assert read(tmp_path) == summary


def test_damaged_tape_is_loud_once_and_what_came_before_is_folded(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tape = two_learner_run()
    append(tmp_path, tape, 0, 4)
    with (tmp_path / "tape.jsonl").open("ab") as file:
        file.write(b"garbage\n")
    keeper = SummaryKeeper(tmp_path, period_s=0.0)
    with caplog.at_level(logging.ERROR):
        assert keeper.tick(0.0)
        assert not keeper.tick(1.0)
        assert not keeper.tick(2.0)
        assert keeper.finish()["job_id"] == "j1"
    assert isinstance(keeper.error, TapeError)
    assert len(caplog.records) == 1


def test_disk_error_at_the_end_still_returns_the_summary(tmp_path: Path):
    keeper = SummaryKeeper(tmp_path / "gone")
    assert not keeper.tick(0.0)
    assert keeper.finish()["status"] == "running"
    assert isinstance(keeper.error, FileNotFoundError)
