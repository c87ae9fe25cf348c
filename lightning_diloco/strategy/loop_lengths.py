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

__all__ = ["is_epoch_over", "refresh_lengths", "will_iterate_again"]


def refresh_lengths(trainer: pl.Trainer, begun: int) -> None:
    """Let the fit loop count on the loaders' present lengths; call it between two batches, or where an epoch begins.

    Lightning's own count of an epoch's batches may be ahead of the iterator's: after a resume, and for a learner that joins late.

    Args:
        trainer: of a fit.
        begun: batches of this epoch whose training has begun, from this iterator.
    """
    loop = trainer.fit_loop
    combined, fetcher = loop._combined_loader, loop._data_fetcher
    if combined is None or fetcher is None:
        return
    # What is fetched and trained is no part of a limit that has become shorter: the loop has to see a last batch, or nothing of the
    # epoch's end runs.
    least = begun + 1 if begun else 0
    lengths = [_length(loader) for loader in combined.flattened]
    limits = [_parse_num_batches(RunningStage.TRAINING, length, trainer.limit_train_batches) for length in lengths]
    combined.limits = limits = [max(limit, min(least, length)) for limit, length in zip(limits, lengths, strict=True)]
    if combined._iterator is not None:
        combined._iterator.limits = limits
    length, ahead = sized_len(combined), loop.epoch_loop.batch_progress.current.ready - begun if begun else 0
    loop.max_batches = float("inf") if length is None else length + ahead
    if fetcher.length is not None and length is not None:
        fetcher.length = length + (max(0, fetcher.fetched - begun) if begun else 0)
    _refresh_validation(trainer)


def _refresh_validation(trainer: pl.Trainer) -> None:
    max_batches, interval = trainer.fit_loop.max_batches, trainer.val_check_interval
    if max_batches == float("inf") or getattr(trainer, "_val_check_time_interval", None) is not None:
        return
    if isinstance(interval, float):
        trainer.val_check_batch = max(1, int(max_batches * interval))
    elif trainer.check_val_every_n_epoch is not None and isinstance(interval, int):
        # An epoch that has become shorter than the interval is validated at its end, and not never.
        trainer.val_check_batch = int(min(interval, max_batches))


def is_epoch_over(trainer: pl.Trainer) -> bool:
    """Whether the last batch of this epoch has been fetched: its length stays what it is."""
    loop = trainer.fit_loop
    is_done = loop._data_fetcher is not None and loop._data_fetcher.done
    return is_done or loop.epoch_loop.batch_progress.is_last_batch or loop.epoch_loop._num_ready_batches_reached()


def will_iterate_again(trainer: pl.Trainer) -> bool:
    """Whether Lightning makes a new iterator for the epoch that begins; the first one, or the one it goes on in, has its own already."""
    loop = trainer.fit_loop
    return trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting


def _length(loader: Any) -> float:
    length = sized_len(loader)
    return float("inf") if length is None else length
