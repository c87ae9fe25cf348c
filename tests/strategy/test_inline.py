"""One learner in this process, with the real syncer on a thread: parity with a plain Trainer, validation, checkpoints, stops."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import DistributedSampler

from lightning_diloco import ConfigurationError, DecoupledDiLoCoStrategy, LineProgress
from lightning_diloco.strategy.outer_sync import OuterSync
from tests.strategy.kit import TinyModel, equal, global_parameters, latest, loader, parameters_of, quiet, summary_of

FAST = {"launch": "inline", "num_fragments": 2, "sync_interval_steps": 4, "wire_dtype": "fp32"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(model, data=None, val=None, *, sync=None, ckpt_path=None, **kwargs) -> Trainer:
    strategy = DecoupledDiLoCoStrategy(**{**FAST, **(sync or {})})
    trainer = Trainer(**quiet(devices=1, strategy=strategy, **kwargs))
    trainer.fit(model, loader() if data is None else data, val, ckpt_path=ckpt_path)
    return trainer


class Recorder(Callback):
    """The local parameters after every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(parameters_of(pl_module))


class WithDropout(TinyModel):
    def forward(self, x):
        return self.head(nn.functional.dropout(torch.tanh(self.layer(x)), 0.3, self.training))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_learner_trains_bit_for_bit_as_a_plain_trainer(optimizer, accumulate, tmp_path):
    """Scenario 2."""

    def run(strategy):
        seed_everything(3, verbose=False)
        model, recorder = WithDropout(step_s=0.002, optimizer=optimizer), Recorder()
        options = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "callbacks": [recorder]}
        trainer = Trainer(**quiet(devices=1, strategy=strategy, **options))
        trainer.fit(model, loader(shuffle=True))
        return recorder.seen, parameters_of(model), trainer

    plain, plain_final, _ = run("auto")
    ours, ours_final, trainer = run(DecoupledDiLoCoStrategy(**FAST, outer_lr=1.0, outer_momentum=0.0, outer_momentum_warmup=0))
    assert len(plain) == len(ours) == 48
    assert all(equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert trainer.strategy.summary["merges"] > 2
    for name, value in plain_final.items():
        # The last base is what the parameters were at one of the last boundaries, so the largest of those bounds |base| and |theta|.
        largest = torch.stack([step[name].abs() for step in plain[-12:]]).amax(0)
        assert (ours_final[name] - value).abs().le(torch.finfo(torch.float32).eps * largest).all(), name


def test_the_module_ends_with_the_published_weights_and_the_summary_says_so(tmp_path):
    model = TinyModel(step_s=0.002)
    start = parameters_of(model)
    trainer = fit(model, val=loader(16, seed=1), max_steps=40)
    run_dir = latest(tmp_path)
    assert equal(parameters_of(model), global_parameters(run_dir))
    assert not equal(parameters_of(model), start)
    summary = trainer.strategy.summary
    assert summary == summary_of(run_dir)
    assert summary["status"] == "finished"
    assert summary["tokens"] == 40 * 4 == summary["tokens_merged"]
    assert summary["startup_s"] > 0
    measured = Trainer(**quiet(devices=1)).validate(model, loader(16, seed=1), verbose=False)
    assert summary["val"]["val_loss"] == pytest.approx(measured[0]["val_loss"], rel=1e-6)


def test_without_a_validation_loop_the_summary_has_no_metrics(tmp_path):
    assert fit(TinyModel(), max_steps=4).strategy.summary["val"] is None


def test_a_failing_last_validation_costs_a_warning_only(tmp_path, caplog):
    class Failing(TinyModel):
        def validation_step(self, batch, batch_idx):
            if self.trainer.state.fn == "validate":
                raise ValueError("not now")
            super().validation_step(batch, batch_idx)

    model = Failing()
    trainer = fit(model, val=loader(16), max_steps=4)
    assert trainer.strategy.summary["val"] is None
    assert trainer.strategy.summary["status"] == "finished"
    assert "not now" in caplog.text
    assert model.trainer is trainer


def test_options_that_were_measured_to_be_bad_are_told_about_once(tmp_path, caplog):
    fit(TinyModel(), max_steps=4, sync={"outer_momentum_warmup": 0, "outer_momentum": 0.9})
    assert caplog.text.count("outer_momentum=0.9 with outer_momentum_warmup=0 in a run of 4 steps") == 1


class Watcher(Callback):
    """What the module holds in each validation, and what it held before and after."""

    def __init__(self):
        self.local = None
        self.inside = []
        self.changed_around = 0
        self.sanity = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.local = parameters_of(pl_module)

    def on_validation_start(self, trainer, pl_module):
        if trainer.sanity_checking:
            self.sanity += 1
            return
        self.inside.append((self.local, parameters_of(pl_module)))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.local is not None and not equal(self.local, parameters_of(pl_module)):
            self.changed_around += 1


def test_validation_inside_the_epoch_sees_global_weights_and_leaves_local_ones_alone(tmp_path):
    """Scenario 22."""
    watcher = Watcher()
    trainer = fit(
        TinyModel(step_s=0.005), val=loader(8), max_epochs=2, val_check_interval=0.25, num_sanity_val_steps=1, callbacks=[watcher]
    )
    assert trainer.global_step == 32
    assert watcher.sanity == 1
    assert len(watcher.inside) == 8
    # One step after the last merge at least once: then global and local differ.
    assert any(not equal(local, inside) for local, inside in watcher.inside)
    assert watcher.changed_around == 0


def test_an_exception_in_a_validation_step_leaves_local_weights_and_optimizer_untouched(tmp_path):
    """Scenario 22."""

    class Failing(TinyModel):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                raise ValueError("in validation")

    watcher, model = Watcher(), Failing(step_s=0.002, optimizer="adamw")
    strategy = DecoupledDiLoCoStrategy(**FAST)
    trainer = Trainer(**quiet(devices=1, strategy=strategy, max_epochs=1, val_check_interval=10, callbacks=[watcher]))
    with pytest.raises(ValueError, match="in validation"):
        trainer.fit(model, loader(), loader(8))
    local, inside = watcher.inside[0]
    assert not equal(local, inside)
    assert equal(parameters_of(model), local)
    assert all(float(state["step"]) == 10 for state in trainer.optimizers[0].state.values())
    assert summary_of(latest(tmp_path))["status"] == "failed"


def test_checkpoints_hold_the_global_model_and_load_without_this_package(tmp_path):
    """Scenario 12, in one process: a validation's, a step's and the last checkpoint."""
    # Saved inside the validation: at the end of the epoch a newer publication may be here, and belongs into the file.
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="val_loss", save_top_k=2, save_on_train_epoch_end=False)
    steps = ModelCheckpoint(dirpath=tmp_path / "steps", every_n_train_steps=7, save_top_k=-1)
    watcher, model = Watcher(), TinyModel(step_s=0.002)
    options = {"callbacks": [watcher, best, steps], "enable_checkpointing": True}
    fit(model, val=loader(8), max_epochs=2, sync={"sync_interval_steps": 5, "outer_lr": 0.5}, **options)
    (_, _), (_, last_inside) = watcher.inside[0], watcher.inside[-1]
    saved = torch.load(sorted((tmp_path / "best").glob("epoch=1*"))[0], weights_only=True)
    assert equal({k: v for k, v in saved["state_dict"].items()}, last_inside)
    assert "OuterSync" not in saved["callbacks"]
    assert len(list((tmp_path / "steps").glob("*.ckpt"))) == 4
    last = latest(tmp_path) / "checkpoints" / "last.ckpt"
    loaded = TinyModel.load_from_checkpoint(last)
    assert equal(parameters_of(loaded), parameters_of(model))
    again = Trainer(**quiet(devices=1, max_epochs=3))
    again.fit(TinyModel(), loader(), ckpt_path=last)
    assert again.global_step == 48


def test_buffers_come_from_the_learner_and_tied_weights_stay_tied(tmp_path):
    class Normed(TinyModel):
        def __init__(self):
            super().__init__(step_s=0.002)
            self.norm = nn.BatchNorm1d(4)
            self.twin = nn.Linear(4, 2)
            self.twin.weight = self.head.weight

        def forward(self, x):
            hidden = self.norm(self.layer(x))
            return self.head(hidden) + self.twin(hidden)

    model = Normed()
    fit(model, max_steps=20)
    assert int(model.norm.num_batches_tracked) == 20
    assert model.twin.weight is model.head.weight
    assert equal(
        parameters_of(model), {k: v for k, v in global_parameters(latest(tmp_path)).items() if k in dict(model.named_parameters())}
    )


def test_the_users_loader_is_kept_as_it_is(tmp_path):
    data = loader()
    trainer = fit(TinyModel(), data, max_steps=4)
    assert trainer.train_dataloader is data


def test_the_callback_is_there_once_and_first_during_a_fit_and_gone_after_it(tmp_path):
    seen = []
    note = LambdaCallback(on_train_end=lambda trainer, _: seen.append([type(c) for c in trainer.callbacks]))
    strategy = DecoupledDiLoCoStrategy(**FAST)
    trainer = Trainer(**quiet(devices=1, strategy=strategy, max_steps=4, callbacks=[note]))
    before = list(trainer.callbacks)
    trainer.fit(TinyModel(), loader())
    first = trainer.strategy.summary["job_id"]
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(TinyModel(), loader())
    assert len(seen) == 2 and all(types[0] is OuterSync and OuterSync not in types[1:] for types in seen)
    assert trainer.callbacks == before
    assert trainer.global_step == 8
    assert trainer.strategy.summary["job_id"] != first


def test_a_fit_that_has_nothing_to_do_leaves_the_weights(tmp_path):
    model = TinyModel()
    trainer = fit(model, max_steps=4)
    weights = parameters_of(model)
    trainer.fit(model, loader())
    assert equal(parameters_of(model), weights)


def test_validate_test_and_predict_run_before_and_after_a_fit(tmp_path):
    """Scenario 24, in one process."""
    model = TinyModel()
    trainer = Trainer(**quiet(devices=1, max_steps=6, strategy=DecoupledDiLoCoStrategy(**FAST)))
    before = trainer.validate(model, loader(16), verbose=False)[0]["val_loss"]
    trainer.fit(model, loader())
    after = trainer.validate(model, loader(16), verbose=False)[0]["val_loss"]
    assert after < before
    assert trainer.test(model, loader(16), verbose=False)[0]["test_loss"] == pytest.approx(after)
    assert sum(len(batch) for batch in trainer.predict(model, loader(16))) == 16


def test_a_step_is_a_batch_in_which_an_optimizer_was_stepped(tmp_path):
    class Gan(TinyModel):
        """Manual optimization: two optimizers, one of them raw, and nothing stepped in every third batch."""

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            before = parameters_of(self)
            if batch_idx % 3 == 2:
                return
            for optimizer in (self.optimizers()[0], self.optimizers(use_pl_optimizer=False)[1]):
                optimizer.zero_grad()
                self.manual_backward(self(batch[0]).pow(2).mean())
                optimizer.step()
            assert not equal(before, parameters_of(self))

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.1)

    summary = fit(Gan(), loader(48), max_epochs=1).strategy.summary
    assert summary["learners"][0]["inner_steps"] == 8
    # The batches without a step are counted with the step that follows them; the last one has none.
    assert summary["tokens"] == 4 * 11


def test_early_stopping_ends_the_job(tmp_path):
    class Worse(TinyModel):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    stopping = EarlyStopping("val_loss", patience=1)
    trainer = fit(Worse(), val=loader(8), max_epochs=20, callbacks=[stopping])
    assert trainer.current_epoch < 20
    assert trainer.should_stop
    assert trainer.strategy.summary["status"] == "finished"


def test_a_token_budget_ends_the_job(tmp_path):
    summary = fit(TinyModel(step_s=0.02), max_steps=2000, sync={"token_budget": 80}).strategy.summary
    assert 80 <= summary["tokens"] < 2000


def test_line_progress_prints_an_early_line_and_a_last_one(tmp_path, capsys):
    fit(TinyModel(step_s=0.01), max_steps=40, callbacks=[LineProgress(period_s=0.1)], enable_progress_bar=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) >= 3
    assert lines[-1].startswith("step 40  loss ")
    assert all(word in lines[-1] for word in ("merges", "staleness", "tokens/s"))


def test_line_progress_serves_other_strategies_too(capsys):
    Trainer(**quiet(devices=1, max_steps=3, callbacks=[LineProgress()], enable_progress_bar=True)).fit(TinyModel(), loader())
    assert capsys.readouterr().out.splitlines()[-1].startswith("step 3")


def test_a_module_without_parameters_is_refused_with_a_sentence(tmp_path):
    class Empty(TinyModel):
        def __init__(self):
            super().__init__()
            del self.layer, self.head

        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    with pytest.raises(ConfigurationError, match="nothing to synchronize"):
        fit(Empty(), max_steps=2)


def test_a_wrong_counter_ends_the_fit_with_its_own_sentence(tmp_path):
    with pytest.raises(ConfigurationError, match="token_counter returned 'x'"):
        fit(TinyModel(), max_steps=2, sync={"token_counter": lambda batch: "x"})


def test_an_unused_wait_is_short(tmp_path):
    """A fit of a few steps does not wait for a period of anything."""
    began_s = time.monotonic()
    fit(TinyModel(), max_steps=2)
    assert time.monotonic() - began_s < 10


def test_shards_are_injected_for_training_only(tmp_path):
    """What a learner of three would read: kwargs by stage."""
    from lightning.pytorch.trainer.states import RunningStage

    from lightning_diloco.strategy.assignment import Assignment

    strategy = DecoupledDiLoCoStrategy()
    trainer = Trainer(**quiet(devices=3, strategy=strategy))
    strategy._trainer = trainer
    strategy.take(Assignment(role="learner", endpoint="", learner_id=1, num_learners=3))
    trainer.state.stage = RunningStage.TRAINING
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 3, "rank": 1}
    indices = [list(DistributedSampler(range(12), 3, rank, shuffle=False)) for rank in range(3)]
    assert sorted(sum(indices, [])) == list(range(12))
    trainer.state.stage = RunningStage.VALIDATING
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 1, "rank": 0}
    strategy.take(None)
    assert trainer.global_rank == 0


def test_the_users_own_handler_of_sigterm_is_called_too(tmp_path):
    class Signalling(TinyModel):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    called = []

    def mine(*_):
        called.append("mine")
        sys.exit(3)

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with pytest.raises(SIGTERMException):
            fit(Signalling(), max_epochs=1)
        assert called == ["mine"] and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    summary = summary_of(latest(tmp_path))
    assert summary["status"] == "stopped" and summary["tokens_discarded"] == 0, "whatever the handler raises"
