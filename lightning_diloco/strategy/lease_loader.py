"""A DataLoader whose samples come in leases: the user's own loader with another sampler, and everything else as it was.

    LeaseSampler (positions of the job's order) -> the loader's BatchSampler -> CountedBatches (how many samples each batch has)
        -> workers, collate -> the leased loader (hands the batch out, and says how many samples it has)

The loader counts samples, never batches: its batch size may differ between learners and change from one batch to the next. A last batch
that `drop_last` leaves out was drawn and not trained, so it is drawn again, and opens the next epoch.

An iteration begins at its first batch, not at `iter`: Lightning makes the iterator before the learner has joined, and a loader with workers
would draw at once. While Lightning plans an epoch the loader has a length, that of an even share; while it runs none, because how many
samples a learner gets depends on the others.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.permutation import EpochOrder

if TYPE_CHECKING:
    from lightning_diloco.runtime.leases import Leases

__all__ = ["CountedBatches", "LeaseSampler", "LoaderState", "batches_ahead", "check_loader", "is_shuffled", "lease_loader"]

_INSTEAD = "or use data='shard'."


class LoaderState:
    """What a leased loader and the callback of its fit share.

    Args:
        leases: where samples come from.
        length: batches of an even share.
    """

    def __init__(self, leases: Leases, length: int) -> None:
        self.leases = leases
        self.length = length
        self.is_planning = True
        """Whether Lightning is told a length: yes while it plans, no while an epoch runs."""
        self.limit: int | None = None
        """Batches after which an epoch is cut short (`limit_train_batches`)."""
        self.sizes: deque[int] = deque()
        """Samples of batches that the batch sampler has made and the loader has not handed out."""
        self.handed: deque[int] = deque()
        """Samples of batches that were handed out and not begun."""

    def begin(self) -> None:
        """A new iteration."""
        self.sizes.clear()
        self.handed.clear()
        self.leases.begin()


class LeaseSampler(Sampler[int]):
    """Indices of the samples that this learner trains next, until its epoch ends.

    Args:
        state: of the loader.
        batch_size: samples of a batch, at this moment.
    """

    def __init__(self, state: LoaderState, batch_sampler: BatchSampler) -> None:
        self._state, self._batches = state, batch_sampler
        self._order: EpochOrder | None = None

    def __iter__(self) -> Iterator[int]:
        """Draw as the batches need them."""
        leases = self._state.leases
        if self._order is None:
            # Not before the join: the seed is the founder's.
            spec = leases.spec
            self._order = EpochOrder(spec.num_samples, is_shuffled=spec.is_shuffled, seed=spec.seed)
        while (item := leases.draw(self._batches.batch_size)) is not None:
            yield from self._order.indices(item.epoch, item.start, item.stop)

    def __len__(self) -> int:
        """Samples of the whole data set."""
        return self._state.leases.spec.num_samples


class CountedBatches:
    """A batch sampler that notes how many samples each of its batches has; all else is the batch sampler's own.

    Args:
        batches: makes the batches.
        state: of the loader.
    """

    def __init__(self, batches: BatchSampler, state: LoaderState) -> None:
        vars(self).update(_batches=batches, _state=state)

    @property
    def batches(self) -> Any:
        """The batch sampler itself."""
        return vars(self)["_batches"]

    def replace(self, batches: BatchSampler) -> None:
        """Let these make the batches, from the same samples."""
        vars(batches.sampler)["_batches"] = batches
        vars(self)["_batches"] = batches

    def __iter__(self) -> Iterator[list[int]]:
        """The batches, noted."""
        for batch in vars(self)["_batches"]:
            vars(self)["_state"].sizes.append(len(batch))
            yield batch

    def __len__(self) -> int:
        """Batches of an even share."""
        return int(vars(self)["_state"].length)

    def __getattr__(self, name: str) -> Any:
        """What the batch sampler has."""
        if name.startswith("__") or "_batches" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["_batches"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it on the batch sampler (its size may be changed while it runs)."""
        setattr(vars(self)["_batches"], name, value)


def _leased_class(cls: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    """A loader's class with another way to be iterated, of the same layout in memory: an instance can become one of it."""

    def batches(self: Any) -> Iterator[Any]:
        """The class's own batches; how many samples each has is handed out beside it."""
        state, carried = self.lease_state, 0
        state.begin()
        for number, batch in enumerate(cls.__iter__(self), start=1):
            size = state.sizes.popleft() + carried
            # Lightning passes over a batch that is None, and calls no hook for it: its samples count with the next one.
            carried = size if batch is None else 0
            if batch is not None:
                state.handed.append(size)
            yield batch
            if number == state.limit:
                return

    def length(self: Any) -> int:
        """Batches of an even share, while Lightning plans."""
        if not self.lease_state.is_planning:
            raise TypeError("While an epoch runs nobody knows how many batches a learner will get.")
        return int(self.lease_state.length)

    return type(f"Leased{cls.__name__}", (cls,), {"__iter__": batches, "__len__": length})


def lease_loader(loader: DataLoader[Any], state: LoaderState) -> DataLoader[Any]:
    """A copy of a loader that was checked, whose samples are leased; the user's own stays as it is."""
    sampler_cls = type(loader.batch_sampler)
    assert loader.batch_size is not None
    batches = sampler_cls(loader.sampler, loader.batch_size, loader.drop_last)  # type: ignore[call-arg, misc]
    sampler = LeaseSampler(state, batches)  # type: ignore[arg-type]
    vars(batches)["sampler"] = sampler
    leased = copy.copy(loader)
    # DataLoader refuses to have these set; a copy that was never iterated has nothing that depends on the old ones.
    vars(leased).update(sampler=sampler, batch_sampler=CountedBatches(batches, state), _iterator=None, lease_state=state)  # type: ignore[arg-type]
    object.__setattr__(leased, "__class__", _leased_class(type(loader)))
    return leased


def is_shuffled(loader: DataLoader[Any]) -> bool:
    """Whether the user has asked for a random order."""
    return isinstance(loader.sampler, RandomSampler)


def batches_ahead(loader: DataLoader[Any]) -> int:
    """Batches that are fetched before they are trained: by the workers, and one that Lightning looks ahead."""
    return loader.num_workers * (loader.prefetch_factor or 2) + 1


def check_loader(loader: object) -> DataLoader[Any]:
    """Check that the samples of a loader can be leased.

    Raises:
        ConfigurationError: they cannot; the sentence says why, and what to do.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(f"data='lease' with {type(loader).__name__}: only a DataLoader can be given samples. Pass one, {_INSTEAD}")
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigurationError(
            f"data='lease' with {type(loader.dataset).__name__}: an IterableDataset has no samples that could be asked for by number. "
            f"Pass a data set with __getitem__ and __len__, {_INSTEAD}"
        )
    if len(loader.dataset) == 0:  # type: ignore[arg-type]
        raise ConfigurationError("data='lease' with an empty data set: there is nothing to hand out. Pass one with samples.")
    _check_sampling(loader)
    cls = type(loader)
    own = [name for name in ("__iter__", "__len__", "_get_iterator") if getattr(cls, name) is not getattr(DataLoader, name)]
    if own:
        raise ConfigurationError(
            f"data='lease' with {cls.__name__}, which has a {own[0]} of its own: its batches cannot be told apart from its samples. Pass a "
            f"torch.utils.data.DataLoader, {_INSTEAD}"
        )
    if not getattr(loader, "in_order", True):
        raise ConfigurationError(
            f"data='lease' with in_order=False: what was trained is told by the order of the batches. Leave in_order=True, {_INSTEAD}"
        )
    return loader


def _check_sampling(loader: DataLoader[Any]) -> None:
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        name = "batch_size=None" if loader.batch_sampler is None else f"batch_sampler={type(loader.batch_sampler).__name__}"
        raise ConfigurationError(
            f"data='lease' with {name}: leases need torch's own batch sampler. Pass a batch_size, and no batch_sampler, to the DataLoader, "
            f"{_INSTEAD}"
        )
    sampler = loader.sampler
    if type(sampler) not in (RandomSampler, SequentialSampler):
        raise ConfigurationError(
            f"data='lease' with sampler={type(sampler).__name__}: the job decides which samples come next. Pass shuffle=True or "
            f"shuffle=False to the DataLoader, and no sampler, {_INSTEAD}"
        )
    is_partial = isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != len(loader.dataset))  # type: ignore[arg-type]
    if is_partial:
        raise ConfigurationError(
            f"data='lease' with a RandomSampler that draws with replacement or not all samples: each is handed out once in an epoch. "
            f"Pass shuffle=True to the DataLoader, and no sampler, {_INSTEAD}"
        )
