"""Sharing out a shuffled loader of torchdata: one order for all learners and all of their lives, as for torch's own.

Lightning knows a shuffled loader by torch's `RandomSampler`, and gives each learner a `DistributedSampler`, whose order follows from seed
and epoch. torchdata's StatefulDataLoader has a `RandomSampler` of its own, of another class; Lightning wraps it as it would any foreign
sampler, and draws its order anew each time that an iterator is made. A learner that comes back would find another order than that of
the position that it goes on from.
"""

from __future__ import annotations

import os
from typing import Any

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler

__all__ = ["share_shuffled"]


def share_shuffled(loader: Any, learner_id: int, num_learners: int) -> Any:
    """A loader of this learner's share in the order of seed and epoch, if `loader` is a shuffled one of torchdata.

    Args:
        loader: one training loader, after Lightning has wrapped its sampler.
        learner_id: which learner.
        num_learners: how many share the data.

    Returns:
        A loader of the same kind; the loader itself if there is nothing to change.
    """
    # Lightning's wrapper is within the loader's batch sampler, which is of a class of torchdata's as well.
    wrapper: Any = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if num_learners == 1 or not isinstance(loader, DataLoader) or type(wrapper) is not DistributedSamplerWrapper:
        return loader
    sampler: Any = wrapper.dataset._sampler  # type: ignore[attr-defined]
    kind, dataset = type(sampler), loader.dataset
    is_theirs = kind.__name__ == "RandomSampler" and kind.__module__.startswith("torchdata.")
    if not is_theirs or sampler.replacement or sampler.num_samples != len(dataset):  # type: ignore[arg-type]
        return loader
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    share: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=num_learners, rank=learner_id, shuffle=True, seed=seed)
    return _update_dataloader(loader, share)
