"""`LeaseLedger`: who has which samples of which epoch, and how often each was trained. Pure rules, without clock or I/O.

An epoch is the positions [0, N) of one permutation of the data set. A **lease** is a range of positions that one life of a learner may
train. Each position of an epoch is free, outstanding (leased and not done) or done:

- `grant` hands out the lowest free positions of the oldest epoch that has any. When none has, the next epoch opens: a fast learner goes
  on while others still hold positions of the epoch before, and nobody waits.
- **A life trains in the order of its grants**, so one number, the samples that it has trained, says which of its positions are done.
  Reports are therefore running totals: a lost, doubled or late one changes nothing.
- `end`: what an ended life had not reported as done is free again, the oldest epoch first, for whoever asks next.
- `reclaim`: what a silent life holds is free as well, although it may come back. What it then says that it has trained is done, or twice.
- What such a life is known to have trained all the same (its counter file says so, or a late word of a process that was given up) was
  trained *before*: when somebody is done with it as well, it counts as trained twice. Of a life that ended without any such word, what
  was outstanding is `unsure`: nobody can know how much of it was trained.

Invariants: free, done and outstanding cover an epoch and free touches neither of the others; trainings that are known
= done + before + twice. Positions are in spans, so memory is bounded by learners times the few ranges that each holds.

Only a machine that goes down with unwritten lines of the tape can make two lives hold one position: each tells what it was granted
(`take`), both train it, and it counts as twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from lightning_diloco.protocol.identity import DataSpec, LeaseRange
from lightning_diloco.protocol.lease_epoch import Epoch
from lightning_diloco.protocol.spans import Spans

__all__ = ["LeaseLedger", "Life", "lease_size"]

LEASES_PER_EPOCH = 50
"""A lease is at most this part of an epoch, so that little is done again when a learner dies, and learners end an epoch together."""
BATCHES_PER_LEASE = 8
"""And at most so many batches."""
LEASES_PER_GRANT = 4
"""One grant holds at most so many leases, and not more samples than an epoch, whatever was asked for."""
MAX_RANGES = 256
"""And at most so many ranges."""
MAX_HELD_BATCHES = 2048
"""A life that holds more batches that it has not reported as trained gets no others: a loader fetches ahead, a step accumulates, but not so
many."""
MAX_HELD_EPOCHS = 2
"""And not more samples than so many epochs: of a small data set that is less."""
MAX_ENDED = 1024
"""Ended lives whose late words are understood."""
_GAP: Final = -1
"""Epoch of samples in what a life holds of which nobody knows where they lie."""
MAX_AHEAD = 64
"""Epochs that a told range may lie ahead of the newest one: more is no range of this job."""


def lease_size(num_samples: int, batch_size: int) -> int:
    """Samples of one lease: a fiftieth of an epoch or eight batches, whichever is less, in whole batches, and one batch at least."""
    batch = max(1, min(batch_size, num_samples))
    return max(batch, min(num_samples // LEASES_PER_EPOCH, BATCHES_PER_LEASE * batch) // batch * batch)


@dataclass(slots=True)
class Life:
    """What one incarnation holds.

    `number` and `last`: its last grant, which a copy of the request gets again. `has_told`: it has told this syncer what it holds.
    `reclaimed`: of all that it was granted, in order, so much is free for others.
    """

    learner_id: int
    incarnation: int
    number: int = 0
    last: tuple[LeaseRange, ...] = ()
    was_over: bool = False
    has_told: bool = False
    pending: deque[LeaseRange] = field(default_factory=deque)
    granted: int = 0
    trained: int = 0
    reclaimed: int = 0
    claimed: int = 0
    session: str = ""
    before: int = 0
    counted: int | None = None
    again: dict[int, int] = field(default_factory=dict)


class LeaseLedger:
    """The leases of one data set.

    Args:
        spec: the data set, as the founder told it.
        is_rebuilt: the tape was lost: of the epoch under way, what lies below a range that a learner shows counts as handed out.
    """

    def __init__(self, spec: DataSpec, *, is_rebuilt: bool = False) -> None:
        self.spec = spec
        self._is_rebuilt = is_rebuilt
        self._epochs: dict[int, Epoch] = {}
        self._next = spec.first_epoch
        self._with_free: list[int] = []
        self._lives: dict[tuple[int, int], Life] = {}
        self._ended: dict[str, Life] = {}
        self._samples: dict[int, int] = {}

    def life(self, learner_id: int, incarnation: int) -> Life:
        """What this incarnation holds; nothing, if it was never heard of."""
        return self._lives.setdefault((learner_id, incarnation), Life(learner_id, incarnation))

    # ---- handing out --------------------------------------------------------------------------------------------------------

    def grant(self, life: Life, number: int, *, wanted: int, batch_size: int, until: int | None) -> tuple[LeaseRange, ...]:
        """Hand out the next ranges.

        Args:
            life: whose.
            number: of its request.
            wanted: samples; in whole batches, at most `LEASES_PER_GRANT` leases and an epoch.
            batch_size: samples.
            until: no range of this epoch or a later one (None: of any).

        Returns:
            The ranges, in the order in which they are to be trained; empty if nothing is free below `until`.
        """
        batch = max(1, min(batch_size, self.spec.num_samples))
        size, ranges = lease_size(self.spec.num_samples, batch), list[LeaseRange]()
        left = min(-(-wanted // batch), LEASES_PER_GRANT * size // batch, self.spec.num_samples // batch) * batch
        while left > 0 and len(ranges) < MAX_RANGES:
            epoch = self._oldest_free(until)
            if epoch is None:
                break
            start, stop = self._epochs[epoch].free.first(min(size, left))
            self._take_free(epoch, start, stop)
            left -= stop - start
            if ranges and ranges[-1].epoch == epoch and ranges[-1].stop == start:
                ranges[-1] = LeaseRange(epoch, ranges[-1].start, stop)
            else:
                ranges.append(LeaseRange(epoch, start, stop))
        self._note(life, number, tuple(ranges))
        return life.last

    def has_enough(self, life: Life, samples: int, batch_size: int) -> bool:
        """Whether a life that says that it has trained `samples` holds so much more that it must train before it gets anything."""
        most = min(MAX_HELD_BATCHES * batch_size, MAX_HELD_EPOCHS * self.spec.num_samples)
        return life.granted - max(life.trained, samples) > most

    def has_free(self, until: int | None) -> bool:
        """Whether anything is free below `until` in the epochs that are open."""
        return bool(self._with_free) and (until is None or self._with_free[0] < until)

    def take(self, life: Life, number: int, ranges: tuple[LeaseRange, ...], before: int = 0) -> None:
        """A grant that is known already: from the tape, or because its learner tells of one that the tape has lost.

        Args:
            life: whose.
            number: of its request.
            ranges: what was granted.
            before: samples of all grants of this life before it; those that nobody knows any more are a gap in what it holds.
        """
        if before > life.granted:
            life.pending.append(LeaseRange(_GAP, life.granted, before))
            life.granted = before
        for item in ranges:
            self._open_through(item.epoch)
            self._take_free(item.epoch, item.start, item.stop)
            self._epochs[item.epoch].assumed.remove(item.start, item.stop)
            if self._is_rebuilt:
                self._assume_below(item)
        self._note(life, number, ranges)

    def is_possible(self, ranges: tuple[LeaseRange, ...]) -> bool:
        """Whether a grant that a learner shows can be one of this data set's."""
        size, is_first = self.spec.num_samples, self._is_rebuilt and not self._epochs
        last = MAX_AHEAD + (min((r.epoch for r in ranges), default=0) if is_first else self._next)
        is_sound = all(r.start < r.stop <= size and self.spec.first_epoch <= r.epoch <= last for r in ranges)
        return is_sound and 0 < sum(r.stop - r.start for r in ranges) <= size

    def _note(self, life: Life, number: int, ranges: tuple[LeaseRange, ...]) -> None:
        life.number, life.last = max(number, life.number), ranges
        life.pending.extend(ranges)
        life.granted += sum(r.stop - r.start for r in ranges)
        self._advance(life)

    def _oldest_free(self, until: int | None) -> int | None:
        if not self._with_free and (until is None or self._next < until):
            self._open_through(self._next)
        epoch = self._with_free[0] if self._with_free else None
        return None if epoch is None or (until is not None and epoch >= until) else epoch

    def _open_through(self, epoch: int) -> None:
        if self._is_rebuilt and not self._epochs:
            self._next = epoch
        if epoch < self._next and epoch not in self._epochs:
            # Before the first one that a rebuilt ledger knows: all that is not shown was handed out.
            self._epochs[epoch] = whole = Epoch(self.spec.num_samples)
            whole.free, whole.assumed = whole.assumed, whole.free
        while self._next <= epoch:
            self._epochs[self._next] = Epoch(self.spec.num_samples)
            self._with_free.append(self._next)
            self._next += 1

    def _take_free(self, epoch: int, start: int, stop: int) -> None:
        free = self._epochs[epoch].free
        free.remove(start, stop)
        if not free.size and epoch in self._with_free:
            self._with_free.remove(epoch)

    def _make_free(self, epoch: int, start: int, stop: int) -> None:
        self._epochs[epoch].free.add(start, stop)
        if epoch not in self._with_free:
            self._with_free = sorted([*self._with_free, epoch])

    def _assume_below(self, item: LeaseRange) -> None:
        """Ranges are handed out from the lowest position up: what lies below one was handed out before."""
        for epoch in [e for e in self._with_free if e <= item.epoch]:
            whole = self._epochs[epoch]
            for a, b in whole.free.overlap(0, item.start if epoch == item.epoch else self.spec.num_samples):
                whole.assumed.add(a, b)
                self._take_free(epoch, a, b)

    # ---- what was trained ---------------------------------------------------------------------------------------------------

    def trained(self, learner_id: int, incarnation: int, samples: int, again: tuple[tuple[int, int], ...] = ()) -> None:
        """A running life reports its totals.

        Args:
            learner_id: whose.
            incarnation: which life.
            samples: that it has trained so far under its leases, in their order; a smaller number is an old report.
            again: per epoch, samples that it has trained once more because it had no lease (totals).
        """
        life = self.life(learner_id, incarnation)
        life.claimed = max(life.claimed, samples)
        self._advance(life)
        for epoch, count in again:
            known = life.again.get(epoch, 0)
            if epoch in self._epochs and count > known:
                self._epochs[epoch].again += count - known
                self._samples[learner_id] = self._samples.get(learner_id, 0) + count - known
                life.again[epoch] = count

    def _advance(self, life: Life) -> None:
        # A syncer whose machine went down may know fewer grants than the learner has trained: the rest counts when they are told.
        count = min(life.claimed, life.granted) - life.trained
        for item in _known(_front(life.pending, count)):
            self._epochs[item.epoch].finish(item.start, item.stop)
            if not self._epochs[item.epoch].free.size and item.epoch in self._with_free:
                self._with_free.remove(item.epoch)
        life.trained += max(0, count)
        self._samples[life.learner_id] = self._samples.get(life.learner_id, 0) + max(0, count)

    def counted(self, learner_id: int, incarnation: int, samples: int) -> None:
        """The counter file of a life says what it had trained; it counts if that life ends without a last word."""
        self.life(learner_id, incarnation).counted = samples

    def late(self, session: str, samples: int) -> bool:
        """A process whose life was ended says what it had trained; returns whether that is news."""
        life = self._ended.get(session)
        return life is not None and self._train_before(life, samples)

    def late_life(self, session: str) -> Life | None:
        """The ended life of a process."""
        return self._ended.get(session)

    def _train_before(self, life: Life, samples: int) -> bool:
        count = samples - life.trained
        if count <= life.before:
            return False
        skip, held = life.before, deque(life.pending)
        for _ in _front(held, skip):
            pass
        for item in _known(_front(held, count - skip)):
            self._epochs[item.epoch].train_before(item.start, item.stop)
            self._samples[life.learner_id] = self._samples.get(life.learner_id, 0) + item.stop - item.start
        life.before = count
        return True

    # ---- the end of a life --------------------------------------------------------------------------------------------------

    def end(self, learner_id: int, incarnation: int, session: str, *, said_last_word: bool) -> None:
        """A life has ended: what it had not reported as done is free again.

        Args:
            learner_id: whose.
            incarnation: which life.
            session: its process, for late words.
            said_last_word: it left in order, with a last report.
        """
        life = self._lives.pop((learner_id, incarnation), None)
        if life is None:
            return
        life.session = session
        if not said_last_word and life.counted is not None:
            self._train_before(life, life.counted)
        reclaimed, own = _split(life)
        is_unsure = not said_last_word and life.counted is None
        for item in _known(reclaimed) if is_unsure else ():
            self._epochs[item.epoch].unsure += item.stop - item.start
        self._give_back(own, is_unsure=is_unsure)
        self._ended[session] = life
        while len(self._ended) > MAX_ENDED:
            self._ended.pop(next(iter(self._ended)))

    def reclaim(self, learner_id: int, incarnation: int) -> bool:
        """A running life is silent: others may have what it holds; returns whether it holds anything that they could not have before."""
        life = self.life(learner_id, incarnation)
        _, own = _split(life)
        life.reclaimed = life.granted
        self._give_back(own, is_unsure=False)
        return bool(own)

    def _give_back(self, ranges: Iterable[LeaseRange], *, is_unsure: bool) -> None:
        others = self._held_in({r.epoch for r in ranges})
        for item in _known(ranges):
            rest = Spans(item.start, item.stop)
            for a, b in [x for part in (self._epochs[item.epoch].done, others[item.epoch]) for x in part.overlap(item.start, item.stop)]:
                rest.remove(a, b)
            self._epochs[item.epoch].unsure += rest.size if is_unsure else 0
            for a, b in rest:
                self._make_free(item.epoch, a, b)

    def _held_in(self, epochs: set[int]) -> dict[int, Spans]:
        """What running lives hold of these epochs, and others may not have."""
        held = {epoch: Spans() for epoch in epochs}
        for life in self._lives.values() if epochs else ():
            for item in _split(life)[1]:
                if item.epoch in held:
                    held[item.epoch].add(item.start, item.stop)
        return held

    # ---- what can be read ---------------------------------------------------------------------------------------------------

    def samples(self, learner_id: int) -> int:
        """Samples that all lives of this learner are known to have trained, those trained twice or without a lease included."""
        return self._samples.get(learner_id, 0)

    def held(self, learner_id: int, incarnation: int) -> tuple[LeaseRange, ...]:
        """What a running life holds and has not reported as done, in order."""
        life = self._lives.get((learner_id, incarnation))
        return tuple(_known(life.pending)) if life is not None else ()

    def accounts(self) -> list[dict[str, Any]]:
        """Per epoch of which anything was trained or is held, in samples: `num_samples` = `done` + `free` + `outstanding`."""
        return [
            {
                "epoch": epoch,
                "num_samples": self.spec.num_samples,
                "done": x.done.size,
                "twice": x.twice,
                "free": x.free.size,
                "outstanding": self.spec.num_samples - x.done.size - x.free.size,
                "again": x.again,
                "unsure": x.unsure,
                "twice_ranges": [list(span) for span in x.listed],
            }
            for epoch, x in sorted(self._epochs.items())
            if x.free.size < self.spec.num_samples or x.before.size
        ]

    def state(self, epoch: int) -> tuple[Spans, Spans, Spans]:
        """Free, done and before of an epoch; for tests."""
        x = self._epochs[epoch]
        return x.free, x.done, x.before


def _known(ranges: Iterable[LeaseRange]) -> list[LeaseRange]:
    return [item for item in ranges if item.epoch != _GAP]


def _split(life: Life) -> tuple[list[LeaseRange], deque[LeaseRange]]:
    """Of what a life holds: what others may have, and what is its own."""
    own = deque(life.pending)
    return _front(own, life.reclaimed - life.trained), own


def _front(ranges: deque[LeaseRange], count: int) -> list[LeaseRange]:
    """Take the first `count` positions off."""
    taken: list[LeaseRange] = []
    while count > 0 and ranges:
        item = ranges.popleft()
        if item.stop - item.start > count:
            ranges.appendleft(LeaseRange(item.epoch, item.start + count, item.stop))
            item = LeaseRange(item.epoch, item.start, item.start + count)
        count -= item.stop - item.start
        taken.append(item)
    return taken
