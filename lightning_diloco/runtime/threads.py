"""How the learner's background thread shares a core with the training thread.

Both are woken and put to sleep all the time; where a core is all they have, a wake-up takes the core from whoever runs, and that is the
training thread, in the middle of a boundary. Linux has a policy for threads that may wait a little: `SCHED_BATCH` gets the same share of
the core, but its wake-ups do not interrupt others.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

__all__ = ["never_interrupt_others"]


def never_interrupt_others() -> None:
    """Let the calling thread's wake-ups wait for the end of others' slices; where a system knows no such thing, nothing changes."""
    if hasattr(os, "SCHED_BATCH"):
        # A container may forbid it. Without it everything works, and a boundary takes longer where threads share a core.
        with suppress(OSError):
            # A policy that the user has chosen for the process stays.
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(threading.get_native_id(), os.SCHED_BATCH, os.sched_param(0))
