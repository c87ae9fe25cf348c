"""`LeaseFeed`: where Lightning's hooks meet the data leases (``data="lease"``).

A learner's Lightning epoch is the job's epoch that it trains on: a late learner begins where the job is, and one that was too slow to
get any samples of an epoch passes over it. So ``max_epochs`` is the number of times that the job goes through the data set.

| hook | what happens |
|---|---|
| `take` (the strategy's ``process_dataloader``) | the loader is checked and its samples become leased |
| ``on_train_start`` | Lightning is told that nobody knows the number of batches (first in the list: before the join) |
| ``on_train_epoch_start`` | the loader's length is taken away for the epoch, so that Lightning looks one batch ahead to find its end |
| ``on_train_batch_start``, ``_end`` | the batch's samples are known, then processed; an optimizer step makes them trained |
| ``on_train_epoch_end`` | the epoch counter becomes that of the samples that come next |

All access to Lightning's private fields is in this file and in `job_clock`.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils.data import DataLoader

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.protocol.identity import DataSpec
from lightning_diloco.runtime.leases import Leases
from lightning_diloco.strategy.job_clock import move_epochs
from lightning_diloco.strategy.lease_loader import LoaderState, batches_ahead, check_loader, is_shuffled, lease_loader

if TYPE_CHECKING:
    from lightning_diloco.strategy.assignment import Assignment
    from lightning_diloco.strategy.batching import BatchSizing

__all__ = ["LeaseFeed"]


class LeaseFeed(Callback):
    """Feeds the training loader of one fit with leased samples.

    Args:
        trainer: of the fit.
        assignment: of this learner.
    """

    def __init__(self, trainer: pl.Trainer, assignment: Assignment) -> None:
        self._trainer: Any = trainer
        self._assignment = assignment
        self._loader: DataLoader[Any] | None = None
        self._state: LoaderState | None = None
        self._size = 0

    @property
    def leases(self) -> Leases | None:
        """The leases of this fit; None before its loader was made."""
        return None if self._state is None else self._state.leases

    def take(self, loader: object) -> object:
        """Make a training loader a leased one.

        Raises:
            ConfigurationError: its samples cannot be leased, or it is another data set than before.
        """
        trainer = self._trainer
        if trainer.state.stage != RunningStage.TRAINING or getattr(loader, "lease_state", None) is not None:
            return loader
        self._check_trainer()
        checked = check_loader(loader)
        num_samples, state = len(checked.dataset), self._state  # type: ignore[arg-type]
        if state is not None and state.leases.spec.num_samples != num_samples:
            raise ConfigurationError(
                f"The training data has {num_samples} samples, and had {state.leases.spec.num_samples} when the job began. With "
                "data='lease' it must stay the same when it is loaded again."
            )
        assert checked.batch_size is not None
        share = -(-num_samples // self._assignment.num_learners)
        length = max(1, share // checked.batch_size if checked.drop_last else -(-share // checked.batch_size))
        if state is None:
            max_epochs = trainer.max_epochs
            is_cut = trainer.limit_train_batches != 1.0 or max_epochs is None or max_epochs < 0
            leases = Leases(
                DataSpec(
                    num_samples=num_samples,
                    is_shuffled=is_shuffled(checked),
                    seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
                    first_epoch=trainer.fit_loop.epoch_progress.current.processed,
                ),
                # Epochs that are cut short are Lightning's own, and go on in the data where the last one ended.
                until=None if is_cut else max_epochs,
                # A supervisor brings the syncer back, or ends the job; by hand a learner has only its own limit.
                share=share if self._assignment.role == "island" else None,
                batch_size=self._batch_size,
                batches_ahead=batches_ahead(checked),
            )
            self._state = state = LoaderState(leases, length)
        state.length = length
        self._loader = lease_loader(checked, state)
        return self._loader

    def _check_trainer(self) -> None:
        trainer = self._trainer
        if trainer.overfit_batches:
            raise ConfigurationError(
                f"data='lease' with overfit_batches={trainer.overfit_batches}: the same batches are trained over and over, and leases hand "
                "out each sample once. Use data='shard'."
            )
        if is_param_in_hook_signature(trainer.lightning_module.training_step, "dataloader_iter", explicit=True):
            raise ConfigurationError(
                "data='lease' with training_step(dataloader_iter): nobody can tell which samples such a step has trained. Take the batch "
                "as an argument, or use data='shard'."
            )
        if self._state is not None and trainer.fit_loop._combined_loader is None:
            raise ConfigurationError(
                "data='lease' with several training loaders: leases of several data sets are not there yet. Pass one DataLoader, or use "
                "data='shard'."
            )

    def _batch_size(self) -> int:
        size = getattr(getattr(self._loader, "batch_sampler", None), "batch_size", None)
        return size if isinstance(size, int) and size > 0 else 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nobody knows how many batches come; the job's clock must not count with an estimate."""
        trainer.fit_loop.max_batches = math.inf

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an epoch whose length nobody knows."""
        loop, state = trainer.fit_loop, self._state
        combined, limit = loop._combined_loader, trainer.limit_train_batches
        if state is None or combined is None or loop._data_fetcher is None:
            return
        if isinstance(limit, int):
            state.limit = limit
        elif limit < 1.0:
            state.limit = max(1, int(state.length * limit))
        state.is_planning = False
        loop.max_batches, combined.limits = math.inf, [math.inf]
        if trainer.val_check_interval == 1.0 and not isinstance(trainer.val_check_interval, int) and trainer.val_check_batch is not None:
            trainer.val_check_batch = math.inf
        self._align()
        # Lightning makes a new iterator for every epoch but the first, whose first batch it has not looked for.
        if not (trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting):
            iter(loop._data_fetcher)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Note how many samples the batch has."""
        if self._state is not None:
            self._size = self._state.handed.popleft()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The batch went through a training step, unless it did not fit into memory: then its samples come again."""
        if self._state is None:
            return
        batching: BatchSizing | None = trainer.strategy.batching  # type: ignore[attr-defined]
        if batching is not None and batching.has_failed:
            self._state.leases.dropped(self._size)
        else:
            self._state.leases.processed(self._size)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count epochs as the job does, and let Lightning plan the next one."""
        if self._state is not None:
            self._state.is_planning = True
            self._align()

    def _align(self) -> None:
        state, progress = self._state, self._trainer.fit_loop.epoch_progress
        if state is None or state.limit is not None:
            return
        epoch = state.leases.next_epoch()
        if epoch is not None:
            move_epochs(self._trainer, epoch - progress.current.processed)
