"""Loggers of other packages: learner 0 alone writes, the user's metrics as well as ours."""

from __future__ import annotations

import importlib.util

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_diloco import DecoupledDiLoCoStrategy
from tests.strategy.kit import TinyModel, loader, quiet

pytestmark = [pytest.mark.process, pytest.mark.extras]
OURS = {"diloco/merges", "diloco/participation", "diloco/stall_s", "diloco/tokens"}


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} not installed: make extras")


class Logging(TinyModel):
    """Logs its loss, and one value over all steps of an epoch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        self.log("mean_loss", loss, on_step=False, on_epoch=True)
        return loss


def fit(logger) -> Trainer:
    strategy = DecoupledDiLoCoStrategy(num_fragments=2, sync_interval_steps=3)
    trainer = Trainer(**quiet(devices=2, strategy=strategy, max_steps=60, logger=logger, log_every_n_steps=5))
    trainer.fit(Logging(step_s=0.01), loader(512))
    return trainer


@needs("tensorboard")
def test_tensorboard_gets_one_run_with_the_metrics_of_learner_0(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    trainer = fit(TensorBoardLogger(tmp_path, name="curves"))
    (folder,) = (tmp_path / "curves").iterdir()
    assert str(folder) == trainer.logger.log_dir
    (file,) = folder.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert {"loss", "mean_loss", "epoch"} | OURS <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == list(range(4, 60, 5))
    merges = [event.value for event in events.Scalars("diloco/merges")]
    assert merges == sorted(merges) and merges[-1] > 5


@pytest.mark.slow
@needs("wandb")
def test_wandb_offline_gets_one_run_with_the_metrics_of_learner_0(tmp_path, monkeypatch):
    import wandb

    monkeypatch.chdir(tmp_path)
    fit(WandbLogger(save_dir=tmp_path, offline=True, project="curves"))
    wandb.finish()
    wandb.teardown()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    written = file.read_bytes()
    assert not {name for name in {"loss", "mean_loss", "trainer/global_step"} | OURS if name.encode() not in written}
