"""What only the learner itself can see of its exchange: payload bytes, how long an answer takes, how much is on its way."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

__all__ = ["Watch"]


class Watch:
    """Looks at a `LearnerClient` from inside of its process; made on the training thread, called by the background thread as well.

    Args:
        client: joined.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._loop = client._loop
        self._asked_s: dict[int, float] = {}
        self._answers: list[tuple[float, float]] = []
        self._most_on_way = 0
        reports, send, outbox = self._loop.reports, self._loop.reports._send, self._loop._outbox
        heed, send_payload = reports.heed, outbox.send

        def ask(message: Any) -> bool:
            """Send a control message; note when a `Ping` went."""
            if type(message).__name__ == "Ping":
                self._asked_s[message.number] = time.monotonic()
            return bool(send(message))

        def hear(message: Any) -> None:
            """Note when its answer came."""
            asked_s = self._asked_s.pop(message.number, None) if type(message).__name__ == "Pong" else None
            if asked_s is not None:
                self._answers.append((asked_s, time.monotonic() - asked_s))
            heed(message)

        def put(header: bytes, payload: memoryview) -> None:
            """Send a payload; count the contributions of one fragment that are on their way."""
            send_payload(header, payload)
            self._most_on_way = max(self._most_on_way, most_of_one_fragment(list(outbox._on_way.values())))

        reports._send, reports.heed, outbox.send = ask, hear, put

    def figures(self) -> dict[str, float]:
        """Of this moment."""
        figures = self._client.figures
        return {"payload_up": figures.bytes_up, "payload_down": figures.bytes_down, "stall_s": figures.stall_s, "merges": figures.merges}

    def rest(self) -> dict[str, Any]:
        """Of the whole run: answers as (asked at, seconds), questions without one, most contributions of a fragment on their way."""
        return {"answers": self._answers, "unanswered": len(self._asked_s), "most_on_way": self._most_on_way}


def most_of_one_fragment(headers: list[bytes]) -> int:
    """Of payloads on their way, how many contributions belong to one fragment at most.

    Not counted: the one with which a learner leaves, which may follow an unresolved one.
    """
    from lightning_diloco.protocol.messages import Contribution
    from lightning_diloco.protocol.wire import decode_learner_header

    decoded = [decode_learner_header(data)[1] for data in headers]
    counts = Counter(header.fragment_id for header in decoded if isinstance(header, Contribution) and not header.is_final)
    return max(counts.values(), default=0)
