"""One learner with a neutral outer optimizer, where merging is the identity: what it may leave out, and that it loses nothing."""

from __future__ import annotations

import time

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_diloco import DecoupledDiLoCoStrategy
from tests.strategy.kit import TinyModel, loader, quiet

NEUTRAL = {
    "launch": "inline",
    "num_fragments": 4,
    "sync_interval_steps": 4,
    "outer_lr": 1.0,
    "outer_momentum": 0.0,
    "wire_dtype": "fp32",
}


class Counting(TinyModel):
    """Counts the batches that it validates, in whichever copy."""

    seen: list[int] = []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append(batch_idx)
        self.log("val_loss", self(batch[0]).pow(2).mean())


@pytest.mark.parametrize(
    ("steps", "num_loaders", "sync", "runs"), [(16, 1, {}, 2), (20, 1, {}, 3), (16, 2, {}, 3), (16, 1, {"outer_lr": 0.9}, 3)]
)
def test_the_last_validation_is_not_run_twice_if_it_was_of_the_final_model(steps, num_loaders, sync, runs, tmp_path):
    """Eight batches are an epoch: two validations inside the fit, and one after it where the weights have changed since."""
    Counting.seen.clear()
    model = Counting()
    strategy = DecoupledDiLoCoStrategy(**{**NEUTRAL, **sync}, run_dir=tmp_path)
    trainer = Trainer(**quiet(strategy=strategy, devices=1, max_steps=steps, num_sanity_val_steps=0))
    trainer.fit(model, loader(32), [loader(8) for _ in range(num_loaders)])
    assert len(Counting.seen) == 2 * runs * num_loaders
    val = strategy.summary["val"]
    again = Trainer(**quiet(accelerator="cpu")).validate(model, [loader(8) for _ in range(num_loaders)], verbose=False)
    assert val == pytest.approx({name: value for results in again for name, value in results.items()}, rel=1e-5)


class Jumping(Counting):
    """Its last step is an outlier, which the norm gate refuses."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 64:
            with torch.no_grad():
                self.head.weight.add_(100.0)


def test_a_last_validation_of_what_was_refused_is_not_kept(tmp_path):
    model = Jumping(step_s=0.002)
    strategy = DecoupledDiLoCoStrategy(**NEUTRAL, run_dir=tmp_path)
    trainer = Trainer(**quiet(strategy=strategy, devices=1, max_steps=64, num_sanity_val_steps=0))
    trainer.fit(model, loader(256), loader(8))
    assert strategy.summary["discarded_by_reason"]["norm"] > 0
    (again,) = Trainer(**quiet(accelerator="cpu")).validate(model, loader(8), verbose=False)
    assert strategy.summary["val"]["val_loss"] == pytest.approx(again["val_loss"], rel=1e-5)


def test_with_a_neutral_outer_optimizer_the_published_model_is_the_learners_at_every_end(tmp_path):
    """What is carried and what follows it at the end are added up: averaged, half of the last steps would be lost."""

    class Late(Callback):
        """Lets the syncer's answers come in at odd moments, and keeps the weights of the last step."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            time.sleep(0.02 * (batch_idx % 3 == 0))
            self.last = {k: v.clone() for k, v in pl_module.state_dict().items()}

    for steps in range(9, 15):
        last = Late()
        strategy = DecoupledDiLoCoStrategy(**NEUTRAL, run_dir=tmp_path / str(steps))
        model = TinyModel()
        Trainer(**quiet(strategy=strategy, devices=1, max_steps=steps, callbacks=[last])).fit(model, loader())
        for name, value in last.last.items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-7)
