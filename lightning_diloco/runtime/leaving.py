"""The end of a learner's training: handing over what is left, to its syncer or to all shards of one at the same time.

The one place, beside the join, where the training thread may wait: at most `drain_timeout_s`, however many shards there are. After SIGTERM
that time counts from the signal: whoever has sent it gives a process so long and no longer, and the present batch has had its part of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lightning_diloco.runtime.life_signs import give_sign

if TYPE_CHECKING:
    from lightning_diloco.runtime.client import LearnerClient

__all__ = ["drain_after", "leave_all"]

_log = logging.getLogger(__name__)

_LAST_WORD_S = 1.0
"""What could not be handed over is not waited for; the good-bye is, for so long."""
_ENDING_S = 0.5
"""After the good-bye a process that was sent away has files and threads to close."""
_SHORTEST_DRAIN_S = 1.0
"""However late the batch has ended: on a link that works contributions are acknowledged in less."""


def drain_after(told_s: float | None, drain_s: float, now_s: float) -> float:
    """How long may be waited for acknowledgements, so that a process that was sent away is gone `drain_s` after it was told.

    Args:
        told_s: when it was, on the monotonic clock; None: it ends by itself.
        drain_s: `drain_timeout_s`.
        now_s: of the same clock.
    """
    if told_s is None:
        return drain_s
    return min(drain_s, max(_SHORTEST_DRAIN_S, told_s + drain_s - _LAST_WORD_S - _ENDING_S - now_s))


def leave_all(
    clients: Sequence[LearnerClient], reason: Literal["limit", "signal", "stopped"], drain_s: float, told_s: float | None = None
) -> None:
    """Push the last contributions and say good-bye.

    Args:
        clients: joined, one for each shard.
        reason: of the end.
        drain_s: how long is waited for acknowledgements.
        told_s: when this process was told to end, on the monotonic clock; the time since then is taken from `drain_s`.
    """
    leaving = [client for client in clients if client.begin_leave(reason)]
    now_s = time.monotonic()
    end_s = now_s + drain_after(told_s, drain_s, now_s)
    while (waiting := [c for c in leaving if not c.wait_left(0.0)]) and (left_s := end_s - time.monotonic()) > 0:
        give_sign()
        waiting[0].wait_left(min(0.05, left_s))
        for client in waiting:
            client.leave_again()
    if not waiting:
        return
    since = "" if told_s is None else " after SIGTERM"
    _log.warning("The last contributions were not acknowledged within drain_timeout_s=%g%s; they are discarded.", drain_s, since)
    for client in waiting:
        client.leave_now(reason)
    end_s = time.monotonic() + _LAST_WORD_S
    for client in waiting:
        client.wait_left(max(0.0, end_s - time.monotonic()))
