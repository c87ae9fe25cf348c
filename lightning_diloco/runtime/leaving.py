"""The end of a learner's training: handing over what is left, to its syncer or to all shards of one at the same time.

The one place, beside the join, where the training thread may wait: at most `drain_timeout_s`, however many shards there are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lightning_diloco.runtime.life_signs import give_sign

if TYPE_CHECKING:
    from lightning_diloco.runtime.client import LearnerClient

__all__ = ["leave_all"]

_log = logging.getLogger(__name__)

_LAST_WORD_S = 1.0
"""What could not be handed over is not waited for; the good-bye is, for so long."""


def leave_all(clients: Sequence[LearnerClient], reason: Literal["limit", "signal", "stopped"], drain_s: float) -> None:
    """Push the last contributions and say good-bye.

    Args:
        clients: joined, one for each shard.
        reason: of the end.
        drain_s: how long is waited for acknowledgements.
    """
    leaving = [client for client in clients if client.begin_leave(reason)]
    end_s = time.monotonic() + drain_s
    while (waiting := [c for c in leaving if not c.wait_left(0.0)]) and (left_s := end_s - time.monotonic()) > 0:
        give_sign()
        waiting[0].wait_left(min(0.05, left_s))
        for client in waiting:
            client.leave_again()
    if not waiting:
        return
    _log.warning("The last contributions were not acknowledged within drain_timeout_s=%g; they are discarded.", drain_s)
    for client in waiting:
        client.leave_now(reason)
    end_s = time.monotonic() + _LAST_WORD_S
    for client in waiting:
        client.wait_left(max(0.0, end_s - time.monotonic()))
