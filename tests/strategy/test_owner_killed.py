"""Scenarios 4 and 14: learner 0, which owns logger and checkpoints, is killed; a learner's decision to stop ends the job for all."""

from __future__ import annotations

import csv
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger

from lightning_diloco import DecoupledDiLoCoStrategy
from tests.strategy.kit import TinyModel, equal, global_parameters, latest, loader, parameters_of, quiet
from tests.tape_checker import check_run

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(240)]

FAST = {"num_fragments": 2, "sync_interval_steps": 8, "heartbeat_s": 0.2}
KILLED_AT = 120


class OwnerKilled(TinyModel):
    """Learner 0 is killed in its first life; learner 1 is not through before it is back."""

    def __init__(self) -> None:
        super().__init__(step_s=0.01)

    def training_step(self, batch, batch_idx):
        place = self.trainer.strategy.assignment
        if place.learner_id == 0 and place.life == 0 and batch_idx == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        back, end_s = place.run_dir / "back", time.monotonic() + 60
        if place.learner_id == 0 and place.life == 1:
            back.touch()
        while place.learner_id == 1 and batch_idx == 300 and not back.exists() and time.monotonic() < end_s:
            time.sleep(0.05)
        return super().training_step(batch, batch_idx)


def rows_of(path: Path, name: str) -> list[tuple[int, float]]:
    with path.open() as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def test_a_fit_whose_learner_zero_is_killed_has_its_checkpoints_and_its_whole_log(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    strategy = DecoupledDiLoCoStrategy(**FAST)
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="val_loss", save_top_k=2)
    options = quiet(devices=2, max_steps=600, strategy=strategy, callbacks=[best], val_check_interval=50, num_sanity_val_steps=0)
    del options["enable_checkpointing"]
    options["logger"] = CSVLogger(tmp_path / "csv")
    trainer, model = Trainer(**options, log_every_n_steps=10), OwnerKilled()
    trainer.fit(model, loader(8192), loader(16))
    assert "learner 0 was ended by SIGKILL; restart 1 of at most 3" in caplog.text
    assert strategy.summary["status"] == "finished" and strategy.summary["restarts"]["learners"] == 1
    state = torch.load(best.best_model_path, weights_only=True)
    assert 0 < state["global_step"] <= 600 and best.best_model_score is not None
    (metrics,) = (tmp_path / "csv").rglob("metrics.csv")
    for name in ("train_loss", "val_loss"):
        steps = [step for step, _ in rows_of(metrics, name)]
        assert min(steps) < KILLED_AT < max(steps), f"{name}: {steps}"
    check_run(latest(tmp_path))
    assert equal(parameters_of(model), global_parameters(latest(tmp_path)))


@pytest.mark.parametrize(
    ("callback", "least"),
    [
        (lambda: EarlyStopping("val_loss", min_delta=9.0, patience=1), 1),
        (lambda: EarlyStopping("val_loss", min_delta=9.0, patience=1), 300),
        (lambda: Timer(duration=timedelta(seconds=4)), 1),
    ],
    ids=["early stopping", "early stopping, min_steps", "timer"],
)
def test_a_decision_to_stop_ends_the_job_for_all_in_bounded_time(callback, least, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strategy = DecoupledDiLoCoStrategy(**FAST)
    options = quiet(
        devices=2, max_steps=100_000, min_steps=least, min_epochs=0, strategy=strategy, callbacks=[callback()], val_check_interval=40
    )
    start_s, model = time.monotonic(), TinyModel(step_s=0.01)
    Trainer(**options).fit(model, loader(400_000), loader(16))
    steps = [learner["inner_steps"] for learner in strategy.summary["learners"]]
    assert strategy.summary["status"] == "finished" and len(steps) == 2
    # At 10 ms a step the limit would be reached after a quarter of an hour.
    assert min(steps) >= least and max(steps) < 10_000 and time.monotonic() - start_s < 120
    check_run(latest(tmp_path))
    assert equal(parameters_of(model), global_parameters(latest(tmp_path)))
