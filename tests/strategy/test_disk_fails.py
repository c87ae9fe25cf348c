"""`fit` on a disk that fails while something starts again: learners train on, the log is loud, and the result is there."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.errors import SyncerUnavailableError
from lightning_diloco.protocol.records import EndRecord
from lightning_diloco.runtime.children import child_environment, start_child
from lightning_diloco.runtime.counters import open_counters
from lightning_diloco.runtime.rundir import make_run_dir
from lightning_diloco.runtime.tape import TAPE_NAME, TapeWriter
from lightning_diloco.strategy.exchange import Exchange
from lightning_diloco.strategy.finish import JobRecorder, do_without_global_model
from lightning_diloco.strategy.results import LearnerResult, leave_result, read_result
from lightning_diloco.strategy.syncer_child import SyncerChild
from tests.disk_kit import WAYS, full, small_disk
from tests.strategy.kit import ROOT, TinyModel, equal, global_parameters, loader, parameters_of, quiet, summary_of, wait_until
from tests.tape_checker import check_run, load_tape

pytestmark = pytest.mark.process

FAST = {"num_fragments": 2, "sync_interval_steps": 8, "heartbeat_s": 0.2, "outer_momentum": 0.3, "outer_lr": 0.5, "drain_timeout_s": 10.0}
MEET_AT = 300


class Meeting(TinyModel):
    """Every learner says its process and its steps in a folder elsewhere, and trains no further than a step until it may."""

    def __init__(self, folder: Path) -> None:
        super().__init__(step_s=0.01)
        self.folder = folder

    def training_step(self, batch, batch_idx):
        place = self.trainer.strategy.assignment
        path = self.folder / f"learner_{place.learner_id}_{place.life}"
        path.with_suffix(".tmp").write_text(f"{os.getpid()} {batch_idx}")
        path.with_suffix(".tmp").replace(path)
        end_s = time.monotonic() + 100
        while batch_idx == MEET_AT and not (self.folder / "go").exists() and time.monotonic() < end_s:
            time.sleep(0.05)
        return super().training_step(batch, batch_idx)


class Job:
    """A fit in the main thread, and beside it a script of what happens to its disk and its processes."""

    def __init__(self, folder: Path, disk: Path) -> None:
        self.folder, self.disk, self.run_dir = folder, disk, disk / "run"
        self.strategy = DecoupledDiLoCoStrategy(**FAST, run_dir=self.run_dir)
        self.model = Meeting(folder)
        self.before = parameters_of(self.model)
        self.trainer = Trainer(**quiet(devices=2, max_steps=400, strategy=self.strategy))

    def fit(self, script: Callable[[], None]) -> None:
        failed: list[BaseException] = []

        def run() -> None:
            try:
                script()
            except BaseException as error:  # noqa: BLE001 - for the main thread
                failed.append(error)
            finally:
                (self.folder / "go").touch()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            self.trainer.fit(self.model, loader(8192))
        finally:
            thread.join()
            if failed:
                raise failed[0]

    def until_merged(self) -> None:
        def is_merged() -> bool:
            tape = self.run_dir / "tape.jsonl"
            is_there = bool(self.said(0, 0)) and bool(self.said(1, 0)) and tape.exists()
            return is_there and any(e["event"] == "merge" and e["version"][1] >= 5 for e in load_tape(tape))

        wait_until(is_merged, "some merges")

    def said(self, learner_id: int, life: int) -> list[int]:
        path = self.folder / f"learner_{learner_id}_{life}"
        return [int(word) for word in path.read_text().split()] if path.exists() else []

    def kill_syncer(self) -> None:
        os.kill(json.loads((self.run_dir / "syncer.json").read_text())["pid"], signal.SIGKILL)

    def kill_learner(self, learner_id: int) -> None:
        os.kill(self.said(learner_id, 0)[0], signal.SIGKILL)


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with small_disk(tmp_path / "disk", "8m") as disk:
        yield Job(tmp_path, disk)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_syncer_that_cannot_write_at_its_restart_is_tried_again_until_the_disk_takes_it(job, way, caplog):
    job_steps: list[int] = []

    def script() -> None:
        job.until_merged()
        with WAYS[way](job.disk):
            job.kill_syncer()
            steps = job.said(0, 0)[1]
            wait_until(lambda: caplog.text.count("its disk takes nothing") >= 3, "three tries")
            job_steps.append(job.said(0, 0)[1] - steps)
        wait_until(lambda: any(e["event"] == "restart" for e in load_tape(job.run_dir / "tape.jsonl")), "the restart")

    job.fit(script)
    assert job_steps[0] > 20, "it trained meanwhile"
    summary = check_run(job.run_dir)
    assert summary["status"] == "finished" and summary["restarts"] == {"learners": 0, "syncer": 1}, "a disk uses up no restarts"
    assert "the syncer was ended by SIGKILL; restart 1 of at most 3" in caplog.text
    assert equal(parameters_of(job.model), global_parameters(job.run_dir))
    (restart,) = [e for e in load_tape(job.run_dir / "tape.jsonl") if e["event"] == "restart"]
    assert all(f["version"] > n for f, (_, n) in zip(summary["fragments"], restart["versions"], strict=True)), "it merged again after it"


@pytest.mark.slow
@pytest.mark.parametrize("learner_id", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_a_learner_that_cannot_write_at_its_restart_trains_on_and_the_fit_returns(job, way, learner_id, caplog, capfd):
    stack = ExitStack()

    def script() -> None:
        job.until_merged()
        stack.enter_context(WAYS[way](job.disk))
        job.kill_learner(learner_id)
        wait_until(lambda: bool(job.said(learner_id, 1)) and job.said(learner_id, 1)[1] > 20, "steps of the second life")

    with stack:
        job.fit(script)
        output = capfd.readouterr().err
    assert job.strategy.summary["status"] == "finished" and job.strategy.summary["restarts"]["learners"] == 1
    trained = parameters_of(job.model)
    assert not equal(trained, job.before) and all(torch.isfinite(value).all() for value in trained.values())
    if learner_id == 0:
        assert output.count("cannot be kept in a file") == 1
    assert "last.ckpt could not be written" in caplog.text
    assert not (job.run_dir / "global.safetensors").exists() and "is nowhere" not in caplog.text, "the model came by another disk"
    assert job.trainer.callback_metrics.keys() == {"train_loss"} and str(job.trainer.state.status) == "TrainerStatus.FINISHED"


@pytest.mark.slow
def test_a_disk_that_is_free_again_before_the_end_has_the_whole_run(job):
    def script() -> None:
        job.until_merged()
        with WAYS["full"](job.disk):
            job.kill_learner(1)
            wait_until(lambda: bool(job.said(1, 1)) and job.said(1, 1)[1] > 20, "steps of the second life")

    job.fit(script)
    summary = check_run(job.run_dir)
    assert summary["status"] == "finished" and summary == summary_of(job.run_dir)
    assert equal(parameters_of(job.model), global_parameters(job.run_dir)) and (job.run_dir / "checkpoints" / "last.ckpt").exists()


# ---- the parts ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as path:
        (path / "run").mkdir()
        yield path


@pytest.mark.parametrize("way", WAYS)
def test_the_last_word_of_a_run_that_cannot_be_written_is_in_the_summary_that_is_returned(way, disk, caplog):
    run_dir = make_run_dir(disk / "run")
    # To the last byte of a page: the disk is full, and the page has no room either.
    for length in (0, 4096):
        (run_dir / TAPE_NAME).touch()
        missing = length - (run_dir / TAPE_NAME).stat().st_size
        (run_dir / TAPE_NAME).unlink()
        tape = TapeWriter(run_dir / TAPE_NAME, now=lambda: 0.0)
        tape.write(EndRecord(status="finished", versions=(), global_sha256="x" * missing))
        tape.close()
    assert (run_dir / TAPE_NAME).stat().st_size == 4096
    restarts, val = {"learners": 2, "syncer": 1}, {"val_loss": 0.5}
    with WAYS[way](disk):
        summary = JobRecorder(run_dir, 0.0).finish("finished", restarts, val)
    said = {name: summary[name] for name in ("status", "startup_s", "restarts", "val")}
    assert said == {"status": "finished", "startup_s": None, "restarts": restarts, "val": val}, "nobody has joined"
    assert "the run's end could not be written" in caplog.text and "is incomplete" in caplog.text
    assert [e["event"] for e in load_tape(run_dir / TAPE_NAME)] == ["end"] and not (run_dir / "summary.json").exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_result_goes_to_another_disk_and_is_lost_aloud_without_one(way, disk, tmp_path, caplog):
    exchange = Exchange.make(disk / "run")
    path, spare = exchange.launch_dir / "result_0_0.pkl", exchange.spare_dir
    assert spare is not None and not spare.is_relative_to(disk)
    result = LearnerResult(outcome="done", metrics={"logged": {"loss": torch.zeros(40000)}})
    with WAYS[way](disk):
        leave_result(result, path, None)
        assert "The result of this learner is lost" in caplog.text and list(exchange.launch_dir.iterdir()) == []
        assert exchange.found(path.name, exchange.launch_dir) == exchange.launch_dir
        leave_result(result, path, spare)
        found = read_result(exchange.found(path.name, exchange.launch_dir) / path.name)
    assert found is not None and found.outcome == "done" and [p.name for p in spare.iterdir()] == [path.name]
    exchange.remove()
    assert not spare.exists() and not exchange.launch_dir.exists()


def test_without_a_folder_for_temporary_files_a_fit_begins_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    exchange = Exchange.make(tmp_path)
    assert exchange.spare_dir is None and exchange.found("x", tmp_path) == tmp_path and "no second place" in caplog.text


@pytest.mark.parametrize("is_lossy", [True, False])
def test_what_a_learner_prints_onto_a_full_disk_is_lost_and_ends_nothing(is_lossy, disk):
    start = "from lightning_diloco.runtime.disk import lose_output_of_a_full_disk as lose; lose()\n" if is_lossy else ""
    source = start + "print('first', flush=True)\nfor i in range(20000): print(i)\nprint('last', flush=True)\nimport os; os._exit(0)"
    with (disk / "log.txt").open("wb") as log, full(disk):
        done = subprocess.run(
            [sys.executable, "-c", source], stdout=log, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
        )
    assert (done.returncode == 0) is is_lossy, done.stderr
    if not is_lossy:
        assert b"No space left" in done.stderr


def test_what_is_printed_into_a_file_with_room_is_there_in_its_order(tmp_path):
    source = (
        "import sys\nfrom lightning_diloco.runtime.disk import lose_output_of_a_full_disk as lose\nprint('a\u00e4')\nlose()\nprint('b')"
    )
    with (tmp_path / "log.txt").open("wb") as log:
        subprocess.run([sys.executable, "-c", source], stdout=log, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert (tmp_path / "log.txt").read_text() == "a\u00e4\nb\n"


@pytest.mark.parametrize("way", WAYS)
def test_totals_that_cannot_be_kept_are_said_to_be_lost(way, disk, caplog):
    with WAYS[way](disk):
        assert open_counters(disk / "run" / "totals.bin") is None
        assert not (disk / "run" / "totals.bin").exists()
    assert "cannot be kept in a file" in caplog.text and "in no account" in caplog.text
    counters = open_counters(disk / "run" / "totals.bin")
    assert counters is not None
    counters.close()


def test_a_process_whose_log_cannot_be_opened_is_started_and_shows_what_it_says_here(disk, caplog, capfd):
    with WAYS["read_only"](disk):
        child = start_child("this", [], log=disk / "run" / "logs" / "x.log", environment=child_environment(1))
        wait_until(lambda: child.poll() is not None, "its end")
    assert "x.log cannot be written to" in caplog.text and "The Zen of Python" in capfd.readouterr().out


def test_a_first_start_on_a_disk_that_takes_nothing_is_a_sentence(disk):
    with full(disk):
        child = SyncerChild(disk / "run", {"token": "", "num_slots": 1}, child_environment(1), 3)
        child.start()
        with pytest.raises(SyncerUnavailableError, match=r"could not start: the disk of .*/run takes nothing\. Free it"):
            wait_until(lambda: child.look_after() is not None, "the sentence")
    assert child.restarts == 0


def test_without_a_global_model_the_weights_are_learner_zeros_or_there_is_an_error(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lightning_diloco")
    trained, module = TinyModel(), TinyModel()
    before = parameters_of(module)
    do_without_global_model(module, tmp_path, None, has_begun=False)
    assert equal(parameters_of(module), before) and "no learner has joined" in caplog.text
    do_without_global_model(module, tmp_path, {"state_dict": trained.state_dict()}, has_begun=True)
    assert equal(parameters_of(module), parameters_of(trained)) and "is nowhere" in caplog.text
    with pytest.raises(SyncerUnavailableError, match=r"lightning-diloco export .* newest snapshot"):
        do_without_global_model(module, tmp_path, None, has_begun=True)


class Filling(TinyModel):
    """Fills the disk in the middle of its training."""

    def __init__(self, stack: ExitStack, way: Callable) -> None:
        super().__init__(step_s=0.005)
        self.stack, self.way = stack, way

    def training_step(self, batch, batch_idx):
        if batch_idx == 40:
            self.stack.enter_context(self.way)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("way", WAYS)
def test_an_inline_fit_on_a_disk_that_fails_returns_with_its_weights(way, disk, caplog):
    strategy = DecoupledDiLoCoStrategy(**FAST, launch="inline", run_dir=disk / "run")
    with ExitStack() as stack:
        model = Filling(stack, WAYS[way](disk))
        before = parameters_of(model)
        trainer = Trainer(**quiet(devices=1, max_steps=80, strategy=strategy))
        trainer.fit(model, loader(1024))
        assert not (disk / "run" / "global.safetensors").exists()
    assert trainer.global_step == 80 and strategy.summary["status"] == "finished" and not equal(parameters_of(model), before)
    assert "last.ckpt could not be written" in caplog.text and "is nowhere" not in caplog.text
