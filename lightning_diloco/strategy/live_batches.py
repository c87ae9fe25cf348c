"""Batches whose size can change while a loader is being read, without a change in the user's code.

`make_live` gives a copy of a DataLoader whose batch sampler asks for its size at every batch. torch's own reads its size once per epoch
where ``drop_last`` is on, and its length knows nothing of a change; here the length of an epoch is what was drawn plus what the rest
makes at the present size. Workers draw ahead, so a change reaches the training after the batches that are on their way: which size a batch
has that is trained now is told by `LiveBatchSampler.trained`.

Every sample is drawn once per epoch; with ``drop_last`` less than one batch at the end is not. A batch that could not be trained (no
memory) is given back and drawn again in smaller ones.

Loaders without a batch sampler (``batch_size=None``) or with one of the user's own decide sizes themselves: they are refused.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sized
from functools import cache
from itertools import islice
from typing import Any

from lightning.fabric.utilities.data import has_iterable_dataset
from torch.utils.data import BatchSampler, DataLoader

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.strategy.lease_loader import CountedBatches

__all__ = ["LiveBatchSampler", "LiveSize", "make_live", "present_batch_size"]


class LiveSize:
    """The present batch size, shared by all training loaders of a learner.

    Several loaders keep the proportion that the user gave their sizes: the first one has the size, the others as many times more or less.
    """

    def __init__(self) -> None:
        self.reference = 0
        """Size of the first loader as the user wrote it; 0 before it is known."""
        self.size = 0
        """Samples of a batch of the first loader, from the next one that is drawn."""

    def adopt(self, size: int) -> None:
        """The first loader is there, with this size."""
        if not self.reference:
            self.reference = size
            self.size = self.size or size

    def of(self, own: int) -> int:
        """The present size of a loader that the user gave the size `own`."""
        return max(1, round(own * self.size / self.reference))


class LiveBatchSampler(BatchSampler):
    """Draws batches of the present size.

    Args:
        sampler: of indices, or torch's endless one for a stream.
        size: shared.
        own: this loader's size as the user wrote it.
        drop_last: leave out what is left at the end of an epoch, if it is less than a batch.
        num_samples: of an epoch; None: not known, or endless.
        is_stream: the indices mean nothing, and the stream ends by itself.
    """

    def __init__(
        self, sampler: Any, size: LiveSize, own: int, *, drop_last: bool, num_samples: int | None = None, is_stream: bool = False
    ) -> None:
        self.sampler, self.drop_last = sampler, drop_last
        self._size, self._own, self._num_samples, self._is_stream = size, own, num_samples, is_stream
        self._drawn: deque[tuple[list[Any], int]] = deque()
        self.nominal = 0
        """The size for which the batch was drawn that `trained` has told of last; the last batch of an epoch may have fewer."""
        self._returned: deque[Any] = deque()
        self._is_running = False
        self._batches = 0
        self._samples = 0
        self._last = 0
        self._is_over = False

    # ---- drawing ------------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[list[Any]]:
        """The batches of one epoch."""
        # Not in the generator: lengths are asked for before the first batch is drawn.
        self._is_running, self._is_over = True, False
        self._batches = self._samples = self._last = 0
        self._drawn.clear()
        return self._draw(iter(self.sampler))

    def _draw(self, indices: Iterator[Any]) -> Iterator[list[Any]]:
        # What the length said was the last batch stays it: the loop has ended its epoch by it.
        while not self._is_over and (count := self._next_count()):
            batch = [self._returned.popleft() for _ in range(min(count, len(self._returned)))]
            batch.extend(islice(indices, count - len(batch)))
            if not batch or (self.drop_last and len(batch) < count):
                break
            self._batches += 1
            self._samples += len(batch)
            self._last = len(batch)
            # An epoch's last batch is smaller because nothing else is left, not because another size was chosen.
            self._drawn.append((batch, count if self.drop_last else self._size.of(self._own)))
            self._is_over = self._num_samples is not None and not self._is_stream and self._rest() == 0
            yield batch
        self._is_over = True

    def _next_count(self) -> int:
        size = self._size.of(self._own)
        if self._num_samples is None or self._is_stream:
            return size
        left = self._num_samples - self._samples
        if left >= size or not self.drop_last:
            return min(size, left)
        # The size has grown over what is left: the batch that was promised by the length comes at the old size.
        return self._last if 0 < self._last <= left else 0

    def _rest(self) -> int:
        """Batches that are still to be drawn, at the present size."""
        if self._num_samples is None:
            return 0
        size, left = self._size.of(self._own), max(0, self._num_samples - self._samples)
        if not self.drop_last:
            return -(-left // size)
        return left // size or int(0 < self._last <= left)

    def __len__(self) -> int:
        """Batches of the epoch that is being read, or of the next one.

        Raises:
            TypeError: the number of samples is not known.
        """
        if self._num_samples is None:
            raise TypeError("This stream does not know its length.")
        if self._is_running:
            return self._batches + (0 if self._is_over else self._rest())
        size = self._size.of(self._own)
        return self._num_samples // size if self.drop_last else -(-self._num_samples // size)

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Samples of the batch that is drawn next."""
        return self._size.of(self._own)

    def rewind(self) -> None:
        """The epoch has ended, whether all of it was drawn or not: lengths are those of the next one."""
        self._is_running = False

    # ---- what becomes of them -----------------------------------------------------------------------------------------------

    def trained(self) -> list[Any]:
        """The next batch has been trained: its indices, oldest first (empty: a loader that was read before this epoch)."""
        if not self._drawn:
            return []
        batch, self.nominal = self._drawn.popleft()
        return batch

    def give_back(self, indices: list[Any]) -> bool:
        """Draw these again in this epoch; False: it is over, or a stream, which gives nothing twice."""
        if self._is_stream or self._is_over or not self._is_running:
            return False
        self._returned.extend(indices)
        self._samples -= len(indices)
        return True


def make_live(loader: Any, size: LiveSize) -> Any:
    """A copy of a training loader that draws batches of the present size; one that does so already comes back as it is.

    Args:
        loader: as Lightning gives it to the strategy.
        size: shared by the learner's loaders.

    Raises:
        ConfigurationError: sizes cannot be changed from outside; the sentence says why.
    """
    why = _obstacle(loader)
    if why:
        raise ConfigurationError(
            f"batch_sizing= and tokens_per_step= need a loader whose batches are made by torch's own BatchSampler; {why}. "
            "Give the DataLoader a batch_size, or leave out the option and set sizes yourself."
        )
    counted = loader.batch_sampler
    batches = counted.batches if isinstance(counted, CountedBatches) else counted
    if isinstance(batches, LiveBatchSampler):
        return loader
    size.adopt(batches.batch_size)
    if isinstance(counted, CountedBatches):
        # Leased: how many samples an epoch has for this learner nobody knows, and the loader is a copy already.
        counted.replace(LiveBatchSampler(batches.sampler, size, batches.batch_size, drop_last=batches.drop_last))
        return loader
    is_stream = has_iterable_dataset(loader)
    live = LiveBatchSampler(
        batches.sampler,
        size,
        batches.batch_size,
        drop_last=batches.drop_last,
        num_samples=_num_samples(loader, is_stream),
        is_stream=is_stream,
    )
    copied = copy.copy(loader)
    # DataLoader refuses to have its batch sampler set; a copy that was never iterated has nothing that depends on the old one.
    vars(copied).update(batch_sampler=live, _iterator=None)
    kind: Any = type(loader)
    copied.__class__ = _with_live_length(kind)
    return copied


def present_batch_size(trainer: Any) -> int:
    """Samples of a batch of the first training loader, as it is now; 0 where it is not known."""
    combined = trainer.fit_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    sampler = getattr(loaders[0], "batch_sampler", None) if loaders else None
    size = getattr(sampler, "batch_size", None)
    return size if isinstance(size, int) else 0


def _obstacle(loader: Any) -> str:
    if not isinstance(loader, DataLoader):
        return f"the training data is a {type(loader).__name__}, not a DataLoader"
    if loader.batch_sampler is None:
        return "this one has batch_size=None"
    if type(loader.batch_sampler) not in (BatchSampler, LiveBatchSampler, CountedBatches):
        return f"this one has a {type(loader.batch_sampler).__name__}"
    return ""


def _num_samples(loader: Any, is_stream: bool) -> int | None:
    # Workers are told to draw beyond a stream's end, and each ends its part with a batch of its own size: nobody knows how many there are.
    source = loader.batch_sampler.sampler if not is_stream else loader.dataset if loader.num_workers == 0 else None
    try:
        return len(source) if isinstance(source, Sized) else None
    except (TypeError, NotImplementedError):
        return None


@cache
def _with_live_length(kind: Any) -> Any:
    """The loader's class, with the length of a stream by its live sampler too: torch divides it by the size of the beginning."""

    def length(self: Any) -> int:
        """Batches at the present size."""
        return len(self.batch_sampler)

    return type(kind.__name__, (kind,), {"__len__": length, "__module__": kind.__module__, "__doc__": kind.__doc__})
