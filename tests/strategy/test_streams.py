"""Streams are shared out by stride: every item goes to one learner, whatever the number of workers."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.datapipes.iter import IterableWrapper

from lightning_diloco.strategy.streams import StridedStream, share_stream
from tests.strategy.kit import loader

pytestmark = pytest.mark.filterwarnings("ignore:The training data is an IterableDataset:UserWarning")


class Numbers(IterableDataset):
    """0 to length - 1; workers share them out, by `worker_init_fn` or by themselves."""

    def __init__(self, length: int) -> None:
        self.length, self.first, self.stride = length, 0, 1

    def __iter__(self):
        worker = get_worker_info()
        if worker is not None and self.stride == 1:
            self.first, self.stride = worker.id, worker.num_workers
        return iter(range(self.first, self.length, self.stride))


class Sized(Numbers):
    def __len__(self):
        return self.length


def init_worker(worker_id):
    """As torch's documentation shows it: the worker's copy of the dataset is given its part."""
    worker = get_worker_info()
    worker.dataset.first, worker.dataset.stride = worker_id + worker.dataset.first, worker.num_workers


class Stateful(Numbers):
    def state_dict(self):
        return {}


class OwnLoader(DataLoader):
    """A loader of a class of its own."""


def items(dataloader) -> list[int]:
    return [int(i) for batch in dataloader for i in torch.as_tensor(batch).flatten()]


@pytest.mark.parametrize("init", [None, init_worker])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_learners", [2, 3])
def test_each_item_goes_to_one_learner(num_learners, num_workers, init):
    whole = DataLoader(Numbers(31), batch_size=4, num_workers=num_workers, worker_init_fn=init)
    shares = [items(share_stream(whole, i, num_learners)) for i in range(num_learners)]
    assert sorted(sum(shares, [])) == list(range(31))
    assert all(len(share) >= 31 // num_learners - num_workers for share in shares)


def test_the_users_loader_keeps_its_dataset_and_one_learner_its_loader():
    whole = DataLoader(Numbers(8), batch_size=2)
    assert share_stream(whole, 0, 1) is whole
    shared = share_stream(whole, 1, 2)
    assert isinstance(whole.dataset, Numbers) and items(whole) == list(range(8))
    assert items(shared) == items(shared) == [1, 3, 5, 7]
    assert share_stream(shared, 1, 2) is shared, "a loader that comes by again is not cut twice"


@pytest.mark.parametrize(
    "whole",
    [DataLoader(Stateful(8)), OwnLoader(Numbers(8)), DataLoader(IterableWrapper(range(8)).sharding_filter(), batch_size=None)],
    ids=["state", "loader", "datapipe"],
)
def test_what_would_not_survive_is_left_whole_with_a_warning(whole):
    with pytest.warns(UserWarning, match="is not shared out"):
        assert share_stream(whole, 0, 2) is whole


def test_what_is_no_stream_stays_as_it_is():
    whole = loader()
    assert share_stream(whole, 0, 2) is whole
    assert share_stream([1, 2], 0, 2) == [1, 2]


def test_the_length_is_the_shares_or_unknown():
    assert [len(StridedStream(Sized(31), i, 3)) for i in range(3)] == [11, 10, 10]
    assert len(share_stream(DataLoader(Sized(31), batch_size=4), 1, 3)) == 3
    with pytest.raises(TypeError):
        len(StridedStream(Numbers(31), 0, 3))


def test_attributes_are_the_streams_and_it_can_be_pickled():
    stream = StridedStream(Numbers(9), 1, 2)
    stream.length = 7
    assert stream.length == stream._stream.length == 7
    with pytest.raises(AttributeError):
        _ = stream.missing
    again = pickle.loads(pickle.dumps(stream))
    assert list(again) == list(stream) == [1, 3, 5]
