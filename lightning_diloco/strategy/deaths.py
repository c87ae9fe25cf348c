"""Why a learner's process ended, and whether another life may fare better.

An exception would be raised again by the next life, with one exception: a process that memory has run out for may well live the next time,
as one may that the kernel has killed for it. torch, Python, and a loader whose worker was killed say so in different ways.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_diloco.strategy.memory_probe import is_out_of_memory
from lightning_diloco.strategy.sigterm import EXIT_SIGTERM

if TYPE_CHECKING:
    from lightning_diloco.runtime.children import ExitStatus
    from lightning_diloco.strategy.results import LearnerResult

__all__ = ["Death", "death_of", "is_death_by_memory"]

_MAX_CHAIN = 16
_LONGEST_LINE = 200


@dataclass(frozen=True, slots=True)
class Death:
    """An end after which a learner is started again."""

    by: str
    """What has ended it, after "was ended by"."""
    remedy: str
    """What to do if it happens too often."""


def is_death_by_memory(error: BaseException) -> bool:
    """Whether an exception that ends a process says that memory has run out, by itself or by its cause.

    Only the stated cause counts (``raise ... from``): what was raised while such an error was handled may be a fault of the handler's.
    """
    link: BaseException | None = error
    for _ in range(_MAX_CHAIN):
        if link is None:
            return False
        if _says_memory(link):
            return True
        link = link.__cause__
    return False


def _says_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    # The kernel kills the largest process of a group; with a loader it may be a worker, and torch raises in the process that waits for it.
    # What it says depends on who is quicker: its handler of SIGCHLD, which knows the signal, or a wait that finds the worker gone.
    is_gone = "exited unexpectedly" in text and "killed by signal" not in str(error.__cause__)
    is_worker_killed = "dataloader worker" in text and ("killed by signal: killed" in text or is_gone)
    return is_worker_killed or "cannot allocate memory" in text


def death_of(result: LearnerResult | None, status: ExitStatus, hang_timeout_s: float | None) -> Death | None:
    """The death that a process has died; None if its end was another one, which the next life would meet again.

    Args:
        result: what it has left, if anything.
        status: of its process.
        hang_timeout_s: the supervisor has killed it because it gave no sign of life for so long; None: it has not.
    """
    if result is not None and result.outcome == "memory":
        said = (result.traceback_text.strip().splitlines() or ["no text"])[-1][:_LONGEST_LINE]
        return Death(
            f"memory that ran out ({said})",
            "Make the batch smaller (batch_sizing='auto' splits one that does not fit), or run fewer learners on the machine.",
        )
    if result is not None and result.outcome == "failed":
        return None
    if status.signal_name == "SIGKILL" and hang_timeout_s is not None:
        return Death(
            f"its supervisor, without a sign of life for {hang_timeout_s:g} s (hang_timeout_s={hang_timeout_s:g})",
            "It neither computed nor ended a batch: see what it waits for. If it is right to wait, raise hang_timeout_s, or pass None.",
        )
    if result is None and status.signal_name is None and status.code != EXIT_SIGTERM:
        return None
    return Death(status.signal_name or "SIGTERM", "SIGKILL without anyone's doing often means that memory ran out.")
