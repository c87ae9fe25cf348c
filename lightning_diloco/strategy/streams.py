"""Sharing out an `IterableDataset`: learner i of L takes the items i, i + L, i + 2 L, ... of the stream.

Lightning cuts map-style data with a sampler and leaves streams alone, so L learners would each train on everything. A stride needs
nothing of the dataset but the same order on every learner: each loader worker strides over its own part of the stream, and all learners
have the same loader with the same number of workers, so the parts are disjoint and complete. Where the order is random and differs
between learners (each has a random stream of its own), items are taken twice or not at all; and every learner reads the others' items.

A stream with a state of its own, a datapipe, and a loader of another class are left whole: type and state would not survive. Who shares
out the stream inside the dataset turns all of this off with ``Trainer(use_distributed_sampler=False)``, Lightning's own word for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.fabric.utilities.data import has_iterable_dataset
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe

__all__ = ["StridedStream", "share_stream"]


class StridedStream(IterableDataset[Any]):
    """Every `count`-th item of a stream, beginning with item `index`; all else (attributes, length) is the stream's own.

    Args:
        stream: the user's dataset.
        index: which share, from 0.
        count: number of shares.
    """

    _stream: Any
    _index: int
    _count: int

    def __init__(self, stream: IterableDataset[Any], index: int, count: int) -> None:
        vars(self).update(_stream=stream, _index=index, _count=count)

    def __iter__(self) -> Iterator[Any]:
        """The items of this share, in the stream's order."""
        return islice(iter(self._stream), self._index, None, self._count)

    def __len__(self) -> int:
        """Items of this share, if the stream knows its own length.

        Raises:
            TypeError: it does not.
        """
        return -(-(len(self._stream) - self._index) // self._count)

    def __getattr__(self, name: str) -> Any:
        """What the stream has: a worker's init function, for example, asks the dataset for its fields, and sets them."""
        if name in ("_stream", "_index", "_count") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._stream, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it on the stream."""
        setattr(self._stream, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle keeps: not the stream's own way of being pickled."""
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take back what `__getstate__` gave."""
        vars(self).update(state)


def share_stream(loader: Any, learner_id: int, num_learners: int) -> Any:
    """A loader of this learner's share, if `loader` reads a stream; everything else comes back as it is.

    Args:
        loader: one training loader.
        learner_id: which learner.
        num_learners: how many share the data.

    Returns:
        A copy of the loader, so that the user's own keeps its dataset; the loader itself if there is nothing to share out.
    """
    if num_learners == 1 or not isinstance(loader, DataLoader) or not has_iterable_dataset(loader):
        return loader
    stream: Any = loader.dataset
    if isinstance(stream, StridedStream):
        return loader
    if type(loader) is not DataLoader or isinstance(stream, IterDataPipe) or hasattr(stream, "state_dict"):
        rank_zero_warn(
            "The training data is an IterableDataset that is not shared out, because its loader, type or state would not survive it: "
            f"each of {num_learners} learners reads all of it. Share it out inside the dataset (`trainer.global_rank` is the learner's id)."
        )
        return loader
    rank_zero_warn(
        f"The training data is an IterableDataset: each of {num_learners} learners trains on every {num_learners}-th item, which needs the "
        "same order on all of them. If the dataset is shared out already, pass Trainer(use_distributed_sampler=False)."
    )
    shared = copy.copy(loader)
    # DataLoader refuses to have its dataset set; a copy that was never iterated has nothing that depends on the old one.
    vars(shared).update(dataset=StridedStream(stream, learner_id, num_learners), _iterator=None)
    return shared
