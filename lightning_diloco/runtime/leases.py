"""`Leases`: the samples of a learner's loader, drawn on the training thread and asked for ahead on the background thread.

The rules are `protocol.lease_stock`'s; here are the lock, the clock, and the only wait. The background thread asks while at least two
leases are still in the stock, so a loader draws without waiting. Should it run dry all the same (steps of a millisecond, or a syncer that
is busy), the loader waits for an answer of a syncer that is heard, `WAIT_S` at most, and only once until it answers again. Without an
answer the learner trains its last samples once more, and says so loudly.

References:
    DESIGN.md section 1: a learner never waits for the syncer; section 9: data leases.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lightning_diloco.protocol.identity import DataSpec, LeaseRange
from lightning_diloco.protocol.lease_stock import LeaseStock
from lightning_diloco.protocol.messages import LeaseGrant, Message

__all__ = ["Leases", "Link"]

_log = logging.getLogger(__name__)

WAIT_S = 2.0
"""A stock that has run dry waits so long for a syncer that was heard a moment ago."""
AGAIN_S = 0.25
"""A request that is not answered is said again after so long, or after a heartbeat while the syncer is not heard."""


@dataclass(frozen=True, slots=True)
class Link:
    """How a learner's leases reach its syncer.

    Args:
        send: sends a control message.
        wake: has `Leases.tick` called soon, on the background thread.
        is_heard: whether the syncer answers, at a time of the monotonic clock.
        syncer_epoch: of the syncer that answers.
        heartbeat_s: of the job.
    """

    send: Callable[[Message], object]
    wake: Callable[[], None]
    is_heard: Callable[[float], bool]
    syncer_epoch: Callable[[], int]
    heartbeat_s: float


class Leases:
    """Leases of one learner.

    Args:
        spec: the data set.
        until: the first epoch that is not wanted; None: all are.
        share: samples after which an epoch without leases ends (None: it does not).
        batch_size: samples of a batch, at this moment.
        batches_ahead: batches that the loader fetches before they are trained.
    """

    def __init__(self, spec: DataSpec, *, until: int | None, share: int | None, batch_size: Callable[[], int], batches_ahead: int) -> None:
        self.spec = spec
        self.waited_s = 0.0
        """Time that the loader has waited for grants since the join."""
        self._batch_size, self._batches_ahead = batch_size, batches_ahead
        self._stock = LeaseStock(spec, until=until, share=share)
        self._changed = threading.Condition()
        self._link: Link | None = None
        self._is_away = False
        self._has_warned = False
        self._last: Message | None = None
        self._last_s = 0.0

    # ---- for the background thread ------------------------------------------------------------------------------------------

    def connect(self, link: Link) -> None:
        """The learner has a syncer to ask."""
        self._link = link

    def tick(self, now_s: float) -> None:
        """Ask for what is wanted, or again."""
        link = self._link
        if link is None:
            return
        with self._changed:
            request = self._stock.request(
                batch_size=self._batch_size(), batches_ahead=self._batches_ahead, syncer_epoch=link.syncer_epoch()
            )
        period_s = AGAIN_S if link.is_heard(now_s) else link.heartbeat_s
        if request is not None and (request != self._last or now_s - self._last_s >= period_s):
            self._last, self._last_s = request, now_s
            link.send(request)

    def granted(self, message: LeaseGrant) -> None:
        """The syncer has answered."""
        link = self._link
        with self._changed:
            if link is not None and self._stock.granted(message, link.syncer_epoch()):
                if self._has_warned and message.ranges:
                    _log.warning("The syncer hands out samples again: training goes on with new ones.")
                    self._has_warned = False
                self._is_away = False
                self._changed.notify_all()
        if link is not None:
            link.wake()

    @property
    def has_answer(self) -> bool:
        """Whether the first request was answered: the learner may begin."""
        return self._stock.has_answer

    @property
    def samples(self) -> int:
        """Trained under leases, in the order of the grants."""
        return self._stock.samples

    def reported_again(self) -> tuple[tuple[int, int], ...]:
        """Per epoch, samples trained once more without a lease."""
        with self._changed:
            return self._stock.reported_again()

    # ---- for the training thread --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new iteration of the loader begins: what an earlier one had drawn and not trained is drawn again."""
        with self._changed:
            self._stock.begin()

    def draw(self, limit: int) -> LeaseRange | None:
        """The next positions to train, at most `limit`; None at the end of this learner's epoch."""
        with self._changed:
            found: LeaseRange | str = self._stock.draw(limit)
            if found == "empty":
                found = self._wait_for(limit)
            if found == "empty":
                return self._repeat(limit)
        if self._link is not None:
            self._link.wake()
        return None if isinstance(found, str) else found

    def _wait_for(self, limit: int) -> LeaseRange | str:
        """Wait for an answer, if one can be expected; the lock is free meanwhile."""
        start_s = now_s = time.monotonic()
        answer: LeaseRange | str = "empty"
        link = self._link
        while answer == "empty" and link is not None and not self._is_away and link.is_heard(now_s):
            if now_s - start_s >= WAIT_S:
                self._is_away = True
                break
            link.wake()
            self._changed.wait(min(AGAIN_S, WAIT_S))
            answer, now_s = self._stock.draw(limit), time.monotonic()
        self.waited_s += now_s - start_s
        return answer

    def _repeat(self, limit: int) -> LeaseRange | None:
        if not self._has_warned:
            self._has_warned = True
            _log.error(
                "No lease is left and the syncer does not answer: this learner trains its last samples once more until it does. "
                "They are counted as trained without a lease."
            )
        return self._stock.draw_again(limit)

    def processed(self, count: int) -> None:
        """A batch of so many samples went through a training step."""
        with self._changed:
            self._stock.processed(count)

    def dropped(self, count: int) -> None:
        """A batch of so many samples did not fit into memory: it and what was processed since the last step come again."""
        with self._changed:
            self._stock.dropped(count)

    def stepped(self) -> int:
        """An optimizer was stepped; returns `samples`."""
        with self._changed:
            self._stock.stepped()
            return self._stock.samples

    def next_epoch(self) -> int | None:
        """See `LeaseStock.next_epoch`."""
        with self._changed:
            return self._stock.next_epoch()

    def follow(self, spec: DataSpec) -> None:
        """Take the job's seed."""
        self.spec = spec
