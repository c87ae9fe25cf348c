"""The training state at the end of a fit, from a checkpoint that was written after the last step, without calling the user's hooks again.

Between that checkpoint and the end a scheduler may have stepped, an epoch may have ended, and EarlyStopping may have counted once more. So
what Lightning knows itself is taken anew; what hooks of the user's have put in is taken from the checkpoint.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from lightning_diloco.strategy.exchange import first_that_takes

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_diloco.strategy.strategy import DecoupledDiLoCoStrategy

__all__ = ["leave_training_state", "refreshed"]

_log = logging.getLogger(__name__)


def refreshed(trainer: pl.Trainer, written: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's content with the present state of weights, loops, optimizers, schedulers and Lightning's own callbacks.

    Args:
        trainer: at the end of its fit.
        written: the content of a whole checkpoint, but for ``state_dict``, of the same inner step.
    """
    callbacks = dict(written.get("callbacks", {}))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # A method of the user's may count its calls, or cost something.
        if callback.state_key in callbacks and type(callback).state_dict.__module__.startswith("lightning."):
            callbacks[callback.state_key] = callback.state_dict()
    return {
        **written,
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "state_dict": trainer.lightning_module.state_dict(),
        "loops": trainer._checkpoint_connector._get_loops_state_dict(),
        "callbacks": callbacks,
        "optimizer_states": [trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }


def leave_training_state(strategy: DecoupledDiLoCoStrategy, path: Path, spare_dir: Path | None = None) -> None:
    """For the calling process, which writes the last checkpoint after the drain; inline that is this one.

    Args:
        strategy: of learner 0, at the end of its fit.
        path: where the state goes, if it has to travel.
        spare_dir: where it goes if it cannot be written there.
    """
    assert strategy._trainer is not None and strategy._outer_sync is not None and strategy.assignment is not None
    failed: Exception | None = None
    try:
        state = strategy._outer_sync.training_state(strategy._trainer)
        if strategy.assignment.role == "inline":
            strategy.final_state = state
        else:
            failed = first_that_takes(lambda place: torch.save(state, place), path, spare_dir)
    except Exception as error:
        failed = error
    if failed is not None:
        _log.warning("the training state could not be written, last.ckpt will lack the optimizers: %s", failed)
