"""What a learner makes of its two links: a way for payloads that is shut, and a key that is admitted no more. On the background thread.

**The way for payloads.** A syncer has two ports. A firewall that lets the first one through and not the second leaves a learner whose
syncer answers, with whom no weight is exchanged. So what is counted here is the time for which the syncer has been answering on control
while there is no connection on bulk. A join says so once after `SAY_S`; later, when training goes on anyway, after `SAY_LATER_S`. A join
gives up when that time is as long as its patience with a silent syncer, but only if there never was a connection on bulk: what was there
once is a link that broke, which is tried again for ever. Speed is never judged: a connection over which bytes pass slowly is one.

**A key that is admitted no more.** Who is shut out while the link is up is told so (`KeyRevoked`). Who was away at that moment, or whose
syncer was, finds its key refused at the door. That is taken for a revocation when, for `REFUSED_S` and for at least `REFUSED_HEARTBEATS`
heartbeats, no word of the syncer has come and every attempt was refused (`transport.links`: a row). The learner then ends as one that is
told. Shorter is no ground: a key file is written anew, an administrator mends the folder. A syncer that cannot read its folder refuses
nobody meanwhile (`transport.gate`); a learner that has not joined yet waits as for any syncer. The price: whoever sits on the way, and
answers in the syncer's place for that long, can end a learner, as he can cut it off.
"""

from __future__ import annotations

import logging
import math

from lightning_diloco.protocol.messages import JoinRefused
from lightning_diloco.runtime.client_options import ClientOptions
from lightning_diloco.runtime.reporting import SILENT_HEARTBEATS, SILENT_S
from lightning_diloco.runtime.transport import LearnerTransport
from lightning_diloco.runtime.unanswered import explain_bulk, explain_refusal

__all__ = ["LinkCare"]

_log = logging.getLogger(__name__)

SAY_S = 8.0
"""A join without a connection for payloads says so after so long: lost SYNs and a slow handshake are over by then."""
SAY_LATER_S = 30.0
"""After the join."""
REFUSED_S = 30.0
"""So long a key must be refused before its learner ends."""
REFUSED_HEARTBEATS = 10
"""At least so many of the job's heartbeats, should they be long."""


class LinkCare:
    """Looks after the links of one learner.

    Args:
        transport: whose links they are.
        options: of this process.
    """

    def __init__(self, transport: LearnerTransport, options: ClientOptions) -> None:
        self._transport, self._options = transport, options
        heartbeat_s = options.config.heartbeat_s
        self._silent_s = max(SILENT_S, SILENT_HEARTBEATS * heartbeat_s)
        self._refused_s = max(REFUSED_S, REFUSED_HEARTBEATS * heartbeat_s)
        self._answers_since_s = -math.inf
        self._is_said = False
        self.blocked_s = 0.0
        """For how long the syncer has been answering while no connection for payloads has ever come about; may be read from any thread."""

    def tick(self, now_s: float, heard_s: float, *, is_joined: bool) -> JoinRefused | None:
        """Look at both links.

        Args:
            now_s: this moment, in seconds.
            heard_s: when the last word of the syncer came.
            is_joined: whether the join is over.

        Returns:
            The word with which this learner ends: its key is admitted no more.
        """
        if now_s - heard_s >= self._silent_s:
            self._answers_since_s = now_s
        self._look_at_bulk(now_s, is_joined=is_joined)
        keys, refused_s = self._options.keys, self._transport.control_link.refused_s
        if not is_joined or keys is None or min(refused_s, now_s - heard_s) < self._refused_s:
            return None
        return JoinRefused(reason="key_revoked", detail=explain_refusal(self._options.endpoint, refused_s, keys))

    @property
    def why_blocked(self) -> str:
        """What is the matter with the way for payloads, and the remedy."""
        link = self._transport.bulk_link
        return explain_bulk(self._options.endpoint, link.endpoint or "", link.failed)

    def _look_at_bulk(self, now_s: float, *, is_joined: bool) -> None:
        link = self._transport.bulk_link
        if not link.is_up:
            link.look(now_s)  # the transport's own look may be half a second old
        shut_s = max(0.0, now_s - max(link.down_since_s, self._answers_since_s))
        self.blocked_s = 0.0 if link.was_up else shut_s
        if link.is_up and self._is_said:
            self._is_said = False
            _log.warning("There is a connection to %s now: payloads pass.", link.endpoint)
        elif not self._is_said and shut_s >= (SAY_LATER_S if is_joined else SAY_S):
            self._is_said = True
            goes_on = "Training goes on with local steps." if is_joined else "The join tries on for a while."
            _log.warning("No connection for payloads for %.0f s, though the syncer answers. %s %s", shut_s, self.why_blocked, goes_on)
