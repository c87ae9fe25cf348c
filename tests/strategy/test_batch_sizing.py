"""Batch sizing in whole fits: by time, by memory, by tokens; what the records say of it."""

from __future__ import annotations

import json
import time
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.utils.data import DataLoader

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.errors import ConfigurationError
from lightning_diloco.strategy.inner_rate import InnerRate
from tests.strategy.kit import quiet, summary_of
from tests.strategy.test_live_sizes import Numbers
from tests.tape_checker import check_run


class Slow(pl.LightningModule):
    """A model whose step takes a + c s seconds on this device, and that can hold so many samples."""

    def __init__(self, per_sample_s: float = 0.0, offset_s: float = 0.0, holds: int = 10**9, fails_in: str = "forward") -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.per_sample_s, self.offset_s, self.holds, self.fails_in = per_sample_s, offset_s, holds, fails_in
        self.trained: list[list[int]] = []
        self.rates: list[float] = []
        self.grads: list[float] = []

    def training_step(self, batch, batch_idx):
        if len(batch) > self.holds and self.fails_in == "forward":
            raise torch.OutOfMemoryError("simulated: no memory")
        time.sleep(self.offset_s + self.per_sample_s * len(batch))
        self.trained.append(batch.tolist())
        loss = self.layer(batch.float().unsqueeze(1) * 0 + 1).mean()
        if len(batch) > self.holds:
            self.trained.pop()
            loss.register_hook(_no_memory)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        if self.layer.bias.grad is not None:
            self.grads.append(float(self.layer.bias.grad))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0), "interval": "step"},
        }


def _no_memory(gradient):
    raise torch.OutOfMemoryError("simulated: no memory for gradients")


def fit(run_dir, module, *, count=400, batch_size=4, max_steps=60, accumulate=1, num_workers=0, **options):
    strategy = DecoupledDiLoCoStrategy(launch="inline", run_dir=run_dir, num_fragments=1, sync_interval_steps=100, **options)
    trainer = pl.Trainer(**quiet(), strategy=strategy, devices=1, max_steps=max_steps, max_epochs=-1, accumulate_grad_batches=accumulate)
    trainer.fit(module, DataLoader(Numbers(count), batch_size=batch_size, shuffle=True, num_workers=num_workers))
    return trainer


def tape_of(run_dir, event):
    lines = [json.loads(line) for line in (run_dir / "tape.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_the_size_meets_the_target(tmp_path):
    module = Slow(per_sample_s=0.002, offset_s=0.004)
    fit(tmp_path / "run", module, batch_sizing="auto", target_step_s=0.04, max_steps=120, count=10**6)
    # 0.04 = 0.004 + 18 * 0.002; sleeping takes a little longer than it is told.
    assert 12 <= len(module.trained[-1]) <= 19
    summary = summary_of(tmp_path / "run")
    (learner,) = summary["learners"]
    choices = tape_of(tmp_path / "run", "batch")
    assert [c["batch_size"] for c in choices] == [c["batch_size"] for c in learner["batches"]]
    assert learner["batch_size"] == choices[-1]["batch_size"]
    assert choices[0]["batch_size"] == 4 and "beginning" in choices[0]["reason"]
    assert "40 ms" in choices[-1]["reason"] and choices[-1]["inner_step"] > 8


def test_the_ceiling_of_a_cpu_holds(tmp_path):
    module = Slow(per_sample_s=0.002)
    fit(tmp_path / "run", module, batch_sizing="auto:16", target_step_s=0.2, max_steps=60, count=10**6)
    assert max(len(batch) for batch in module.trained) == 16


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_batch_that_does_not_fit_is_trained_in_smaller_ones(tmp_path, fails_in, accumulate, num_workers):
    module = Slow(holds=6, fails_in=fails_in)
    strategy = DecoupledDiLoCoStrategy(
        launch="inline", run_dir=tmp_path / "run", num_fragments=1, sync_interval_steps=100, batch_sizing="auto"
    )
    trainer = pl.Trainer(**quiet(), strategy=strategy, devices=1, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, DataLoader(Numbers(200), batch_size=16, shuffle=True, num_workers=num_workers))
    seen = sorted(i for batch in module.trained for i in batch)
    if fails_in == "forward" and accumulate == 1:
        assert seen == list(range(200))
    else:
        assert set(seen) == set(range(200))
    assert max(len(batch) for batch in module.trained) <= 6
    summary = summary_of(tmp_path / "run")
    assert summary["tokens"] == summary["tokens_merged"] == 200
    assert any("did not fit" in choice["reason"] for choice in summary["learners"][0]["batches"])


def test_one_sample_that_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path / "run", Slow(holds=0), batch_sizing="auto")


def test_without_auto_an_error_of_memory_is_the_users(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path / "run", Slow(holds=6), batch_size=16, batch_sizing={0: 8})


def test_tokens_of_a_step_are_kept_by_accumulation(tmp_path):
    module = Slow()
    fit(tmp_path / "run", module, tokens_per_step=20, max_steps=6)
    assert [len(batch) for batch in module.trained] == [4] * 30
    summary = summary_of(tmp_path / "run")
    assert (summary["tokens"], summary["learners"][0]["inner_steps"]) == (120, 6)
    assert summary["learners"][0]["batches"][0]["accumulate"] == 5
    # The mean over a step's samples of the same gradient: no window is scaled wrongly.
    assert module.grads == pytest.approx([1.0] * 6)


def test_tokens_of_a_step_when_memory_gives_less(tmp_path):
    module = Slow(holds=6)
    fit(tmp_path / "run", module, batch_sizing="auto:16", tokens_per_step=24, batch_size=8, max_steps=12, count=10**6)
    summary = summary_of(tmp_path / "run")
    last = summary["learners"][0]["batches"][-1]
    assert last["batch_size"] * last["accumulate"] == 24 and last["batch_size"] <= 6
    assert module.grads[-3:] == pytest.approx([1.0] * 3)


def test_the_learning_rate_follows_the_rule(tmp_path):
    module = Slow()
    trainer = fit(tmp_path / "run", module, batch_sizing={0: 16}, inner_lr_rule="sqrt", max_steps=5)
    assert module.rates == pytest.approx([0.2] * 5)
    # Schedules, checkpoints and monitors see the user's own.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)
    assert summary_of(tmp_path / "run")["learners"][0]["batches"][0]["lr_factor"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("own", "wanted", "size", "accumulate"),
    [(4, 20, 4, 5), (32, 20, 20, 1), (32, 47, 24, 2), (8, 20, 5, 4), (8, 1, 1, 1), (6, 7, 4, 2)],
)
def test_samples_of_a_step_are_divided(tmp_path, own, wanted, size, accumulate):
    module = Slow()
    fit(tmp_path / "run", module, batch_size=own, tokens_per_step=wanted, max_steps=3)
    (choice,) = summary_of(tmp_path / "run")["learners"][0]["batches"]
    assert (choice["batch_size"], choice["accumulate"]) == (size, accumulate)
    assert {len(batch) for batch in module.trained} == {size}
    assert module.grads == pytest.approx([1.0] * 3)


def test_a_trainer_gets_its_own_accumulation_back(tmp_path):
    trainer = fit(tmp_path / "run", Slow(), tokens_per_step=20, max_steps=2)
    assert trainer.accumulate_grad_batches == 1


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_a_step_that_is_cut_short_and_a_rate_that_is_set_within_it(kind):
    parameter = nn.Parameter(torch.zeros(1))
    rate_of = torch.tensor if kind == "tensor" else float
    optimizer = torch.optim.AdamW([parameter], lr=rate_of(0.1), foreach=False, capturable=False)
    rate = InnerRate()
    rate.attach([optimizer])
    rate.factor = 4.0
    seen = []

    def closure(error=None, new=None):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        if new is not None:
            optimizer.param_groups[0]["lr"] = rate_of(new)
        if error is not None:
            raise error
        return parameter.sum()

    optimizer.step(closure)
    assert seen == pytest.approx([0.4]) and float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    optimizer.step(lambda: closure(new=0.3))
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.3)
    with pytest.raises(KeyError):
        optimizer.step(lambda: closure(error=KeyError()))
    rate.detach()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"accumulate": 2, "tokens_per_step": 8}, "accumulate_grad_batches")],
)
def test_what_contradicts_itself_is_refused(tmp_path, options, words):
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path / "run", Slow(), **options)


class FailsOnce(Slow):
    """Its first batch does not fit, whatever its size; all others do."""

    has_failed = False

    def training_step(self, batch, batch_idx):
        if not self.has_failed:
            self.has_failed = True
            raise torch.OutOfMemoryError("simulated: no memory, this once")
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
def test_leased_samples_that_did_not_fit_are_told_in_the_order_in_which_they_are_trained(tmp_path):
    """Workers have drawn further batches by then: those are trained first, and the ledger is of what was trained."""
    module = FailsOnce()
    strategy = DecoupledDiLoCoStrategy(
        launch="inline", run_dir=tmp_path / "run", num_fragments=1, sync_interval_steps=100, data="lease", batch_sizing="auto"
    )
    trainer = pl.Trainer(**quiet(), strategy=strategy, devices=1, max_epochs=2)
    trainer.fit(module, DataLoader(Numbers(24), batch_size=8, num_workers=2))
    summary = check_run(tmp_path / "run")
    times = Counter(i for batch in module.trained for i in batch)
    done = sum(epoch["done"] for epoch in summary["leases"])
    assert done == sum(times.values()) == 48 and set(times.values()) == {2}, times


@pytest.mark.parametrize("drop_last", [False, True])
def test_sizes_change_over_leased_samples(tmp_path, drop_last):
    """Leases know samples, not batches: each is trained once in an epoch, also what did not fit the first time."""
    module = Slow(holds=6)
    strategy = DecoupledDiLoCoStrategy(
        launch="inline", run_dir=tmp_path / "run", num_fragments=1, sync_interval_steps=100, data="lease", batch_sizing="auto"
    )
    trainer = pl.Trainer(**quiet(), strategy=strategy, devices=1, max_epochs=2)
    trainer.fit(module, DataLoader(Numbers(203), batch_size=16, shuffle=True, drop_last=drop_last))
    summary = check_run(tmp_path / "run")
    assert max(len(batch) for batch in module.trained) <= 6
    times = Counter(i for batch in module.trained for i in batch)
    if drop_last:
        # What the end of an epoch left out opens the next one; only the very last is not trained.
        assert 2 * 203 - 16 < sum(times.values()) <= 2 * 203 and max(times.values()) <= 2
    else:
        assert set(times.values()) == {2} and len(times) == 203
    assert sum(epoch["done"] for epoch in summary["leases"]) == sum(times.values())
    assert sum(epoch["twice"] for epoch in summary["leases"]) == 0


class OfTwoSpeeds(Slow):
    """The second learner's device takes three times as long."""

    def training_step(self, batch, batch_idx):
        time.sleep((0.006 if self.trainer.global_rank else 0.002) * len(batch))
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
def test_two_devices_meet_in_the_middle(tmp_path):
    """Real processes: the syncer finds the target, both learners follow, and the tape tells."""
    strategy = DecoupledDiLoCoStrategy(run_dir=tmp_path / "run", num_fragments=2, sync_interval_steps=8, batch_sizing="auto")
    trainer = pl.Trainer(**quiet(), strategy=strategy, devices=2, max_steps=150, max_epochs=-1)
    trainer.fit(OfTwoSpeeds(offset_s=0.01), DataLoader(Numbers(10**6), batch_size=8, shuffle=True))
    first, second = summary_of(tmp_path / "run")["learners"]
    # At batches of 8 they take 26 and 58 ms; 42 ms are 16 samples of the one and 5 of the other.
    assert first["batch_size"] > 8 > second["batch_size"]
    targets = {c["target_step_s"] for c in tape_of(tmp_path / "run", "batch")}
    assert len(targets) == 2 and 0.0 in targets and 0.03 < max(targets)
    assert first["inner_steps"] == 150 and first["tokens"] > 150 * 8
