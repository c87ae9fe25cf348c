"""One learner with a neutral outer optimizer, where merging is the identity: what it may leave out, and that it loses nothing."""

from __future__ import annotations

import time

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.loggers.logger import DummyLogger

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
        if self.trainer.global_step == 96:
            with torch.no_grad():
                self.head.weight.add_(100.0)


def test_a_last_validation_of_what_was_refused_is_not_kept(tmp_path):
    model = Jumping(step_s=0.03)  # long enough for the merges after which the gate has a median, on a busy machine too
    strategy = DecoupledDiLoCoStrategy(**NEUTRAL, run_dir=tmp_path)
    trainer = Trainer(**quiet(strategy=strategy, devices=1, max_steps=96, num_sanity_val_steps=0))
    trainer.fit(model, loader(384), loader(8))
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


def _noting(cls, names):
    """A subclass whose methods of these names note in `called` that they were called, before they do their work."""

    def note(name):
        def method(self, *args, **kwargs):
            self.called.append(name)
            return getattr(super(noting, self), name)(*args, **kwargs)

        return method

    noting = type(cls.__name__, (cls,), {name: note(name) for name in names})
    return noting


class Own(TinyModel):
    """Makes its own loaders."""

    def __init__(self):
        super().__init__()
        self.called = []

    def train_dataloader(self):
        return loader(32)

    def val_dataloader(self):
        return loader(8)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).pow(2).mean())

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = self.trainer.global_step


class Silent(Callback):
    """With a state."""

    def __init__(self):
        self.called = []

    def state_dict(self):
        return {"calls": len(self.called)}


HOOKS = [
    name for hooks in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(hooks) if not name.startswith(("_", "configure_sharded"))
]
STEPS = ["training_step", "validation_step", "optimizer_step", "backward", "configure_optimizers", "configure_callbacks"]
Watched = _noting(Own, HOOKS + STEPS)
Noting = _noting(Silent, [name for name in vars(Callback) if name.startswith(("on_", "setup", "teardown", "state_dict", "load"))])


def test_the_last_checkpoint_has_what_changed_after_the_last_one_inside_the_fit(tmp_path):
    """An epoch's end, a scheduler and EarlyStopping come after the checkpoint of the last step."""

    class Flat(TinyModel):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    files = ModelCheckpoint(tmp_path / "files", every_n_train_steps=1, save_top_k=-1)
    options = quiet(devices=1, max_epochs=3, callbacks=[EarlyStopping("val_loss", patience=9), files], enable_checkpointing=True)
    strategy = DecoupledDiLoCoStrategy(**NEUTRAL, run_dir=tmp_path / "job")
    trainer = Trainer(**options, strategy=strategy)
    trainer.fit(Flat(), loader(32), loader(8))
    last = torch.load(tmp_path / "job" / "checkpoints" / "last.ckpt", weights_only=True)
    (stopping,) = [state for key, state in last["callbacks"].items() if key.startswith("EarlyStopping")]
    assert stopping["wait_count"] == 2
    assert last["lr_schedulers"][0]["last_epoch"] == 3
    assert last["optimizer_states"][0]["param_groups"][0]["lr"] == trainer.optimizers[0].param_groups[0]["lr"] < 0.1
    assert last["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] == 3


class Lines(DummyLogger):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_metrics(self, metrics, step=None):
        self.calls.append((dict(metrics), step))


def _watch(folder, strategy=None):
    torch.manual_seed(0)
    model, callback, logger = Watched(), Noting(), Lines()
    files = ModelCheckpoint(folder / "files", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    options = quiet(strategy=strategy or "auto", devices=1, max_epochs=3, callbacks=[callback, files], num_sanity_val_steps=0)
    options |= {"enable_checkpointing": True, "check_val_every_n_epoch": 2, "logger": logger, "log_every_n_steps": 4}
    trainer = Trainer(**options)
    trainer.fit(model)
    return model, callback, logger


def test_hooks_and_loaders_and_rows_of_the_log_are_those_of_a_plain_trainer(tmp_path):
    """The last checkpoint and the last validation take what is there, and loggers get what a plain Trainer logs."""
    plain, plain_callback, plain_logger = _watch(tmp_path / "plain")
    strategy = DecoupledDiLoCoStrategy(**NEUTRAL, run_dir=tmp_path / "job")
    ours, callback, logger = _watch(tmp_path / "ours", strategy)
    assert ours.called == plain.called
    assert callback.called == plain_callback.called
    assert logger.calls == plain_logger.calls
    assert strategy.summary["val"].keys() == {"val_loss"}
    last = torch.load(tmp_path / "job" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["mine"] == 24
    assert last["global_step"] == 24
    assert last["optimizer_states"]
    assert set(last["decoupled_diloco"]) == {"versions"}
    for name, value in ours.state_dict().items():
        assert torch.equal(last["state_dict"][name], value)
