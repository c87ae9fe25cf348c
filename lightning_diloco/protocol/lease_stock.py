"""`LeaseStock`: a learner's leases, from the request to the optimizer step. Pure rules; `runtime.leases` adds threads and time.

    granted --draw--> drawn --(the batch was processed, an optimizer stepped)--> trained

A loader draws ahead of training: Lightning looks one batch ahead, workers fetch several. What was drawn and not trained when an iteration
ends goes back to the front of the stock (`restock`), so that a life always trains in the order of its grants: then one number says what
is done (see `leases`).

**Epochs.** A learner's epoch ends at the first range of a later epoch than the one it is in, because the syncer hands out the oldest
first: nothing of this one is free. Ranges of older epochs, which come back from learners that died, end nothing.

**Without a lease.** A learner does not stop for a syncer that is away: it trains its own last ranges once more, in the same order. These
samples are counted apart, per epoch (`again`). Where a supervisor brings the syncer back, this does not end the learner's epoch, or a job
of few epochs would be over before all of its samples were handed out. Where nobody may come back, the epoch ends when as many samples were
drawn as an even share has, so that the learner reaches its own limit.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import msgspec

from lightning_diloco.protocol.identity import DataSpec, LeaseRange
from lightning_diloco.protocol.leases import lease_size
from lightning_diloco.protocol.messages import Granted, LeaseGrant, LeaseRequest

__all__ = ["LeaseStock"]

LEASES_AHEAD = 2
"""Leases that wait in the stock, beside what the loader fetches ahead."""
MAX_KNOWN = 32
"""Grants that are told to a syncer that has started again: more than a machine that goes down can lose."""
MAX_HISTORY = 64
"""Ranges that are trained once more without a lease."""
MAX_AGAIN = 64
"""Epochs of which it is reported how much was trained without a lease; the oldest make room."""


class LeaseStock:
    """Leases of one life of a learner.

    Args:
        spec: the data set.
        until: the first epoch that this learner does not want (None: it wants all).
        share: samples after which an epoch without leases ends (None: it does not).
    """

    def __init__(self, spec: DataSpec, *, until: int | None, share: int | None) -> None:
        self._spec = spec
        self._until = until
        self._share = share
        self.samples = 0
        """Trained under leases, in the order of the grants."""
        self.again: dict[int, int] = {}
        """Per epoch, trained once more without a lease."""
        self.is_over = False
        """The syncer said that nothing is free of the epochs that are wanted."""
        self.has_answer = False
        self._queue: deque[LeaseRange] = deque()
        self._queued = self._granted = 0
        self._drawn: deque[tuple[LeaseRange, bool]] = deque()
        self._in_step = 0
        self._number = 0
        self._open: LeaseRequest | None = None
        self._told_epoch = -1
        self._known: deque[Granted] = deque(maxlen=MAX_KNOWN)
        self._history: deque[LeaseRange] = deque(maxlen=MAX_HISTORY)
        self._cycle: deque[LeaseRange] = deque()
        self._epoch: int | None = None
        self._ended = -1
        self._drawn_in_epoch = 0
        self._was_asked_when_empty = False

    # ---- asking -------------------------------------------------------------------------------------------------------------

    def request(self, *, batch_size: int, batches_ahead: int, syncer_epoch: int) -> LeaseRequest | None:
        """What is to be asked of the syncer now; the same as before as long as it is not answered, None if nothing is.

        Args:
            batch_size: samples of a batch at this moment.
            batches_ahead: batches that the loader fetches before they are trained.
            syncer_epoch: of the syncer that is asked; one that has started again is told what is held.
        """
        is_new_syncer = syncer_epoch != self._told_epoch
        if self._open is None:
            lease = lease_size(self._spec.num_samples, batch_size)
            # More than an epoch beyond a lease is no use; the syncer would not give it.
            target = min(batches_ahead * batch_size + LEASES_AHEAD * lease, self._spec.num_samples + lease)
            is_low = self._queued + lease <= target and not self.is_over
            if not is_low and not (is_new_syncer and self._known):
                return None
            self._number += 1
            self._open = LeaseRequest(
                number=self._number,
                wanted=max(lease, target - self._queued) if is_low else 0,
                batch_size=max(1, batch_size),
                until=self._until,
                samples=self.samples,
            )
        return msgspec.structs.replace(self._open, known=tuple(self._known)) if is_new_syncer else self._open

    def granted(self, message: LeaseGrant, syncer_epoch: int) -> bool:
        """Take an answer; returns whether it was one to the open request (a copy of an older one is dropped)."""
        if self._open is None or message.number != self._open.number:
            return False
        self._open, self._told_epoch, self.has_answer = None, syncer_epoch, True
        self._queue.extend(message.ranges)
        self._queued += sum(r.stop - r.start for r in message.ranges)
        self.is_over = message.is_over
        if message.ranges:
            self._known.append(Granted(message.number, message.ranges, self._granted))
            self._granted += sum(r.stop - r.start for r in message.ranges)
            self._was_asked_when_empty = False
        return True

    # ---- drawing ------------------------------------------------------------------------------------------------------------

    def draw(self, limit: int) -> LeaseRange | Literal["over", "empty"]:
        """The next positions to train, at most `limit` of them.

        Returns:
            A range; "over" if this learner's epoch has ended; "empty" if the syncer has to be waited for, or `draw_again` used.
        """
        if not self._queue:
            if not self.is_over:
                return "empty"
            if self._was_asked_when_empty:
                self._end_epoch()
                return "over"
            # Something may have come back from a learner that died since this was said.
            self._was_asked_when_empty, self.is_over = True, False
            return "empty"
        front = self._queue[0]
        if self._epoch is not None and front.epoch > self._epoch:
            self._end_epoch()
            return "over"
        item = self._take(limit)
        if item.epoch > max(self._ended, -1 if self._epoch is None else self._epoch):
            self._epoch = item.epoch
        self._drawn.append((item, False))
        self._drawn_in_epoch += item.stop - item.start
        self._remember(item)
        return item

    def draw_again(self, limit: int) -> LeaseRange | None:
        """Positions that this learner has had before, because it has no lease; None: its epoch has ended, or it never had any."""
        if not self._history or (self._share is not None and self._drawn_in_epoch >= self._share):
            return None
        self._cycle = self._cycle or deque(self._history)
        front = self._cycle.popleft()
        stop = min(front.stop, front.start + max(1, limit))
        if stop < front.stop:
            self._cycle.appendleft(LeaseRange(front.epoch, stop, front.stop))
        item = LeaseRange(front.epoch, front.start, stop)
        self._drawn.append((item, True))
        self._drawn_in_epoch += stop - front.start
        return item

    def begin(self) -> None:
        """A new iteration of the loader begins."""
        self.restock()
        self._epoch, self._drawn_in_epoch = None, 0

    def restock(self) -> None:
        """What was drawn and will not be trained by this iteration is at the front again."""
        kept, skip = deque[tuple[LeaseRange, bool]](), self._in_step
        back: list[LeaseRange] = []
        for item, is_again in self._drawn:
            here = min(skip, item.stop - item.start)
            skip -= here
            if here:
                kept.append((LeaseRange(item.epoch, item.start, item.start + here), is_again))
            if item.start + here < item.stop and not is_again:
                back.append(LeaseRange(item.epoch, item.start + here, item.stop))
        self._drawn = kept
        self._queue.extendleft(reversed(back))
        self._queued += sum(r.stop - r.start for r in back)

    # ---- training -----------------------------------------------------------------------------------------------------------

    def processed(self, count: int) -> None:
        """A batch of so many samples went through a training step."""
        self._in_step += count

    def dropped(self, count: int) -> None:
        """A batch of so many samples, and all that was processed since the last step, comes again, after what is drawn already."""
        left, self._in_step = self._in_step + count, 0
        moved: list[tuple[LeaseRange, bool]] = []
        while left > 0 and self._drawn:
            item, is_again = self._drawn.popleft()
            size = min(left, item.stop - item.start)
            if size < item.stop - item.start:
                self._drawn.appendleft((LeaseRange(item.epoch, item.start + size, item.stop), is_again))
            moved.append((LeaseRange(item.epoch, item.start, item.start + size), is_again))
            left -= size
        self._drawn.extend(moved)

    def stepped(self) -> None:
        """An optimizer was stepped: everything processed so far is trained."""
        left, self._in_step = self._in_step, 0
        while left > 0 and self._drawn:
            item, is_again = self._drawn.popleft()
            count = min(left, item.stop - item.start)
            if count < item.stop - item.start:
                self._drawn.appendleft((LeaseRange(item.epoch, item.start + count, item.stop), is_again))
            if is_again:
                self.again[item.epoch] = self.again.get(item.epoch, 0) + count
            else:
                self.samples += count
            left -= count

    def reported_again(self) -> tuple[tuple[int, int], ...]:
        """`again` as a report tells it."""
        return tuple(sorted(self.again.items()))[-MAX_AGAIN:]

    def next_epoch(self) -> int | None:
        """Between two epochs, the one that this learner begins next; `until` if there is none left, None if that is not known."""
        if self._epoch is not None:
            return None  # an iteration was cut short, and the next one goes on in its epoch
        known = next((r.epoch for r in self._queue if r.epoch > self._ended), None)
        return self._until if known is None and self.is_over else known

    @property
    def queued(self) -> int:
        """Samples that were granted and not drawn."""
        return self._queued

    # ---- within -------------------------------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        if self._epoch is not None:
            self._ended = max(self._ended, self._epoch)
        self._epoch = None

    def _take(self, limit: int) -> LeaseRange:
        front = self._queue.popleft()
        stop = min(front.stop, front.start + max(1, limit))
        if stop < front.stop:
            self._queue.appendleft(LeaseRange(front.epoch, stop, front.stop))
        self._queued -= stop - front.start
        return LeaseRange(front.epoch, front.start, stop)

    def _remember(self, item: LeaseRange) -> None:
        self._cycle.clear()
        last = self._history[-1] if self._history else None
        if last is not None and last.epoch == item.epoch and last.start <= item.start <= last.stop:
            self._history[-1] = LeaseRange(last.epoch, last.start, max(item.stop, last.stop))
        else:
            self._history.append(item)
