"""Two learners with the default options learn what one learns: the schedule of rounds must average them, not take them in turn."""

from __future__ import annotations

import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_diloco  # noqa: F401 - makes the name "decoupled_diloco" known
from tests.strategy.kit import quiet

pytestmark = pytest.mark.process


class Regression(pl.LightningModule):
    """y = sum(x), of variance 8: an untrained network has a loss of about 8, a trained one of a few thousandths."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        time.sleep(0.015)  # much shorter steps leave K=1 no grace window: docs/concepts.md, "Short steps"
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader(batch_size: int, shuffle: bool) -> DataLoader:
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size, shuffle=shuffle)


@pytest.mark.slow
@pytest.mark.parametrize("num_learners", [2, 3])
def test_learners_with_default_options_learn(tmp_path, monkeypatch, num_learners):
    monkeypatch.chdir(tmp_path)
    seed_everything(1, verbose=False)
    module = Regression()
    trainer = Trainer(strategy="decoupled_diloco", devices=num_learners, max_steps=600, **quiet())
    trainer.fit(module, loader(8, True), loader(64, False))
    summary = trainer.strategy.summary
    assert summary["val"]["val_loss"] < 0.1
    assert summary["mean_members"] > 0.6 * num_learners
    for row in summary["fragments"]:
        assert row["pending"] == 0
        # The bias of the output is a fragment of one number, whose norm per step can be ten times its running median.
        assert row["discarded"] == 0 or row["num_params"] == 1
    assert {reason for reason, tokens in summary["discarded_by_reason"].items() if tokens} <= {"norm"}
    # The first lives of a job begin together: none of them misses steps because it needed longer to start.
    assert [row["inner_steps"] for row in summary["learners"]] == [600] * num_learners
    assert summary["config"]["num_fragments"] == 4, "the effective number: the model has four tensors"
