"""Lightning's own notes of how many batches an epoch has, brought up to date after batch sizes have changed.

Lightning reads the loaders' lengths once, when it sets them up. Without a refresh a larger batch ends the epoch early, where validation
silently never runs, and a smaller one drops what comes after the noted end. All of it is private to Lightning; this file is the only
place that writes it, and `tests/strategy/test_live_sizes.py` goes through every case on the installed version.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage

__all__ = ["is_epoch_over", "refresh_lengths"]


def refresh_lengths(trainer: pl.Trainer) -> None:
    """Let the fit loop count on the loaders' present lengths; call it between two batches, or where an epoch begins."""
    loop = trainer.fit_loop
    combined, fetcher = loop._combined_loader, loop._data_fetcher
    if combined is None or fetcher is None:
        return
    # A limit that is a share of the epoch may fall below what was fetched: the loop has to see a last batch, or nothing of the epoch's end
    # runs.
    least = 0 if is_epoch_over(trainer) else fetcher.fetched + 1
    lengths = [_length(loader) for loader in combined.flattened]
    limits = [_parse_num_batches(RunningStage.TRAINING, length, trainer.limit_train_batches) for length in lengths]
    combined.limits = limits = [max(limit, min(least, length)) for limit, length in zip(limits, lengths, strict=True)]
    if combined._iterator is not None:
        combined._iterator.limits = limits
    length = sized_len(combined)
    loop.max_batches = float("inf") if length is None else length
    if fetcher.length is not None:
        fetcher.length = length
    if length is not None and isinstance(trainer.val_check_interval, float) and _is_by_batches(trainer):
        trainer.val_check_batch = max(1, int(length * trainer.val_check_interval))


def is_epoch_over(trainer: pl.Trainer) -> bool:
    """Whether the last batch of an epoch has been fetched, and the next epoch has not begun."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and (loop._data_fetcher.done or loop.epoch_loop.batch_progress.is_last_batch)


def _length(loader: Any) -> float:
    length = sized_len(loader)
    return float("inf") if length is None else length


def _is_by_batches(trainer: pl.Trainer) -> bool:
    return getattr(trainer, "_val_check_time_interval", None) is None
