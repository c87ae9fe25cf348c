"""What is unfrozen in the middle of a fit is merged, or the fit says at once that it would not be."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch.nn.utils import prune

from lightning_diloco import ConfigurationError, DecoupledDiLoCoStrategy
from tests.citizen.cases import Backbone
from tests.strategy.kit import TinyModel, global_parameters, latest, loader, parameters_of, quiet


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(model, *callbacks, **sync) -> Trainer:
    strategy = DecoupledDiLoCoStrategy(launch="inline", num_fragments=2, sync_interval_steps=3, **sync)
    trainer = Trainer(**quiet(devices=1, strategy=strategy, max_epochs=3, callbacks=list(callbacks)))
    trainer.fit(model, loader())
    return trainer


class Unfreeze(Callback):
    """Trains the first layer too, from the second epoch on."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.layer.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": list(pl_module.layer.parameters())})


class HalfFrozen(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05)


def test_a_backbone_that_a_finetuning_callback_unfreezes_is_merged(tmp_path):
    model = Backbone()
    before = parameters_of(model)
    trainer = fit(model, BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False))
    assert trainer.strategy.sync.include_frozen
    published = global_parameters(latest(tmp_path))
    assert published.keys() == before.keys()
    assert not torch.equal(published["backbone.weight"], before["backbone.weight"])


def test_what_a_user_unfreezes_is_refused_with_the_remedy_and_merged_with_it(tmp_path):
    with pytest.raises(ConfigurationError, match=r"layer.weight \(and 1 more\) became trainable .*include_frozen=True"):
        fit(HalfFrozen(), Unfreeze())
    model = HalfFrozen()
    before = parameters_of(model)
    fit(model, Unfreeze(), include_frozen=True)
    assert not torch.equal(global_parameters(latest(tmp_path))["layer.weight"], before["layer.weight"])


def test_what_is_unfrozen_in_the_middle_of_the_only_epoch_is_refused_at_its_end():
    class Late(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                pl_module.layer.requires_grad_(True)

    strategy = DecoupledDiLoCoStrategy(launch="inline", num_fragments=2, sync_interval_steps=3)
    with pytest.raises(ConfigurationError, match="include_frozen=True"):
        Trainer(**quiet(devices=1, strategy=strategy, max_epochs=1, callbacks=[Late()])).fit(HalfFrozen(), loader())


def test_a_callback_of_the_module_counts_as_the_trainers(tmp_path):
    class Own(Backbone):
        def configure_callbacks(self):
            return [BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)]

    model = Own()
    before = parameters_of(model)
    fit(model)
    assert not torch.equal(global_parameters(latest(tmp_path))["backbone.weight"], before["backbone.weight"])


def test_a_layer_that_is_added_after_the_join_is_refused_with_another_remedy():
    class Add(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.more = torch.nn.Linear(2, 2)

    with pytest.raises(ConfigurationError, match=r"more.weight \(and 1 more\) was added .* Make all parameters before"):
        fit(TinyModel(), Add())


def test_a_parameter_without_elements_is_nobodys_business():
    model = TinyModel()
    model.dummy = torch.nn.Parameter(torch.empty(0))
    assert fit(model).strategy.summary["status"] == "finished"


def test_what_stays_frozen_and_what_is_pruned_is_no_error(tmp_path):
    class Prune(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                prune.random_unstructured(pl_module.head, "weight", 0.5)

    model = HalfFrozen()
    before = parameters_of(model)
    fit(model, Prune())
    published = global_parameters(latest(tmp_path))
    assert torch.equal(published["layer.weight"], before["layer.weight"])
    assert not torch.equal(published["head.weight"], before["head.weight"])
