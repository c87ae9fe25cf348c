"""The end of a job in the calling process: final weights, ``checkpoints/last.ckpt``, validation of the global model, the run's record.

All of it happens after the drain: every learner has left and the syncer has written ``global.safetensors``, which is newer than what any
learner holds. So the module gets buffers and other state from learner 0, and then the parameters from that file, bit for bit; unless a
callback has left weights of its own in learner 0's module (`strategy.own_weights`).

A disk that takes nothing costs files and a log line each; the trained module is in memory, and the fit returns.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from pathlib import Path
from pickle import PicklingError
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from safetensors.torch import load_file
from torch import nn
from torch import save as torch_save

from lightning_diloco.errors import SyncerUnavailableError
from lightning_diloco.protocol.records import JoinRecord, RunRecord, TapeLine
from lightning_diloco.runtime.disk import unlink_quietly
from lightning_diloco.runtime.final_model import GLOBAL_NAME
from lightning_diloco.runtime.summary import SummaryKeeper
from lightning_diloco.runtime.tape import TAPE_NAME, TapeError, TapeTail, append_run_record
from lightning_diloco.strategy.fit_call import FitCall
from lightning_diloco.strategy.own_weights import take_own_weights
from lightning_diloco.strategy.resume import CHECKPOINT_KEY, put_final_outer_state

__all__ = ["JobRecorder", "do_without_global_model", "load_final_weights", "validate_global", "write_last_checkpoint"]

_log = logging.getLogger(__name__)


class JobRecorder:
    """Keeps what only the calling process knows of a job, and writes it at the end.

    Args:
        run_dir: the job's directory.
        called_s: monotonic time at which fit was called.
    """

    def __init__(self, run_dir: Path, called_s: float) -> None:
        self._run_dir = run_dir
        self._called_s = called_s
        self._keeper = SummaryKeeper(run_dir)
        self._tail: TapeTail | None = TapeTail(run_dir / TAPE_NAME)
        self._startup_s: float | None = None

    @property
    def has_begun(self) -> bool:
        """Whether a learner has joined."""
        return self._startup_s is not None

    def tick(self, now_s: float, restarts: dict[str, int]) -> None:
        """Look for the first join, and keep ``summary.json`` up to date; cheap if nothing is due."""
        if self._tail is not None and any(isinstance(line.record, JoinRecord) for line in self._tail.read_new()):
            self._startup_s = now_s - self._called_s
            self._tail = None
        self._keeper.known = {"startup_s": self._startup_s, "restarts": dict(restarts)}
        self._keeper.tick(now_s)

    def on_line(self, line: TapeLine) -> None:
        """As `tick`, for a caller that is told of every line of the tape."""
        now_s = time.monotonic()
        if self._startup_s is None and isinstance(line.record, JoinRecord):
            self._startup_s = now_s - self._called_s
            self._tail = None
        if self._tail is None:
            self.tick(now_s, {"learners": 0, "syncer": 0})

    def finish(
        self, status: Literal["finished", "stopped", "failed"], restarts: dict[str, int], val: dict[str, float | None] | None
    ) -> dict[str, Any]:
        """Append the run's record to the tape and write the last summary; what the disk does not take is logged, and never raised.

        Returns:
            The content of ``summary.json``, whether it could be written or not; empty if the job ended before its tape began.
        """
        tape = self._run_dir / TAPE_NAME
        if not tape.exists():
            return {}
        try:
            append_run_record(tape, RunRecord(status=status, startup_s=self._startup_s, restarts=dict(restarts), val=val))
        except (OSError, TapeError) as error:
            _log.error("%s: the run's end could not be written (%s). What the tape lacks is missing in its figures too.", tape, error)
            self._keeper.known = {"status": status, "startup_s": self._startup_s, "restarts": dict(restarts), "val": val}
        return self._keeper.finish()


def load_final_weights(module: pl.LightningModule, model_dir: Path, dump: dict[str, Any] | None) -> bool:
    """Give the module learner 0's buffers and the syncer's final parameters, in place; or what a callback has made of them.

    Args:
        module: the caller's module.
        model_dir: holds ``global.safetensors``; nothing is changed if it does not.
        dump: learner 0's training state, or None.

    Returns:
        Whether there is such a file.
    """
    is_own = take_own_weights(dump)
    path = model_dir / GLOBAL_NAME
    if not path.exists():
        return False
    state = {} if dump is None else dump["state_dict"]
    final = load_file(path)
    if is_overridden("configure_model", module) and not final.keys() <= module.state_dict().keys():
        # The module makes its layers in the learners; it is made to be called more than once.
        module.configure_model()
    if state:
        module.load_state_dict(state, strict=False)
    missing = _copy(module, final)
    if is_own:
        # After the published ones: a hook of the user's may have left some out of the state.
        module.load_state_dict(state, strict=False)
        _log.info("a callback has put weights of its own into the module: they are kept, and the published ones are in %s", path)
    if missing:
        _log.warning("the calling process's module has no tensor %s: its final weights are in %s only", ", ".join(missing), path)
    return True


def do_without_global_model(module: pl.LightningModule, run_dir: Path, dump: dict[str, Any] | None, *, has_begun: bool) -> None:
    """There is no ``global.safetensors``: the module gets the weights of learner 0, if any learner has trained.

    Args:
        module: the caller's module.
        run_dir: of the job.
        dump: learner 0's training state, or None.
        has_begun: whether a learner has joined.

    Raises:
        SyncerUnavailableError: the trained weights are nowhere.
    """
    if dump is None and not has_begun:
        _log.info("no learner has joined: there was nothing to train, and the weights are what they were")
    elif dump is None:
        raise SyncerUnavailableError(
            f"The final weights could be written neither to {run_dir} nor to the folder for temporary files. Free the disks; "
            f"lightning-diloco export {run_dir} OUT.ckpt has the model of the newest snapshot."
        )
    else:
        module.load_state_dict(dump["state_dict"], strict=False)
        _log.error("%s is nowhere: the module has the weights that learner 0 had at its end. Save them elsewhere.", run_dir / GLOBAL_NAME)


def write_last_checkpoint(trainer: pl.Trainer, run_dir: Path, dump: dict[str, Any] | None, model_dir: Path) -> None:
    """Write ``checkpoints/last.ckpt``: learner 0's training state with the final weights and the syncer's momentum.

    A state that cannot be pickled costs a warning and everything but the weights, a disk that takes nothing costs the file: the fit has
    ended well.

    Args:
        trainer: whose module has the final weights.
        run_dir: of the job.
        dump: learner 0's training state, or None.
        model_dir: where the syncer has left its outer state.
    """
    path = run_dir / "checkpoints" / "last.ckpt"
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False) if dump is None else dump
    checkpoint["state_dict"] = trainer.lightning_module.state_dict()
    put_final_outer_state(checkpoint, model_dir)
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(checkpoint, temporary, path)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises the second where it cannot write
        unlink_quietly(temporary)
        _log.error("%s could not be written: %s. The module has the final weights: trainer.save_checkpoint(PATH) elsewhere.", path, error)


def _save(checkpoint: dict[str, Any], temporary: Path, path: Path) -> None:
    try:
        torch_save(checkpoint, temporary)
    except (PicklingError, TypeError, AttributeError) as error:
        _log.warning("the training state cannot be pickled, %s has the weights and the outer state only: %s", path, error)
        kept = ("state_dict", "epoch", "global_step", "pytorch-lightning_version", CHECKPOINT_KEY)
        torch_save({name: checkpoint[name] for name in kept if name in checkpoint}, temporary)


def validate_global(trainer: pl.Trainer, fit: FitCall, run_dir: Path) -> dict[str, float | None] | None:
    """Validate the final global model once, quietly, over the fit's validation data.

    Returns:
        Metrics by Lightning's names; None if the fit has no validation loop, or if it fails, which costs a warning and not the run.
    """
    if not fit.has_validation(trainer):
        return None
    rng_states = _collect_rng_states()
    try:
        quiet = _quiet_trainer(trainer, run_dir)
        # The launcher has run it once for the machine.
        quiet._data_connector.prepare_data = _nothing  # type: ignore[method-assign]
        # What the module's `configure_callbacks` returns has seen the end of the fit.
        quiet._callback_connector._attach_model_callbacks = _nothing  # type: ignore[method-assign]
        results = quiet.validate(_twin(fit.model), dataloaders=fit.val_dataloaders, datamodule=fit.datamodule, verbose=False)
        return {name: float(value) for result in results for name, value in result.items()}
    except Exception as error:
        _log.warning("the validation of the final global model failed, summary.json has none: %s: %s", type(error).__name__, error)
        return None
    finally:
        _set_rng_states(rng_states)
        fit.give_back(trainer)


def _twin(module: pl.LightningModule) -> pl.LightningModule:
    """A copy that shares the parameters: what the hooks of this validation note in the module is not for the user's one.

    A module that cannot be copied is validated itself.
    """
    try:
        return copy.deepcopy(module, {id(p): p for p in module.parameters()})
    except Exception as error:
        _log.debug("the module cannot be copied for the last validation: %s", error)
        return module


def _nothing() -> None:
    """Stand-in for a hook that has run."""


def _quiet_trainer(trainer: pl.Trainer, run_dir: Path) -> pl.Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch.utilities.rank_zero",)}
        try:
            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            return pl.Trainer(
                accelerator="cpu",
                devices=1,
                precision=trainer.precision,
                # A module may write to its logger in `validation_step`; this validation is nobody's curve.
                logger=DummyLogger(),
                callbacks=[],
                limit_val_batches=trainer.limit_val_batches,
                inference_mode=trainer.validate_loop.inference_mode,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=run_dir,
            )
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _copy(module: nn.Module, final: dict[str, torch.Tensor]) -> list[str]:
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    missing = [name for name in final if name not in tensors]
    with torch.no_grad():
        for name, value in final.items():
            if name in tensors:
                tensors[name].copy_(value)
    return missing
