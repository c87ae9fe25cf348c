"""Learner processes: what comes back, what is restarted, and that nothing is left behind. Each test is a run of several seconds."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_diloco import DecoupledDiLoCoStrategy, LearnerFailedError
from tests.strategy.kit import (
    TinyModel,
    equal,
    global_parameters,
    latest,
    loader,
    parameters_of,
    quiet,
    summary_of,
)

pytestmark = pytest.mark.process
FAST = {"num_fragments": 2, "sync_interval_steps": 8}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Data(pl.LightningDataModule):
    """Notes in files which process prepared, and which part each learner trained on."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def prepare_data(self):
        with (self.folder / "prepared").open("a") as file:
            file.write(f"{os.getpid()}\n")

    def train_dataloader(self):
        return loader(96)

    def val_dataloader(self):
        return loader(16, seed=1)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class Notes(Callback):
    """What each learner saw, in a file of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        sampler = trainer.train_dataloader.sampler
        self._write(trainer, f"shard {sampler.num_replicas} {sampler.rank}")
        self._write(trainer, f"val {len(trainer.val_dataloaders)}")
        self._write(trainer, f"seed {torch.initial_seed()}")
        self._write(trainer, f"threads {torch.get_num_threads()}")

    def on_exception(self, trainer, pl_module, exception):
        self._write(trainer, f"exception {type(exception).__name__}")

    def _write(self, trainer, line):
        with (self.folder / f"learner_{trainer.global_rank}.txt").open("a") as file:
            file.write(line + "\n")


def notes(folder: Path, learner_id: int) -> list[str]:
    return (folder / f"learner_{learner_id}.txt").read_text().splitlines()


def logged_rows(logs: Path) -> list[dict[str, str]]:
    """What was logged, in one version: the learners have not made any of their own."""
    (version,) = logs.iterdir()
    assert version.name == "version_0"
    with (version / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_whole_life_of_a_trainer(tmp_path):
    """Scenarios 10, 12, 19 and 24: a local class with a closure, a datamodule, loggers and checkpoints; two fits, one in a thread."""
    factor = 2.0

    class Local(TinyModel):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * factor

    model, data = Local(step_s=0.005, optimizer="adamw"), Data(tmp_path)
    best = ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)
    logger = CSVLogger(tmp_path / "logs")
    strategy = DecoupledDiLoCoStrategy(**FAST)
    options = quiet(devices=2, max_epochs=3, strategy=strategy, logger=logger, log_every_n_steps=4)
    trainer = Trainer(**{**options, "enable_checkpointing": True, "callbacks": [best, Notes(tmp_path)]})
    untrained = trainer.validate(model, data, verbose=False)[0]["val_loss"]

    trainer.fit(model, data)
    run_dir = latest(tmp_path)
    assert equal(parameters_of(model), global_parameters(run_dir))
    assert (trainer.current_epoch, trainer.global_step, str(trainer.state.status)) == (3, 36, "TrainerStatus.FINISHED")
    assert {"val_loss", "train_loss"} <= trainer.callback_metrics.keys()
    assert strategy.summary == summary_of(run_dir)
    assert [learner["inner_steps"] <= 36 for learner in strategy.summary["learners"]] == [True, True]
    assert strategy.summary["tokens"] == strategy.summary["tokens_merged"]

    # Once for the machine and each Trainer call, never in a learner.
    assert set((tmp_path / "prepared").read_text().split()) == {str(os.getpid())}
    first, second = notes(tmp_path, 0), notes(tmp_path, 1)
    assert (first[0], second[0]) == ("shard 2 0", "shard 2 1")
    assert first[1] == second[1] == "val 4"
    assert first[2] != second[2]
    assert first[3] == second[3] == "threads 1"

    # Written once, by learner 0; all hold a global model; what is known of them has come back.
    files = sorted(path.name for path in Path(best.dirpath).iterdir())
    assert len(files) == 3
    assert Path(best.best_model_path).is_file()
    assert best.best_model_score is not None
    assert len(best.best_k_models) == 2
    assert TinyModel.load_from_checkpoint(best.best_model_path) is not None

    trained = trainer.validate(model, data, verbose=False)[0]["val_loss"]
    assert trained < untrained
    assert trained == pytest.approx(strategy.summary["val"]["val_loss"])
    assert "test_loss" in trainer.test(ckpt_path="best", datamodule=data, verbose=False)[0]
    assert sum(len(batch) for batch in trainer.predict(model, data)) == 16
    assert any(row["train_loss"] for row in logged_rows(tmp_path / "logs" / "lightning_logs"))

    # A second fit is a new job that goes on from here, and may be called from any thread.
    first_job, before = strategy.summary["job_id"], parameters_of(model)
    trainer.fit_loop.max_epochs = 4
    thread = threading.Thread(target=trainer.fit, args=(model, data), kwargs={"ckpt_path": "last"})
    thread.start()
    thread.join()
    assert (trainer.current_epoch, trainer.global_step) == (4, 48)
    assert strategy.summary["job_id"] != first_job
    assert latest(tmp_path) != run_dir
    assert not equal(parameters_of(model), before)
    assert equal(parameters_of(model), global_parameters(latest(tmp_path)))


class MyError(RuntimeError):
    """An exception type of the user's own."""


class Raising(TinyModel):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_rank == 1 and batch_idx == 5:
            raise MyError("of learner 1")
        return super().training_step(batch, batch_idx)


def test_an_exception_in_one_learner_is_raised_here_and_ends_the_job(tmp_path):
    """Scenario 7."""
    model = Raising(step_s=0.02)
    start = parameters_of(model)
    on_exception = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_on_exception=True, every_n_train_steps=100_000)
    strategy = DecoupledDiLoCoStrategy(**FAST)
    options = quiet(devices=2, max_steps=3000, strategy=strategy, callbacks=[Notes(tmp_path), on_exception])
    trainer = Trainer(**{**options, "enable_checkpointing": True})
    with pytest.raises(MyError, match="of learner 1") as caught:
        trainer.fit(model, loader(4096), loader(8))
    assert isinstance(caught.value.__cause__, LearnerFailedError)
    assert "in training_step" in str(caught.value.__cause__)
    assert equal(parameters_of(model), start)
    assert notes(tmp_path, 1)[-1] == "exception MyError"
    assert "exception SIGTERMException" in notes(tmp_path, 0)
    for path in (tmp_path / "ckpt").glob("*.ckpt"):
        assert not equal(dict(torch.load(path, weights_only=True)["state_dict"]), start)
    assert strategy.summary["status"] == summary_of(latest(tmp_path))["status"] == "failed"
    assert "MyError" in (latest(tmp_path) / "logs" / "learner_1.log").read_text()
    assert not (latest(tmp_path) / "launch").exists()


class Killed(TinyModel):
    """Learner 1 is killed in its first life once it has trained a while, and in every life if it is told so."""

    def __init__(self, always: bool = False) -> None:
        super().__init__(step_s=0.02, optimizer="adamw")
        self.always = always

    def training_step(self, batch, batch_idx):
        place = self.trainer.strategy.assignment
        if place.learner_id == 1 and batch_idx == 12 and (self.always or place.life == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        self._meet(place, batch_idx)
        return super().training_step(batch, batch_idx)

    def _meet(self, place, batch_idx) -> None:
        """Neither is killed before the job has a step, nor through before the other is back, however long a process needs to start."""
        ahead, second = place.run_dir / "ahead", place.run_dir / "second_life"
        end_s = time.monotonic() + 60
        if place.learner_id == 0 and batch_idx == 30:
            ahead.touch()
        while place.learner_id == 1 and place.life == 0 and batch_idx == 11 and not ahead.exists() and time.monotonic() < end_s:
            time.sleep(0.05)
        if place.life == 1 and not second.exists():
            (optimizer,) = self.trainer.optimizers
            second.write_text(json.dumps([int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in self.parameters()]))
        while place.learner_id == 0 and batch_idx == 400 and not (self.always or second.exists()) and time.monotonic() < end_s:
            time.sleep(0.05)


def test_a_killed_learner_is_restarted_and_goes_on_at_the_jobs_step(tmp_path, caplog):
    strategy = DecoupledDiLoCoStrategy(**FAST, rejoin_every_steps=4)
    trainer = Trainer(**quiet(devices=2, max_steps=500, strategy=strategy))
    model = Killed()
    trainer.fit(model, loader(8192))
    summary = strategy.summary
    assert "learner 1 was ended by SIGKILL; restart 1 of at most 3" in caplog.text
    assert summary["restarts"] == {"learners": 1, "syncer": 0}
    assert [learner["incarnations"] for learner in summary["learners"]] == [1, 2]
    assert summary["learners"][0]["inner_steps"] == 500
    # Its second life began at the job's step, not at its own zero, and ended at the job's limit.
    assert 12 < summary["learners"][1]["inner_steps"] < 500
    # It has the moments of its first life, saved at the 8th step or later, or newer ones of the other learner.
    steps = json.loads((latest(tmp_path) / "second_life").read_text())
    assert len(steps) == 4 and min(steps) >= 8
    assert not (latest(tmp_path) / "rejoin").exists()
    assert summary["status"] == "finished"
    assert equal(parameters_of(model), global_parameters(latest(tmp_path)))


@pytest.mark.slow
def test_a_learner_that_is_killed_too_often_ends_the_job(tmp_path):
    strategy = DecoupledDiLoCoStrategy(**FAST, max_restarts=0)
    trainer = Trainer(**quiet(devices=2, max_steps=3000, strategy=strategy))
    with pytest.raises(LearnerFailedError, match=r"Learner 1 was ended by SIGKILL, after 0 restarts \(max_restarts=0\).*learner_1\.log"):
        trainer.fit(Killed(always=True), loader(16384))
    assert strategy.summary["status"] == "failed"
