"""Batch sizes that change while a loader is read: every sample once per epoch, and Lightning's epoch ends where the loader's does."""

from __future__ import annotations

from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.errors import ConfigurationError
from lightning_diloco.strategy.job_clock import JobClock
from lightning_diloco.strategy.live_batches import LiveSize, make_live
from tests.strategy.kit import quiet


class Numbers(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return torch.tensor(index)


class Stream(IterableDataset):
    """A stream that shares itself out among its workers; sized if `is_sized`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        yield from (torch.tensor(i) for i in range(first, self.count, step))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.count


class Recorder(pl.LightningModule):
    """Notes what it trains on, and changes the batch size as told: {number of the batch: size}."""

    def __init__(self, changes: dict[int, int]) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.changes = changes
        self.batches: list[list[int]] = []
        self.epochs: list[list[int]] = []
        self.validated_after: list[int] = []
        self.others: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        if isinstance(batch, (list, tuple)):
            batch, other = batch
            if other is not None:
                self.others.append(other.tolist())
        self.batches.append(batch.tolist())
        return self.layer(batch.float().unsqueeze(1)).mean() * 1e-6

    def on_train_batch_end(self, *args):
        if (size := self.changes.get(len(self.batches))) is not None:
            self.trainer.strategy.batching.choose(self.trainer, size, "a test says so")

    def on_train_epoch_end(self):
        done = sum(len(epoch) for epoch in self.epochs)
        self.epochs.append([i for batch in self.batches for i in batch][done:])

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.validated_after.append(sum(len(b) for b in self.batches))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(tmp_path, module, train, *, sizing=None, **trainer):
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, **trainer}
    strategy = DecoupledDiLoCoStrategy(
        launch="inline", run_dir=tmp_path / "run", batch_sizing=sizing or {0: 4}, num_fragments=1, sync_interval_steps=100
    )
    trainer = pl.Trainer(**quiet(), strategy=strategy, devices=1, **options)
    trainer.fit(module, train, DataLoader(Numbers(3), batch_size=3))
    return trainer


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("changes", [{3: 9}, {3: 2}, {2: 9, 5: 3}, {5: 40}, {1: 1, 20: 7}], ids=str)
def test_every_sample_once_per_epoch(tmp_path, changes, drop_last, num_workers):
    module = Recorder(changes)
    train = DataLoader(Numbers(47), batch_size=5, shuffle=True, drop_last=drop_last, num_workers=num_workers)
    fit(tmp_path, module, train)
    assert len(module.epochs) == 2
    for epoch in module.epochs:
        assert max(Counter(epoch).values()) == 1
        # What drop_last may leave out is less than one batch.
        assert len(epoch) == 47 if not drop_last else 47 - len(epoch) < max(4, *changes.values()) and len(epoch) <= 47
    assert module.validated_after == [len(module.epochs[0]), len(module.epochs[0]) + len(module.epochs[1])]
    sizes = {len(batch) for batch in module.batches}
    assert sizes & set(changes.values()) or max(changes.values()) > 30
    assert len(module.batches[0]) == 4


@pytest.mark.parametrize("kind", [Stream, SizedStream])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_streams(tmp_path, kind, num_workers):
    module = Recorder({2: 9})
    fit(tmp_path, module, DataLoader(kind(60), batch_size=5, num_workers=num_workers))
    for epoch in module.epochs:
        assert sorted(epoch) == list(range(60))
    assert len(module.validated_after) == 2
    assert 9 in {len(batch) for batch in module.batches}


def test_combined_loaders_keep_their_proportion(tmp_path):
    module = Recorder({2: 8})
    loaders = [DataLoader(Numbers(40), batch_size=4), DataLoader(Numbers(100), batch_size=10)]
    fit(tmp_path, module, CombinedLoader(loaders, "max_size_cycle"), max_epochs=1)
    assert {len(b) for b in module.batches} >= {4, 8}
    assert {len(b) for b in module.others} >= {10, 20}
    assert sorted(i for b in module.others for i in b) == list(range(100))


@pytest.mark.parametrize(("limit", "expected"), [(6, 6), (0.5, None)])
def test_limits_of_an_epoch(tmp_path, limit, expected):
    module = Recorder({3: 8})
    fit(tmp_path, module, DataLoader(Numbers(48), batch_size=4), limit_train_batches=limit, max_epochs=1)
    assert len(module.validated_after) == 1
    if expected is not None:
        assert len(module.batches) == expected
    else:
        # Three batches of 4, and half of what the epoch has at the size of its end.
        assert 3 < len(module.batches) <= 6


def test_validation_inside_of_an_epoch(tmp_path):
    module = Recorder({4: 8})
    fit(tmp_path, module, DataLoader(Numbers(64), batch_size=4), val_check_interval=0.5, max_epochs=1)
    assert sorted(module.epochs[0]) == list(range(64))
    assert module.validated_after[-1] == 64 and len(module.validated_after) >= 2


@pytest.mark.parametrize("size", [8, 2])
@pytest.mark.parametrize("after", [10, 13])
def test_a_fit_that_goes_on_from_a_checkpoint(tmp_path, size, after):
    """At the end of an epoch (10 batches) and in the middle of one: nothing is cut short, and every epoch is validated."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == after:
                trainer.save_checkpoint(tmp_path / "fit.ckpt")

    trainer = fit(tmp_path / "first", Recorder({}), DataLoader(Numbers(40), batch_size=4), max_steps=15, callbacks=[Save()])
    if after == 10:
        trainer = fit(tmp_path / "whole", Recorder({}), DataLoader(Numbers(40), batch_size=4), max_epochs=1)
        trainer.save_checkpoint(tmp_path / "fit.ckpt")
    module = Recorder({2: size})
    strategy = DecoupledDiLoCoStrategy(
        launch="inline", run_dir=tmp_path / "run", batch_sizing={0: 4}, num_fragments=1, sync_interval_steps=100
    )
    again = pl.Trainer(**quiet(), strategy=strategy, devices=1, max_epochs=3, num_sanity_val_steps=0)
    again.fit(module, DataLoader(Numbers(40), batch_size=4), DataLoader(Numbers(3), batch_size=3), ckpt_path=tmp_path / "fit.ckpt")
    assert sorted(module.epochs[-1]) == list(range(40))
    assert len(module.validated_after) == len(module.epochs) == 2
    # Lightning starts the data anew in the middle of an epoch; at its end there is nothing to make up for.
    assert len(module.epochs[0]) == 40 if after == 10 else len(module.epochs[0]) > 8


@pytest.mark.parametrize("size", [8, 2])
def test_a_learner_that_begins_in_the_middle_of_an_epoch(tmp_path, size):
    """A late joiner's epoch begins at the job's batch: the epochs after it are whole, and each is validated."""

    class Late(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            JobClock.advance(trainer.strategy._outer_sync.clock, 5)

    module = Recorder({1: size})
    fit(tmp_path, module, DataLoader(Numbers(40), batch_size=4), max_epochs=3, callbacks=[Late()])
    assert [sorted(epoch) for epoch in module.epochs[1:]] == [list(range(40))] * 2
    assert len(module.validated_after) == 3


def test_an_epoch_that_becomes_shorter_than_the_interval_is_validated(tmp_path):
    module = Recorder({1: 8})
    fit(tmp_path, module, DataLoader(Numbers(48), batch_size=4), val_check_interval=10, max_epochs=3)
    assert len(module.validated_after) == 3


def test_the_users_own_accumulation_stays_the_users(tmp_path):
    module = Recorder({})
    scheduler = GradientAccumulationScheduler({0: 4})
    trainer = fit(tmp_path, module, DataLoader(Numbers(48), batch_size=4), max_epochs=1, callbacks=[scheduler])
    assert trainer.global_step == 3


def test_loaders_that_are_made_again_keep_the_present_size(tmp_path):
    module = Recorder({2: 8})
    fit(tmp_path, module, DataLoader(Numbers(40), batch_size=4), reload_dataloaders_every_n_epochs=1)
    assert [sorted(epoch) for epoch in module.epochs] == [list(range(40))] * 2
    assert {len(b) for b in module.batches[-5:]} == {8}


def test_workers_draw_ahead(tmp_path):
    """The case in which all was drawn before the last change: the epoch's length is what was drawn."""
    module = Recorder({2: 9, 5: 3})
    fit(tmp_path, module, DataLoader(Numbers(47), batch_size=5, drop_last=True, num_workers=2), max_epochs=1)
    assert len(module.validated_after) == 1 and module.validated_after[0] == len(module.epochs[0]) >= 39


def test_the_users_loader_stays_as_it_is(tmp_path):
    train = DataLoader(Numbers(40), batch_size=5)
    fit(tmp_path, Recorder({2: 8}), train, max_epochs=1)
    assert type(train) is DataLoader and len(train) == 8 and [len(b) for b in train] == [5] * 8


class Own(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (DataLoader(Numbers(8), batch_size=None), "batch_size=None"),
        (DataLoader(Numbers(8), batch_sampler=Own(SequentialSampler(range(8)), 2, False)), "Own"),
        ([torch.tensor([1, 2])], "Tensor, not a DataLoader"),
    ],
)
def test_loaders_that_decide_themselves_are_refused(tmp_path, loader, words):
    with pytest.raises(ConfigurationError) as caught:
        fit(tmp_path, Recorder({}), loader)
    assert words in str(caught.value) and "batch_size" in str(caught.value)


def test_what_is_given_back_is_drawn_again():
    size = LiveSize()
    live = make_live(DataLoader(Numbers(20), batch_sampler=BatchSampler(RandomSampler(range(20)), 8, False)), size)
    sampler, seen = live.batch_sampler, []
    for number, batch in enumerate(live):
        indices = sampler.trained()
        assert batch.tolist() == indices
        if number == 0:
            size.size = 3
            assert sampler.give_back(indices)
            assert len(live) == 1 + 7
        else:
            seen += indices
    assert sorted(seen) == list(range(20))
    assert not sampler.give_back([1])
