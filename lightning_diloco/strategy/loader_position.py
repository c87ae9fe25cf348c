"""`LoaderPosition`: where a learner was in its training data, on disk, so that a life that follows goes on there.

    RUN_DIR/rejoin/learner_1.loaders.pt

Only where *all* training loaders have ``state_dict`` and ``load_state_dict`` (Lightning's own test for a loader that can be resumed;
torchdata's StatefulDataLoader is one). Leased samples have their ledger, and plain loaders begin their epoch anew.

**Which state.** A position belongs to an optimizer step: what was fetched and not trained must come again. Lightning fetches one batch
ahead where nobody knows a loader's length, so there the state that was read one batch ago is the right one. Every `rejoin_every_steps`
steps it is read and pickled on the training thread (it changes with the next batch); the rest is done on a thread of its own. What was
trained since the last one is trained again.

**When it holds.** A file counts for a life of the same learner, in the same job, with the same share of the data, in the same epoch: in a
later one, where the job has gone on meanwhile, the data begin anew as for everybody. An epoch without a known length is the learner's own,
since nobody can say in which one the job is, and is gone on with.

States are whatever a loader keeps. They are read with torch's unpickler for plain data and tensors, which runs no code; a loader whose
state is more than that is named in the log, and its position not saved.
"""

from __future__ import annotations

import io
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import Callback

from lightning_diloco.runtime.disk import unlink_quietly
from lightning_diloco.runtime.threads import never_interrupt_others
from lightning_diloco.strategy.job_clock import move_epochs
from lightning_diloco.strategy.loop_lengths import will_iterate_again

if TYPE_CHECKING:
    from lightning_diloco.strategy.outer_sync import OuterSync

__all__ = ["LoaderPosition"]

_log = logging.getLogger(__name__)

_FIELDS: Final = {"lineage": str, "share": list, "epoch": int, "batches": int, "loaders": list}


class LoaderPosition(Callback):
    """Saves and restores the position of one learner's training loaders.

    Args:
        sync: of this learner; this callback stands behind it.
        every_steps: inner steps between two saves.
    """

    def __init__(self, sync: OuterSync, every_steps: int) -> None:
        self._sync, self._every_steps = sync, every_steps
        self._thread: ThreadPoolExecutor | None = None
        self._path: Path | None = None
        self._steps = 0
        self._before: bytes | None = None
        self._is_busy = self._is_off = self._is_known_good = False

    @classmethod
    def attach(cls, trainer: pl.Trainer, sync: OuterSync, *, every_steps: int) -> LoaderPosition:
        """Put a fresh one behind the Trainer's `OuterSync`, whose join comes first."""
        callback = cls(sync, every_steps)
        callback.detach(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(1 + callbacks.index(sync), callback)
        return callback

    @staticmethod
    def detach(trainer: pl.Trainer | None) -> None:
        """Leave the Trainer's callbacks."""
        if trainer is not None:
            trainer.callbacks[:] = [c for c in trainer.callbacks if not isinstance(c, LoaderPosition)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """This learner has joined: go on where its last life was."""
        assignment, info = trainer.strategy.assignment, self._sync.info  # type: ignore[attr-defined]
        folder = None if assignment is None else assignment.rejoin_path()
        if info is None or folder is None or not _loaders(trainer):
            return
        self._path = folder / f"learner_{info.learner_id}.loaders.pt"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="diloco-position", initializer=never_interrupt_others)
        if info.role == "joiner" and self._path.exists():
            self._restore(trainer, info.learner_id)

    def _restore(self, trainer: pl.Trainer, learner_id: int) -> None:
        saved, loop = self._read(), trainer.fit_loop
        is_endless, loaders = math.isinf(trainer.num_training_batches), _loaders(trainer)
        if saved is None or (saved["lineage"], saved["share"]) != self._of(trainer):
            return
        if len(saved["loaders"]) != len(loaders) or not (is_endless or saved["epoch"] == trainer.current_epoch):
            return
        try:
            for loader, state in zip(loaders, saved["loaders"], strict=True):
                loader.load_state_dict(state)
        except Exception as error:  # the user's loader; it may have changed since
            _log.warning("A training loader does not take its position back (%s: %s).", type(error).__name__, error)
            return
        if is_endless:
            move_epochs(trainer, saved["epoch"] - trainer.current_epoch)
        elif self._sync.clock is not None:
            self._sync.clock.begin_at(saved["batches"])
        if not will_iterate_again(trainer) and loop._data_fetcher is not None:
            iter(loop._data_fetcher)
        _log.info("learner %d goes on in its training data behind %d batches of epoch %d", learner_id, saved["batches"], saved["epoch"])

    def _of(self, trainer: pl.Trainer) -> tuple[str, list[int]]:
        """Job and share of the data, of this learner."""
        share: Any = trainer.distributed_sampler_kwargs
        return self._sync.info.lineage if self._sync.info is not None else "", [share["rank"], share["num_replicas"]]

    def _read(self) -> dict[str, Any] | None:
        assert self._path is not None
        try:
            saved: dict[str, Any] = torch.load(self._path, weights_only=True)
            if {name: type(saved[name]) for name in _FIELDS} != _FIELDS:
                raise ValueError("it is none of this version")
        except Exception as error:  # what a damaged file raises is not documented
            _log.warning("%s is not used (%s: %s). The training data begin anew.", self._path, type(error).__name__, error)
            return None
        return saved

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save what is due: the state of now, or of one batch ago if one is fetched ahead."""
        if self._thread is None or self._is_off:
            return
        before, self._before = self._before, None
        has_stepped = not trainer.fit_loop._should_accumulate()
        self._steps += has_stepped
        is_ahead = bool(getattr(trainer.fit_loop._data_fetcher, "batches", ()))
        if has_stepped and self._steps >= self._every_steps and not self._is_busy:
            # At an epoch's end there is no position in it.
            data = before if is_ahead else self._pack(trainer, batch_idx + 1) if batch_idx + 1 < trainer.num_training_batches else None
            if data is not None:
                self._steps, self._is_busy = 0, True
                self._thread.submit(self._write, data)
                return
        if is_ahead and self._steps + 1 >= self._every_steps and not self._is_busy:
            self._before = self._pack(trainer, batch_idx + 2)

    def _pack(self, trainer: pl.Trainer, batches: int) -> bytes | None:
        """The position behind so many batches of this epoch, which is that of the loaders now."""
        lineage, share = self._of(trainer)
        buffer = io.BytesIO()
        try:
            states = [loader.state_dict() for loader in _loaders(trainer)]
            fields = (lineage, share, trainer.current_epoch, batches, states)
            torch.save(dict(zip(_FIELDS, fields, strict=True)), buffer)
        except Exception as error:  # the user's loader, or what it keeps; training goes on
            self._give_up(error)
            return None
        return buffer.getvalue()

    def _write(self, data: bytes) -> None:
        assert self._path is not None
        try:
            if not self._is_known_good:
                torch.load(io.BytesIO(data), weights_only=True)
                self._is_known_good = True
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(".tmp")
            temporary.write_bytes(data)
            temporary.replace(self._path)
        except Exception as error:  # whatever it is, it must not end the training
            self._give_up(error)
        finally:
            self._is_busy = False

    def _give_up(self, error: Exception) -> None:
        self._is_off = True
        reason = str(error).partition("\n")[0]
        _log.warning("The position in the training data is not saved (%s). If this learner is killed, its data begin anew.", reason)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """This learner has left."""
        self._close()
        if self._path is not None and self._sync.is_done:
            unlink_quietly(self._path)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """It may come back."""
        self._close()

    def _close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None


def _loaders(trainer: pl.Trainer) -> list[Any]:
    """The training loaders; none if one of them cannot be resumed."""
    combined = trainer.fit_loop._combined_loader
    loaders: list[Any] = [] if combined is None else list(combined.flattened)
    return loaders if all(isinstance(loader, _Stateful) for loader in loaders) else []
