"""The launcher: Lightning hands it a call of ``fit``, it runs the call in learner processes and takes the result over.

In the calling process (the supervisor) nothing is trained. ``validate``, ``test`` and ``predict`` are not launched: they run here, on one
device, with the weights of the last fit. In a learner the launcher only calls the function.

What has to happen once for all learners happens here before they start: loggers settle their version, so that all processes mean one
folder, and ``prepare_data`` runs.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.connectors.signal_connector import _SIGNUM
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_diloco.runtime.final_model import GLOBAL_NAME
from lightning_diloco.runtime.rejoin import FOLDER as REJOIN_FOLDER
from lightning_diloco.runtime.rundir import make_run_dir
from lightning_diloco.strategy.advice import advise, advise_before, warn
from lightning_diloco.strategy.assignment import CHECKPOINT_DUMP
from lightning_diloco.strategy.checks import check_callbacks, check_trainable
from lightning_diloco.strategy.csv_logs import keep_csv_logs
from lightning_diloco.strategy.exchange import Exchange
from lightning_diloco.strategy.finish import (
    JobRecorder,
    do_without_global_model,
    load_final_weights,
    validate_global,
    write_last_checkpoint,
)
from lightning_diloco.strategy.fit_call import FitCall
from lightning_diloco.strategy.payload import InterpreterState, Payload, save_payload
from lightning_diloco.strategy.results import merge
from lightning_diloco.strategy.supervisor import JobPlan, Supervisor

if TYPE_CHECKING:
    from lightning_diloco.strategy.strategy import DecoupledDiLoCoStrategy

__all__ = ["SupervisorLauncher", "read_dump"]

_log = logging.getLogger(__name__)


class SupervisorLauncher(_Launcher):
    """Runs fits in learner processes.

    Args:
        strategy: the strategy of the Trainer.
    """

    def __init__(self, strategy: DecoupledDiLoCoStrategy) -> None:
        self._strategy = strategy
        self._supervisor: Supervisor | None = None

    @property
    def is_interactive_compatible(self) -> bool:
        """Learners are new interpreters, so notebooks are fine."""
        return True

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Run a Trainer's entry point: a fit in learners, anything else here."""
        if self._strategy.role != "supervisor" or trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return function(*args, **kwargs)
        called_s = time.monotonic()
        strategy = self._strategy
        strategy.is_saving_blocked = True
        strategy.summary = None
        fit = FitCall.of(function, args, kwargs)
        num_learners = len(strategy.parallel_devices or [])
        if num_learners == 1:
            rank_zero_info("decoupled_diloco: one learner (on CPU devices='auto' means 1). Pass Trainer(devices=N) for N learners.")
        check_callbacks(trainer)
        check_trainable(fit.model)
        warn(advise_before(strategy.sync, trainer.max_steps))
        run_dir = make_run_dir(strategy.process_options.run_dir)
        self._prepare(trainer, fit)
        recorder = JobRecorder(run_dir, called_s)
        exchange = Exchange.make(run_dir)
        status: Literal["finished", "stopped", "failed"] = "failed"
        val: dict[str, float | None] | None = None
        supervisor: Supervisor | None = None
        try:
            payload = Payload(trainer=trainer, function=function, args=args, kwargs=kwargs, state=InterpreterState.capture())
            save_payload(payload, exchange.launch_dir / "payload.pkl")
            supervisor = self._supervisor = Supervisor(self._plan(num_learners, run_dir, exchange, recorder))
            try:
                result = supervisor.run()
            finally:
                status = supervisor.status
            dump = read_dump(exchange)
            merge(trainer, result)
            model_dir = exchange.found(GLOBAL_NAME, run_dir)
            if not load_final_weights(fit.model, model_dir, dump):
                do_without_global_model(fit.model, run_dir, dump, has_begun=recorder.has_begun)
            strategy.is_saving_blocked = False
            fit.attach(trainer)
            keep_csv_logs(trainer.loggers)
            write_last_checkpoint(trainer, run_dir, dump, model_dir)
            val = validate_global(trainer, fit, run_dir)
        except BaseException:
            status = "failed" if status == "finished" else status
            raise
        finally:
            self._supervisor = None
            exchange.remove()
            # Of no use to another job: that one begins from a checkpoint.
            shutil.rmtree(run_dir / REJOIN_FOLDER, ignore_errors=True)
            restarts = {"learners": 0, "syncer": 0} if supervisor is None else supervisor.restarts
            strategy.summary = recorder.finish(status, restarts, val)
        warn(advise(strategy.summary))
        return None

    def kill(self, signum: _SIGNUM) -> None:
        """Pass a signal on to the learners; in a learner there is nobody below."""
        if self._supervisor is not None:
            self._supervisor.forward(int(signum))

    def _plan(self, num_learners: int, run_dir: Path, exchange: Exchange, recorder: JobRecorder) -> JobPlan:
        return JobPlan(
            num_learners=num_learners,
            run_dir=run_dir,
            launch_dir=exchange.launch_dir,
            spare_dir=exchange.spare_dir,
            payload_path=exchange.launch_dir / "payload.pkl",
            max_restarts=self._strategy.process_options.max_restarts,
            hang_timeout_s=self._strategy.process_options.hang_timeout_s,
            on_tick=lambda restarts: recorder.tick(time.monotonic(), restarts),
        )

    def _prepare(self, trainer: pl.Trainer, fit: FitCall) -> None:
        for logger in trainer.loggers:
            # "The next free version" is found when first asked for; learners would each find their own. Some loggers have none.
            with contextlib.suppress(NotImplementedError, AttributeError):
                _ = logger.version
        fit.attach(trainer)
        trainer._data_connector.prepare_data()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_supervisor": None}


def read_dump(exchange: Exchange) -> dict[str, Any] | None:
    """Read the training state that learner 0 left at its end; None if it left none."""
    path = exchange.found(CHECKPOINT_DUMP, exchange.launch_dir) / CHECKPOINT_DUMP
    if not path.exists():
        return None
    # Written by our own learner from the user's own objects, which need not be plain tensors.
    dump = torch.load(path, map_location="cpu", weights_only=False)
    assert isinstance(dump, dict)
    return dump
