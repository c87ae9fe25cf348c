"""Joining under an id that a dead process still holds.

Without a supervisor nobody tells the syncer that a process is dead: its id is free after ten heartbeats of silence, 10 s at least. torchrun
starts a killed learner again within a second, and after a refusal again, until it has no restarts left. So a learner that was started by
somebody else asks again for as long as that silence takes, and then takes no for an answer: the process that has the id lives.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from lightning_diloco.errors import LearnerIdInUseError
from lightning_diloco.protocol.members import SILENT_HEARTBEATS, SILENT_S
from lightning_diloco.runtime.client import JoinInfo
from lightning_diloco.runtime.sharded_client import AnyClient

__all__ = ["join_when_free", "patience_s"]

_log = logging.getLogger(__name__)

AGAIN_S = 1.0
"""Between two attempts."""
_MARGIN_S = 5.0
"""What the predecessor may have said last can be on its way for a while."""


def patience_s(heartbeat_s: float) -> float:
    """How long an id may look taken although its process is dead.

    Args:
        heartbeat_s: of the job.
    """
    return max(SILENT_S, SILENT_HEARTBEATS * heartbeat_s) + _MARGIN_S


def join_when_free(join: Callable[[], tuple[AnyClient, JoinInfo]], wait_s: float) -> tuple[AnyClient, JoinInfo]:
    """Join; while the id is in use, wait for it.

    Args:
        join: makes a client and joins.
        wait_s: how long an id that is in use is waited for; 0: not at all.

    Returns:
        The client that has joined, and what it was told.

    Raises:
        LearnerIdInUseError: after this time a live process still had the id.
        DiLoCoError: the join failed in another way.
    """
    until_s: float | None = None
    while True:
        try:
            return join()
        except LearnerIdInUseError as error:
            now_s = time.monotonic()
            if until_s is None:
                until_s = now_s + wait_s
                _log.warning("%s Should that process be dead, its id is free soon: asking for %g s.", error, wait_s)
            if now_s >= until_s:
                raise
        time.sleep(AGAIN_S)
