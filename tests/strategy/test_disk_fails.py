"""`fit` on a disk that fails while something starts again: learners train on, the log is loud, and the result is there."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_diloco import DecoupledDiLoCoStrategy
from tests.disk_kit import WAYS, small_disk
from tests.strategy.kit import TinyModel, equal, global_parameters, loader, parameters_of, quiet, summary_of, wait_until
from tests.tape_checker import check_run, load_tape

pytestmark = [pytest.mark.process, pytest.mark.slow]

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
            return tape.exists() and any(e["event"] == "merge" and e["version"][1] >= 5 for e in load_tape(tape))

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
    assert job.trainer.callback_metrics.keys() == {"train_loss"} and str(job.trainer.state.status) == "TrainerStatus.FINISHED"


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
