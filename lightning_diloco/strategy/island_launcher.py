"""A fit of a learner that somebody else started: it runs here, and SIGTERM ends it in order.

torchrun, SLURM and Kubernetes send SIGTERM and, a grace period later, SIGKILL. Some send it twice (SLURM to every process of a step, and
torchrun, being one of them, again to its own), so on the way out it is not looked at any more. The exit code is 143: a scheduler that
sees 0 takes the learner for done and does not start it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.connectors.signal_connector import _SIGNUM
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_diloco.strategy.sigterm import EXIT_SIGTERM, SigtermPolicy

if TYPE_CHECKING:
    from lightning_diloco.strategy.strategy import DecoupledDiLoCoStrategy

__all__ = ["IslandLauncher"]

_log = logging.getLogger(__name__)


class IslandLauncher(_Launcher):
    """Runs every entry point of the Trainer in this process.

    Args:
        strategy: the strategy of the Trainer.
    """

    def __init__(self, strategy: DecoupledDiLoCoStrategy) -> None:
        self._strategy = strategy

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        """Nothing is started."""
        return True

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Run it; around a fit SIGTERM is dealt with, also while the learner waits to join."""
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return function(*args, **kwargs)
        policy = SigtermPolicy(lambda: self._strategy._outer_sync, is_guest=True)
        policy.install()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not policy.was_told:
                raise
            # Who signals every process of a job signals the workers of its loaders too, and those die at once.
            _log.info("after SIGTERM %s was raised: the fit ends in order", type(error).__name__)
            self._leave(trainer, policy)
            raise SIGTERMException(EXIT_SIGTERM) from error
        except SIGTERMException as error:
            self._leave(trainer, policy)
            error.code = EXIT_SIGTERM
            raise
        finally:
            # Otherwise Lightning would put the policy's handler back after it was removed.
            trainer._signal_connector.teardown()
            policy.remove()

    def _leave(self, trainer: pl.Trainer, policy: SigtermPolicy) -> None:
        """Lightning would come to it only when the handler is the user's again, and one more SIGTERM the end."""
        policy.let_leave()
        if self._strategy._outer_sync is not None:
            self._strategy._outer_sync.on_exception(trainer, trainer.lightning_module, SIGTERMException())

    def kill(self, signum: _SIGNUM) -> None:
        """There is nobody below."""
