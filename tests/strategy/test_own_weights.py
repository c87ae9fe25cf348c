"""What a callback puts into the module at the end of a fit is what `fit` returns; a module that it takes apart is returned whole."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_diloco import DecoupledDiLoCoStrategy
from tests.strategy.kit import TinyModel, equal, global_parameters, loader, parameters_of, quiet


class Ones(Callback):
    """Puts ones into the head, as an average would be put there."""

    def on_train_end(self, trainer, pl_module):
        nn.init.ones_(pl_module.head.weight)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        # A hook may leave out what it likes.
        checkpoint["state_dict"].pop("layer.bias", None)


class Wrap(Callback):
    """Leaves a module whose parameters have other names."""

    def on_train_end(self, trainer, pl_module):
        pl_module.head = nn.Sequential(pl_module.head)


class Look(Callback):
    """A forward pass in train mode, which changes running statistics."""

    def on_train_end(self, trainer, pl_module):
        pl_module.norm(torch.full((4, 8), 9.0))


class Normed(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return super().forward(self.norm(x))


def fit(tmp_path, callback, model=None, **kwargs) -> tuple[TinyModel, Trainer]:
    strategy = DecoupledDiLoCoStrategy(num_fragments=2, sync_interval_steps=3, run_dir=tmp_path, **kwargs.pop("sync", {}))
    model = TinyModel() if model is None else model
    trainer = Trainer(**quiet(strategy=strategy, max_epochs=1, num_sanity_val_steps=0, callbacks=[callback], **kwargs))
    trainer.fit(model, loader(), loader(8))
    return model, trainer


NEUTRAL = {"outer_lr": 1.0, "outer_momentum": 0.0, "wire_dtype": "fp32"}


@pytest.mark.parametrize(
    ("devices", "sync"),
    [(1, {"launch": "inline"}), (1, {"launch": "inline", **NEUTRAL}), pytest.param(2, {}, marks=[pytest.mark.process, pytest.mark.slow])],
    ids=["inline", "neutral", "processes"],
)
def test_weights_of_a_callback_are_returned_saved_and_validated(devices, sync, tmp_path):
    model, trainer = fit(tmp_path, Ones(), devices=devices, sync=sync)
    published = global_parameters(tmp_path)
    assert bool((model.head.weight == 1).all()) and not bool((published["head.weight"] == 1).any())
    assert equal({"layer.bias": model.layer.bias.detach()}, {"layer.bias": published["layer.bias"]}), "what the state lacks is published"
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=False)["state_dict"]
    assert equal({name: last[name] for name in published}, parameters_of(model))
    (again,) = Trainer(**quiet()).validate(model, loader(8), verbose=False)
    assert trainer.strategy.summary["val"]["val_loss"] == pytest.approx(again["val_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.process
def test_a_module_that_a_callback_takes_apart_is_returned_with_the_published_weights(tmp_path):
    model, _ = fit(tmp_path, Wrap(), devices=2)
    assert equal(parameters_of(model), global_parameters(tmp_path))


@pytest.mark.slow
@pytest.mark.process
def test_a_forward_pass_at_the_end_is_no_wish_for_other_weights(tmp_path):
    model, _ = fit(tmp_path, Look(), Normed(), devices=2)
    published = global_parameters(tmp_path)
    assert equal({name: value.detach() for name, value in model.state_dict().items() if name in published}, published)
