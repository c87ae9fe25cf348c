"""Starting a late learner at the job's step: limits and learning-rate schedules are the job's, not the process's.

A learner that joins (again) when the others have done n inner steps would otherwise start its warm-up anew and train n steps beyond
the job's end. So its counters are advanced by n: ``global_step``, what loggers use as step, the epochs that lie behind, the position
in the present epoch, and the schedules, which are stepped n times because many of them cannot jump. Its optimizer state is fresh.

The position inside the epoch only bounds what is left of it: the sampler is not moved, so the learner trains on the epoch's first
batches where the job is near its end (loaders that can be resumed are moved, by `loader_position`). All access to Lightning's private
progress counters is in this file.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning.pytorch as pl
from torch.optim.lr_scheduler import ReduceLROnPlateau

__all__ = ["JobClock", "move_epochs"]


class JobClock:
    """Advances a Trainer to the job's step, in two parts: at train start, and at the first batch.

    Args:
        trainer: the learner's Trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._skipped_batches = 0
        self._epoch = 0

    def advance(self, job_step: int) -> None:
        """Advance counters and schedules by `job_step` inner steps; call it in ``on_train_start``.

        Args:
            job_step: inner steps that the job has done; 0 changes nothing.
        """
        if job_step <= 0:
            return
        loop = self._trainer.fit_loop.epoch_loop
        if self._trainer.lightning_module.automatic_optimization:
            steps = loop.automatic_optimization.optim_progress.optimizer.step.total
            steps.ready += job_step
            steps.completed += job_step
        else:
            # One inner step of a manual loop steps each of its optimizers once, as far as anyone can know beforehand.
            manual = loop.manual_optimization.optim_step_progress.total
            manual.ready += job_step * max(1, len(self._trainer.optimizers))
            manual.completed += job_step * max(1, len(self._trainer.optimizers))
        loop._batches_that_stepped += job_step
        epochs = self._advance_epochs(job_step)
        self._advance_schedules(job_step, epochs)

    def begin_at(self, batches: int) -> None:
        """This epoch's data begin behind so many batches, and not at their start; call it in ``on_train_start``, after `advance`."""
        length = self._trainer.num_training_batches
        if not math.isinf(length):
            self._skipped_batches, self._epoch = min(max(self._skipped_batches, batches), int(length) - 1), self._trainer.current_epoch

    def on_first_batch(self) -> None:
        """Set the position inside the epoch; call it in ``on_train_batch_start``. Later calls do nothing."""
        skipped, self._skipped_batches = self._skipped_batches, 0
        # An epoch whose data turn out to be at their end has no first batch.
        if skipped and self._trainer.current_epoch == self._epoch:
            progress = self._trainer.fit_loop.epoch_loop.batch_progress
            _move(progress.current, skipped)
            _move(progress.total, skipped)

    def _advance_epochs(self, job_step: int) -> int:
        batches = self._trainer.num_training_batches
        if math.isinf(batches) or batches < 1:
            return 0
        accumulate = self._trainer.accumulate_grad_batches
        steps_per_epoch = math.ceil(batches / accumulate)
        epochs, rest = divmod(job_step, steps_per_epoch)
        self._skipped_batches = min(rest * accumulate, int(batches) - 1)
        _move(self._trainer.fit_loop.epoch_progress.current, epochs)
        _move(self._trainer.fit_loop.epoch_progress.total, epochs)
        self._epoch = self._trainer.current_epoch
        return epochs

    def _advance_schedules(self, job_step: int, epochs: int) -> None:
        advance_schedules(self._trainer, job_step, epochs)


def move_epochs(trainer: pl.Trainer, count: int) -> None:
    """Go on `count` epochs later (earlier, if it is negative); schedules that count epochs only go forward."""
    if count:
        _move(trainer.fit_loop.epoch_progress.current, count)
        advance_schedules(trainer, 0, max(0, count))


def advance_schedules(trainer: pl.Trainer, job_step: int, epochs: int) -> None:
    """Step the schedules for what was passed over."""
    if job_step or epochs:
        with warnings.catch_warnings():
            # torch warns that a schedule was stepped before the optimizer: here that is the purpose.
            warnings.simplefilter("ignore")
            for config in trainer.lr_scheduler_configs:
                if config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau):
                    continue
                passed = job_step if config.interval == "step" else epochs
                for _ in range(passed // max(1, config.frequency)):
                    config.scheduler.step()


def _move(progress: Any, count: int) -> None:
    """Count things that happened elsewhere as ready, started, processed and completed."""
    progress.ready += count
    progress.started += count
    progress.processed += count
    progress.completed += count
