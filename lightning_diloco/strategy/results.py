"""What learner 0 brings back, and how the calling process takes it over, so that a fit looks as if it had run there.

Back come the loops' progress, the callbacks' states, the metrics, the Trainer's state, and with the training state's checkpoint the
module's complete ``state_dict``. Callbacks are found again by Lightning's own state key; one that only exists in the learner
(``configure_callbacks``) has nobody to take its state. A checkpoint callback takes its folder first, because Lightning ignores scores
that belong to another one.

A learner that fails brings back its exception and the text of its traceback, and whether it was memory that ran out.
"""

from __future__ import annotations

import logging
import pickle
import traceback
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cloudpickle
import lightning.pytorch as pl
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer import call
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_diloco.errors import LearnerFailedError
from lightning_diloco.strategy.deaths import is_death_by_memory
from lightning_diloco.strategy.exchange import first_that_takes

__all__ = ["LearnerResult", "as_exception", "collect", "failure", "leave_result", "merge", "read_result", "write_result"]

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LearnerResult:
    """How one life of a learner ended."""

    outcome: Literal["done", "signal", "memory", "failed"]
    """`done`: the fit returned; `signal`: it left in order after SIGTERM; `memory`: it ran out; `failed`: another exception ended it."""
    exception: bytes | None = None
    """The pickled exception of a failure; None if it cannot be pickled."""
    traceback_text: str = ""
    """Its traceback, as Python prints it."""
    state: Any = None
    """The Trainer's state."""
    loops: dict[str, Any] = field(default_factory=dict)
    """Progress of the fit loop."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """States by state key."""
    checkpoint_folders: dict[str, str] = field(default_factory=dict)
    """Resolved folders of checkpoint callbacks by state key."""
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``callback``, ``logged`` and ``progress_bar`` metrics."""
    should_stop: bool = False
    """``trainer.should_stop`` at the end."""


def collect(trainer: pl.Trainer) -> LearnerResult:
    """Gather a learner's result after its fit has returned."""
    folders = {c.state_key: str(c.dirpath) for c in trainer.checkpoint_callbacks if getattr(c, "dirpath", None) is not None}  # type: ignore[attr-defined]
    return LearnerResult(
        outcome="done",
        state=trainer.state,
        loops=trainer.fit_loop.state_dict(),
        callbacks=call._call_callbacks_state_dict(trainer),
        checkpoint_folders=folders,
        metrics={
            "callback": _plain(trainer.callback_metrics),
            "logged": _plain(trainer.logged_metrics),
            "progress_bar": _plain(trainer.progress_bar_metrics),
        },
        should_stop=trainer.should_stop,
    )


def failure(error: BaseException) -> LearnerResult:
    """Describe the exception that ended a learner."""
    text = "".join(traceback.format_exception(error))
    try:
        data = cloudpickle.dumps(error.with_traceback(None))
        pickle.loads(data)
    except Exception:
        # An exception whose constructor wants more than its args, or that holds a socket: the text has to do.
        data = None
    return LearnerResult(outcome="memory" if is_death_by_memory(error) else "failed", exception=data, traceback_text=text)


def as_exception(learner_id: int, result: LearnerResult) -> BaseException:
    """The learner's exception, with the remote traceback as its cause."""
    remote = LearnerFailedError(f"learner {learner_id} raised:\n\n{result.traceback_text}")
    if result.exception is None:
        return remote
    error = pickle.loads(result.exception)
    assert isinstance(error, BaseException)
    error.__cause__ = remote
    return error


def write_result(result: LearnerResult, path: Path) -> None:
    """Write a result in one step: a reader sees all of it or nothing."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        cloudpickle.dump(result, file)
    temporary.replace(path)


def leave_result(result: LearnerResult, path: Path, spare_dir: Path | None) -> None:
    """Write a result where the supervisor looks for it; never raises for the disk.

    Args:
        result: of this process.
        path: the usual place.
        spare_dir: holds the other one, if there is one.
    """
    error = first_that_takes(lambda place: write_result(result, place), path, spare_dir)
    if error is not None:
        _log.error(
            "The result of this learner is lost, it could not be written to %s (%s). Its training is in the global model.", path, error
        )


def read_result(path: Path) -> LearnerResult | None:
    """Read a result of one of our own learners; None if it has not written one."""
    try:
        with path.open("rb") as file:
            result = pickle.load(file)
    except FileNotFoundError:
        return None
    assert isinstance(result, LearnerResult)
    return result


def merge(trainer: pl.Trainer, result: LearnerResult) -> None:
    """Take over learner 0's result in the calling process.

    Args:
        trainer: the Trainer whose fit the learners ran.
        result: of outcome `done`.
    """
    trainer.state = result.state
    trainer.fit_loop.load_state_dict(result.loops)
    _forget_restart(trainer.fit_loop)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        key = callback.state_key
        if key in result.checkpoint_folders:
            callback.dirpath = result.checkpoint_folders[key]
        if key in result.callbacks:
            callback.load_state_dict(deepcopy(result.callbacks[key]))
    connector = trainer._logger_connector
    connector._callback_metrics = dict(result.metrics["callback"])
    connector._logged_metrics = dict(result.metrics["logged"])
    connector._progress_bar_metrics = dict(result.metrics["progress_bar"])
    trainer.should_stop = result.should_stop


def _forget_restart(loop: _Loop) -> None:
    """A loop that loads its state believes that it resumes; this one has only caught up with what happened elsewhere."""
    loop._restarting = False
    loop._loaded_from_state_dict = False
    loop._resuming_from_checkpoint = False
    for child in vars(loop).values():
        if isinstance(child, _Loop):
            _forget_restart(child)


def _plain(metrics: Any) -> dict[str, Any]:
    return dict(apply_to_collection(dict(metrics), Tensor, lambda t: t.detach().cpu().clone()))
