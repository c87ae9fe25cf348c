"""The figures of data leases once more, one sample at a time, from plain JSON events; it imports nothing of the package."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

Event = dict[str, Any]
Place = tuple[int, int]
"""(epoch, position)"""


class Book:
    """What became of every place of every epoch."""

    def __init__(self, num_samples: int, *, is_rebuilt: bool) -> None:
        self.num_samples, self.is_rebuilt = num_samples, is_rebuilt
        self.assumed: set[Place] = set()
        self.epochs: set[int] = set()
        self.order: dict[tuple[int, int], list[Place | None]] = defaultdict(list)
        self.told: dict[tuple[int, int], int] = defaultdict(int)
        self.claimed: dict[tuple[int, int], int] = defaultdict(int)
        self.before_told: dict[tuple[int, int], int] = defaultdict(int)
        self.counted: dict[tuple[int, int], int] = {}
        self.taken_back: dict[tuple[int, int], int] = defaultdict(int)
        self.ended: set[tuple[int, int]] = set()
        self.done: set[Place] = set()
        self.before: set[Place] = set()
        self.surplus: Counter[Place] = Counter()
        self.again: Counter[int] = Counter()
        self.again_told: dict[tuple[int, int, int], int] = defaultdict(int)
        self.unsure: Counter[int] = Counter()
        self.samples: Counter[int] = Counter()

    def lease(self, e: Event) -> None:
        life = (e["learner_id"], e["incarnation"])
        self.report(life, e["samples"])
        self.order[life] += [None] * (e["before"] - len(self.order[life]))
        for epoch, start, stop in e["ranges"]:
            if self.is_rebuilt and epoch not in self.epochs and epoch < min(self.epochs, default=epoch):
                self.assumed |= {(epoch, i) for i in range(self.num_samples)}
            self.epochs |= {epoch, *range(min(self.epochs, default=epoch), epoch + 1)}
            self.assume_below(epoch, start)
            self.assumed -= {(epoch, i) for i in range(start, stop)}
            self.order[life] += [(epoch, i) for i in range(start, stop)]
        self.report(life, 0)

    def assume_below(self, epoch: int, start: int) -> None:
        """Ranges go out from the lowest place up: of a tape that was lost, what lies below one and is nowhere else was handed out."""
        if self.is_rebuilt:
            below = {(e, i) for e in self.epochs if e <= epoch for i in range(start if e == epoch else self.num_samples)}
            self.assumed |= below - self.done - self.outstanding()

    def report(self, life: tuple[int, int], samples: int) -> None:
        self.claimed[life] = max(self.claimed[life], samples)
        trained = self.order[life][self.told[life] : self.claimed[life]]
        self.told[life] += len(trained)
        self.samples[life[0]] += len(trained)
        for place in filter(None, trained):
            self.surplus[place] += (place in self.done) + (place in self.before)
            self.before.discard(place)
            self.assumed.discard(place)
            self.done.add(place)

    def report_again(self, life: tuple[int, int], again: list[list[int]]) -> None:
        for epoch, total in again:
            more = max(0, total - self.again_told[(*life, epoch)]) if epoch in self.epochs else 0
            self.again_told[(*life, epoch)] += more
            self.again[epoch] += more
            self.samples[life[0]] += more

    def train_before(self, life: tuple[int, int], samples: int) -> None:
        held = self.order[life][self.told[life] : samples]
        for place in filter(None, held[self.before_told[life] :]):
            self.surplus[place] += (place in self.done) + (place in self.before)
            self.samples[life[0]] += 1
            if place not in self.done:
                self.before.add(place)
        self.before_told[life] = max(self.before_told[life], len(held))

    def end(self, life: tuple[int, int], reason: str) -> None:
        is_sudden = reason in ("died", "fenced")
        if is_sudden and life in self.counted:
            self.train_before(life, self.counted[life])
        own = max(self.told[life], self.taken_back[life])
        freed = {p for p in self.order[life][own:] if p} - self.done
        self.ended.add(life)
        freed -= self.outstanding()
        if is_sudden and life not in self.counted:
            self.unsure.update(epoch for epoch, _ in [*freed, *filter(None, self.order[life][self.told[life] : own])])

    def outstanding(self) -> set[Place]:
        running = {life: max(self.told[life], self.taken_back[life]) for life in self.order if life not in self.ended}
        return {p for life, first in running.items() for p in self.order[life][first:] if p} - self.done


def lease_figures(tape: list[Event]) -> tuple[list[Event] | None, dict[int, int]]:
    """The summary's `leases`, and samples per learner; None and nothing for a job without leases."""
    jobs = [e for e in tape if e["event"] == "job"]
    if not jobs or jobs[-1].get("data") is None:
        return None, {}
    book = Book(jobs[-1]["data"]["num_samples"], is_rebuilt=jobs[-1]["is_rebuilt"])
    sessions: dict[str, tuple[int, int]] = {}
    for e in tape:
        life = (e.get("learner_id", -1), e.get("incarnation", -1))
        if e["event"] == "join":
            sessions[e["session"]] = life
        elif e["event"] == "lease":
            book.lease(e)
        elif e["event"] == "progress":
            book.report(life, e["samples"])
            book.report_again(life, e["again"])
        elif e["event"] == "counters" and e["samples"] is not None:
            book.counted[life] = e["samples"]
        elif e["event"] == "lease_back":
            book.taken_back[life] = len(book.order[life])
        elif e["event"] == "leave":
            book.end(life, e["reason"])
        elif e["event"] == "lease_late":
            assert sessions[e["session"]] == life, "a late word of another process"
            book.train_before(life, e["samples"])
    figures = [epoch_figures(book, epoch) for epoch in sorted(book.epochs)]
    trained = {epoch for epoch, _ in book.before}
    return [x for x in figures if x["free"] < x["num_samples"] or x["epoch"] in trained], dict(book.samples)


def epoch_figures(book: Book, epoch: int) -> Event:
    done = {i for e, i in book.done if e == epoch}
    held = {i for e, i in book.outstanding() | book.assumed if e == epoch}
    surplus = {i: n for (e, i), n in book.surplus.items() if e == epoch and n}
    assert not done & held and done | held <= set(range(book.num_samples)), f"epoch {epoch}: a place that is none, or done and outstanding"
    return {
        "epoch": epoch,
        "num_samples": book.num_samples,
        "done": len(done),
        "twice": sum(surplus.values()),
        "free": book.num_samples - len(done) - len(held),
        "outstanding": len(held),
        "again": book.again[epoch],
        "unsure": book.unsure[epoch],
        "twice_ranges": spans(sorted(surplus)),
    }


def spans(numbers: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for i in numbers:
        if found and found[-1][1] == i:
            found[-1][1] = i + 1
        else:
            found.append([i, i + 1])
    return found
