"""SIGTERM in a process that trains: leave in order if it is a member, end at once if it is not.

Lightning's own handler notes the signal and ends the loop after the present batch; it is registered late, and it neither looks while a
validation runs nor while a learner waits to join. Lightning calls an earlier handler after its own: this one, which deals with those cases.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_diloco.strategy.outer_sync import OuterSync

__all__ = ["EXIT_SIGTERM", "SigtermPolicy", "is_sigterm_exit", "tell_user"]

_log = logging.getLogger(__name__)

EXIT_SIGTERM = 128 + signal.SIGTERM
"""Exit code of a process that has left after SIGTERM."""


class SigtermPolicy:
    """The handler of one process; does not import Lightning, so it can be in place before that.

    Args:
        find_sync: gives the callback of the running fit, or None.
        is_guest: the process is the user's, whose own handler, if there is one, is called first.
    """

    def __init__(self, find_sync: Callable[[], OuterSync | None], *, is_guest: bool = False) -> None:
        self._find_sync = find_sync
        self._is_guest = is_guest
        self.was_told = False
        """Whether a SIGTERM has come that the loops are to obey."""
        self._lets_leave = False
        self._previous: Any = None
        self._is_installed = False

    def install(self) -> None:
        """Handle SIGTERM from now on; in another thread than the main one there is nothing to install."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_sigterm)
            self._is_installed = True

    def let_leave(self) -> None:
        """The process is on its way out: one more SIGTERM must not cut off what it still hands over."""
        self._lets_leave = True

    def remove(self) -> None:
        """Put the handler back that was there before."""
        if self._is_installed and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
            self._is_installed = False

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        if self._is_guest:
            tell_user(self._previous, signum, frame)
        sync = self._find_sync()
        if sync is not None and sync.told_s is None:
            sync.told_s = time.monotonic()
        if self._lets_leave or (sync is not None and sync.has_left):
            # On its way out already.
            return
        if sync is not None and sync.is_joined and not sync.is_validating and not self.was_told:
            self.was_told = True
            return
        if "lightning.pytorch" in sys.modules:
            from lightning.pytorch.utilities.exceptions import SIGTERMException

            raise SIGTERMException(EXIT_SIGTERM)
        raise SystemExit(EXIT_SIGTERM)


def tell_user(handler: Any, signum: int, frame: FrameType | None) -> None:
    """Call the user's own handler, if it is a function. What it raises would tear the orderly end apart, which comes in any case."""
    if not callable(handler):
        return
    try:
        handler(signum, frame)
    except BaseException as error:
        _log.info("the handler of signal %d raised %s: the fit ends in order", signum, type(error).__name__)


def is_sigterm_exit(error: BaseException) -> bool:
    """Whether an exception is the end after SIGTERM."""
    if "lightning.pytorch" in sys.modules:
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        if isinstance(error, SIGTERMException):
            return True
    return type(error) is SystemExit and error.code == EXIT_SIGTERM
