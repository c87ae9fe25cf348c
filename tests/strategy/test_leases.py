"""`data="lease"` inside a Trainer: one learner in this process, with every kind of loader (scenarios 20 and 21)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, SubsetRandomSampler

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.permutation import EpochOrder
from tests.strategy.kit import latest, quiet
from tests.strategy.lease_kit import Numbered, Recorder, numbered, recorded, times_of
from tests.tape_checker import check_run

N = 35


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(tmp_path, loader: Any, model: Recorder | None = None, **options: Any) -> dict[str, Any]:
    """One learner in this process; returns the summary, which was checked against the tape."""
    strategy = DecoupledDiLoCoStrategy(data="lease", launch="inline", num_fragments=2, outer_momentum=0.3, outer_lr=0.4)
    trainer = Trainer(**quiet(**{"devices": 1, "max_epochs": 2, "strategy": strategy, **options}))
    trainer.fit(model or Recorder(tmp_path), loader, numbered(4))
    return check_run(latest(tmp_path))


def batches_of(tmp_path, epoch: int) -> list[list[int]]:
    (lines,) = recorded(tmp_path)
    return [line["samples"] for line in lines if line.get("epoch") == epoch]


def validations_of(tmp_path) -> list[int]:
    (lines,) = recorded(tmp_path)
    return [line["validation"] for line in lines if "validation" in line]


# ---- the order ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 2, 3, 16, 17, 1000, 4097])
def test_an_order_is_a_permutation_and_any_part_of_it_can_be_had(num_samples):
    order = EpochOrder(num_samples, is_shuffled=True, seed=5)
    whole = order.indices(2, 0, num_samples)
    assert sorted(whole) == list(range(num_samples))
    other = EpochOrder(num_samples, is_shuffled=True, seed=5)
    pieces = [i for start in range(0, num_samples, 7) for i in other.indices(2, start, min(start + 7, num_samples))]
    assert pieces == whole
    if num_samples > 16:
        assert EpochOrder(num_samples, is_shuffled=True, seed=6).indices(2, 0, num_samples) != whole != order.indices(3, 0, num_samples)


def test_an_order_is_the_same_everywhere_and_leaves_the_global_generator_alone():
    """Integers only: the numbers stand here, so that a release or a machine that computes others is seen."""
    before = torch.get_rng_state()
    assert EpochOrder(10, is_shuffled=True, seed=1).indices(0, 0, 10) == [0, 7, 5, 1, 3, 4, 8, 9, 2, 6]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_order_is_random_enough():
    """Neighbours in the data set are not neighbours in the order, and each position gets every part of the data set."""
    order = EpochOrder(5000, is_shuffled=True, seed=3)
    first = [order.indices(epoch, 0, 5000) for epoch in range(20)]
    steps = sum(abs(a - b) == 1 for a, b in zip(first[0], first[0][1:], strict=False))
    assert steps < 20, "two are expected"
    heads = torch.tensor([sum(x[:50]) / 50 for x in first])
    assert abs(float(heads.mean()) - 2500) < 4 * 1443 / (50 * 20) ** 0.5


# ---- loaders --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_epoch_has_each_sample_once(tmp_path, num_workers, drop_last, shuffle):
    summary = fit(tmp_path, numbered(N, num_workers=num_workers, drop_last=drop_last, shuffle=shuffle))
    # What drop_last leaves out of an epoch opens the next one; only the job's last two samples are not trained.
    lost = 2 * N % 4 if drop_last else 0
    times = times_of(tmp_path)
    assert sum(times.values()) == 2 * N - lost == summary["learners"][0]["samples"]
    assert [(x["done"], x["free"], x["twice"], x["again"]) for x in summary["leases"]] == [(N, 0, 0, 0), (N - lost, lost, 0, 0)]
    assert max(times.values()) == 2 and len(times) == N
    batches = batches_of(tmp_path, 0) + batches_of(tmp_path, 1)
    assert {len(batch) for batch in batches} == ({4} if drop_last else {4, 3})
    order = [i for batch in batches for i in batch]
    assert (order[:N] == list(range(N))) == (not shuffle)
    assert sorted(order[:N]) == list(range(N))
    assert validations_of(tmp_path) == [0, 1], "once, at the end of each epoch"


class Sizes(Callback):
    """Another batch size after some batches."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx in (2, 5):
            trainer.train_dataloader.batch_sampler.batch_size = {2: 7, 5: 2}[batch_idx]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_size_that_changes_while_it_runs_loses_nothing(tmp_path, num_workers):
    """Scenario 21."""
    summary = fit(tmp_path, numbered(91, num_workers=num_workers), callbacks=[Sizes()])
    assert set(times_of(tmp_path).values()) == {2}
    assert [(x["done"], x["twice"]) for x in summary["leases"]] == [(91, 0), (91, 0)]
    assert {len(batch) for batch in batches_of(tmp_path, 0)} >= {4, 7, 2}
    assert validations_of(tmp_path) == [0, 1]


@pytest.mark.parametrize(("limit", "lengths"), [(4, [4, 4, 1, 4]), (0.5, [4, 4, 1, 4])])
def test_epochs_that_are_cut_short_go_on_where_the_last_one_ended(tmp_path, limit, lengths):
    """Scenario 20: 36 samples are 9 batches."""
    fit(tmp_path, numbered(36), limit_train_batches=limit, max_epochs=4)
    assert [len(batches_of(tmp_path, epoch)) for epoch in range(4)] == lengths
    order = [i for epoch in range(3) for batch in batches_of(tmp_path, epoch) for i in batch]
    assert order == list(range(36))
    assert validations_of(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({"accumulate_grad_batches": 4}, [0, 1]),
        ({"val_check_interval": 0.25}, [0, 0, 0, 0, 1, 1, 1, 1]),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, [0, 0, 1, 1]),
        ({"reload_dataloaders_every_n_epochs": 1}, [0, 1]),
        ({"num_sanity_val_steps": 1, "check_val_every_n_epoch": 2}, [1]),
    ],
)
def test_what_a_trainer_can_do_with_epochs_it_can_do_here(tmp_path, options, validations):
    summary = fit(tmp_path, numbered(N), **options)
    assert set(times_of(tmp_path).values()) == {2}
    assert [(x["done"], x["twice"]) for x in summary["leases"]] == [(N, 0), (N, 0)]
    assert validations_of(tmp_path) == validations


class Cut(Recorder):
    """Ends its first epoch early, as users do."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.trainer.current_epoch == 0 and batch_idx == 3 else None


def test_samples_of_a_batch_that_was_passed_over_are_drawn_again(tmp_path):
    summary = fit(tmp_path, numbered(N), Cut(tmp_path))
    assert len(batches_of(tmp_path, 0)) == 3
    assert set(times_of(tmp_path).values()) == {2}, "the job's epochs are whole, whatever Lightning's are"
    assert [(x["done"], x["twice"]) for x in summary["leases"]] == [(N, 0), (N, 0)]


def test_at_max_steps_what_was_fetched_and_not_trained_is_free_again(tmp_path):
    summary = fit(tmp_path, numbered(N, num_workers=2), max_steps=5, max_epochs=-1)
    assert [(x["done"], x["free"], x["outstanding"]) for x in summary["leases"]] == [(20, 15, 0)]
    assert sorted(times_of(tmp_path)) == list(range(20))


class Scheduled(Recorder):
    """Asks Lightning how long the training will be."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        self.write(estimated=self.trainer.estimated_stepping_batches)
        return [optimizer], [
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=self.trainer.estimated_stepping_batches)
        ]


def test_the_length_that_lightning_plans_with_is_that_of_an_even_share(tmp_path):
    fit(tmp_path, numbered(N), Scheduled(tmp_path))
    assert recorded(tmp_path)[0][0] == {"estimated": 18}
    assert set(times_of(tmp_path).values()) == {2}


def test_the_users_loader_stays_as_it_was(tmp_path):
    loader = numbered(N, shuffle=True)
    before = dict(vars(loader))
    fit(tmp_path, loader)
    assert vars(loader) == before and type(loader) is DataLoader
    assert len(loader) == 9


# ---- what cannot be leased ------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(8))


class OwnIteration(DataLoader):
    def __iter__(self):
        return super().__iter__()


DATA = Numbered(8)
REFUSED = [
    (lambda: DataLoader(Stream()), "data='lease' with Stream: an IterableDataset"),
    (lambda: DataLoader(DATA, batch_size=None), "data='lease' with batch_size=None"),
    (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 2, False)),
        "data='lease' with batch_sampler=BatchSampler",
    ),
    (lambda: DataLoader(DATA, sampler=SubsetRandomSampler([1, 2])), "data='lease' with sampler=SubsetRandomSampler"),
    (lambda: DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)), "draws with replacement"),
    (lambda: DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=3)), "not all samples"),
    (lambda: OwnIteration(DATA), "data='lease' with OwnIteration, which has a __iter__ of its own"),
    (lambda: DataLoader(DATA, num_workers=2, in_order=False), "data='lease' with in_order=False"),
    (lambda: [torch.zeros(2, 8)], "data='lease' with Tensor: only a DataLoader"),
    (lambda: CombinedLoader([numbered(8), numbered(8)], "min_size"), "data='lease' with several training loaders"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED)
def test_what_cannot_be_leased_is_refused_with_a_sentence_at_the_start(tmp_path, make, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        fit(tmp_path, make())
    assert not recorded(tmp_path)


def test_overfit_batches_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="data='lease' with overfit_batches=2"):
        fit(tmp_path, numbered(8), overfit_batches=2)
