"""The inline launcher: this process is the only learner, and holds the syncer on a thread.

For debuggers, notebooks, profilers and tests: breakpoints work, nothing is pickled, the user's objects are the ones that train. Learner
and syncer speak the same protocol as ever, over ``inproc://`` of one shared context.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import zmq
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.connectors.signal_connector import _SIGNUM
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_diloco.errors import SyncerUnavailableError
from lightning_diloco.runtime.final_model import GLOBAL_NAME
from lightning_diloco.runtime.rundir import make_run_dir
from lightning_diloco.runtime.service import ServiceOptions, SyncerService
from lightning_diloco.strategy.assignment import Assignment
from lightning_diloco.strategy.exchange import Exchange
from lightning_diloco.strategy.finish import (
    JobRecorder,
    do_without_global_model,
    load_final_weights,
    validate_global,
    write_last_checkpoint,
)
from lightning_diloco.strategy.fit_call import FitCall
from lightning_diloco.strategy.own_weights import take_own_weights
from lightning_diloco.strategy.sigterm import SigtermPolicy

if TYPE_CHECKING:
    from lightning_diloco.strategy.strategy import DecoupledDiLoCoStrategy

__all__ = ["InlineLauncher"]

_SYNCER_END_S = 300.0
"""The last snapshot is written in this time as well."""
_NO_RESTARTS = {"learners": 0, "syncer": 0}


class InlineLauncher(_Launcher):
    """Runs a fit here, with a syncer beside it.

    Args:
        strategy: the strategy of the Trainer.
    """

    def __init__(self, strategy: DecoupledDiLoCoStrategy) -> None:
        self._strategy = strategy

    @property
    def is_interactive_compatible(self) -> bool:
        """Nothing is started."""
        return True

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Run a Trainer's entry point; around a fit the syncer is started and ended."""
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return function(*args, **kwargs)
        called_s = time.monotonic()
        strategy = self._strategy
        strategy.summary = None
        fit = FitCall.of(function, args, kwargs)
        run_dir = make_run_dir(strategy.process_options.run_dir)
        exchange = Exchange.make(run_dir)
        recorder = JobRecorder(run_dir, called_s)
        context: zmq.Context[Any] = zmq.Context()
        token = secrets.token_hex(32)
        service = SyncerService(_options(run_dir, exchange.spare_dir, token), context, on_line=recorder.on_line)
        status: Literal["finished", "stopped", "failed"] = "failed"
        val: dict[str, float | None] | None = None
        policy = SigtermPolicy(lambda: strategy._outer_sync, is_guest=True)
        try:
            endpoint = service.start()
            strategy.take(
                Assignment(role="inline", endpoint=endpoint, token=token, run_dir=run_dir, launch_dir=exchange.launch_dir, context=context)
            )
            policy.install()
            function(*args, **kwargs)
            _end(service, "finished")
            is_own = take_own_weights(strategy.final_state)
            model_dir = exchange.found(GLOBAL_NAME, run_dir)
            if not is_own and not load_final_weights(fit.model, model_dir, None):
                do_without_global_model(fit.model, run_dir, {"state_dict": {}}, has_begun=recorder.has_begun)
            write_last_checkpoint(trainer, run_dir, strategy.final_state, model_dir)
            sync = strategy._outer_sync
            known = None if sync is None or is_own else sync.validated
            val = validate_global(trainer, fit.with_loaders_of(trainer), run_dir) if known is None else known
            status = "finished"
        except (KeyboardInterrupt, SIGTERMException):
            status = "stopped"
            raise
        finally:
            if status != "finished":
                # Lightning's own handling of the exception, which leaves or closes, comes after this: the syncer must not wait for it.
                self._leave_early(trainer, status)
                _end(service, status, is_strict=False)
                # Otherwise Lightning would put the policy's handler back after it was removed.
                trainer._signal_connector.teardown()
            policy.remove()
            strategy.take(None)
            strategy.final_state = None
            exchange.remove()
            context.destroy(linger=0)
            strategy.summary = recorder.finish(status, _NO_RESTARTS, val)
        return None

    def kill(self, signum: _SIGNUM) -> None:
        """There is nobody below."""

    def _leave_early(self, trainer: pl.Trainer, status: str) -> None:
        sync = self._strategy._outer_sync
        if sync is not None:
            error: BaseException = KeyboardInterrupt() if status == "stopped" else RuntimeError()
            sync.on_exception(trainer, trainer.lightning_module, error)
            sync.close()


def _options(run_dir: Path, spare_dir: Path | None, token: str) -> ServiceOptions:
    bind = f"inproc://{secrets.token_hex(8)}"
    return ServiceOptions(bind=bind, run_dir=run_dir, spare_dir=spare_dir, token=token, num_slots=1, supervised=True)


def _end(service: SyncerService, status: Literal["finished", "stopped", "failed"], *, is_strict: bool = True) -> None:
    service.finish(status)
    has_ended = service.join(_SYNCER_END_S)
    if not is_strict:
        return
    if service.error is not None:
        raise SyncerUnavailableError(f"The syncer's thread failed: {service.error!r}.") from service.error
    if not has_ended:
        raise SyncerUnavailableError(f"The syncer's thread did not end within {_SYNCER_END_S:g} s.")
