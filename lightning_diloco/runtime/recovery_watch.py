"""What a syncer that starts again needs beside its rules: to see that payloads move, and to say what it waits for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from lightning_diloco.protocol.events import HeldMoves, SyncerEvent
from lightning_diloco.protocol.recalling import GIVE_UP_S, Recalling
from lightning_diloco.protocol.syncer import SyncerMachine
from lightning_diloco.runtime.complaints import COMPLAIN_S
from lightning_diloco.runtime.transport import SyncerTransport

__all__ = ["RecoveryWatch"]

_log = logging.getLogger(__name__)

LOOK_S = 1.0
"""A large version comes in many chunks; the rules are told of them so often."""
MAX_NAMED = 20
"""Fragments in one log line."""


class RecoveryWatch:
    """Looks after a recovery; lives on the loop thread.

    Args:
        machine: whose recovery it is.
        transport: over which versions come.
        handle: gives the machine an event.
    """

    def __init__(self, machine: SyncerMachine, transport: SyncerTransport, handle: Callable[[SyncerEvent], None]) -> None:
        self._machine, self._transport, self._handle = machine, transport, handle
        self._look_at_s = -math.inf
        self._seen: dict[str, tuple[int, int]] = {}
        self._missing_at_s = -math.inf
        self._awaited_at_s: float | None = None

    def tick(self, now_s: float) -> None:
        """Look at what is on its way; in a syncer that serves this does nothing.

        Args:
            now_s: this moment, in seconds.
        """
        recovery = self._machine.recovery
        if recovery is None:
            return
        recalls = recovery.recalls
        while recalls.unmet:
            unmet = recalls.unmet.pop(0)
            _log.warning(
                "Version %d of fragment %d did not come from learner %d: %s. Another learner's, or an older one, is taken.",
                *(unmet.version.n, unmet.fragment_id, unmet.learner_id, unmet.why),
            )
        if recovery.is_running and now_s >= self._look_at_s:
            self._look_at_s = now_s + LOOK_S
            self._look(recalls)
            self._complain_of_missing(recalls, now_s)
            self._complain_of_awaited(recalls, now_s)

    def _look(self, recalls: Recalling) -> None:
        for session in recalls.sessions:
            progress = self._transport.incoming_progress(bytes.fromhex(session))
            if progress is not None and progress != self._seen.get(session):
                self._seen[session] = progress
                self._handle(HeldMoves(session=session))

    def _complain_of_missing(self, recalls: Recalling, now_s: float) -> None:
        """A job that goes on may need a learner that has not come back: say which fragments nobody has."""
        missing = recalls.missing
        if missing and now_s >= self._missing_at_s:
            self._missing_at_s = now_s + COMPLAIN_S
            _log.warning("Fragments %s are in no snapshot: waiting for a learner that holds them.", list(missing)[:MAX_NAMED])

    def _complain_of_awaited(self, recalls: Recalling, now_s: float) -> None:
        """Nothing is merged while versions come: say which, and from whom."""
        awaited = recalls.awaited
        if not awaited:
            self._awaited_at_s = None
        elif self._awaited_at_s is None:
            self._awaited_at_s = now_s + COMPLAIN_S
        elif now_s >= self._awaited_at_s:
            self._awaited_at_s = now_s + COMPLAIN_S
            learners = sorted({learner_id for ids in awaited.values() for learner_id in ids})
            _log.warning(
                "Nothing is merged yet: fragments %s have to come from learners %s, whose versions are newer than the snapshot's. They are "
                "asked again; after %g s without a byte an older version is taken. Should nothing come, see that these learners reach the "
                "port for payloads.",
                *(list(awaited)[:MAX_NAMED], learners[:MAX_NAMED], GIVE_UP_S),
            )
