"""The ledger of data leases: an epoch is covered exactly once but for what died unreported, whatever happens."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diloco.protocol.identity import DataSpec, LeaseRange
from lightning_diloco.protocol.leases import LeaseLedger, lease_size
from lightning_diloco.protocol.spans import Spans


def ledger_of(num_samples: int, **spec) -> LeaseLedger:
    return LeaseLedger(DataSpec(num_samples=num_samples, is_shuffled=False, **spec))


def account(ledger: LeaseLedger, epoch: int) -> dict[str, int]:
    (found,) = [x for x in ledger.accounts() if x["epoch"] == epoch]
    return found


# ---- spans ----------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 12)), max_size=40))
def test_spans_are_a_set(changes):
    spans, numbers = Spans(), set()
    for is_added, start, count in changes:
        (spans.add if is_added else spans.remove)(start, start + count)
        change = set(range(start, start + count))
        numbers = numbers | change if is_added else numbers - change
        assert {n for a, b in spans for n in range(a, b)} == numbers
        assert spans.size == len(numbers)
        listed = list(spans)
        assert all(a < b for a, b in listed) and all(b < c for (_, b), (c, _) in zip(listed, listed[1:], strict=False))
        inside = {n for a, b in spans.overlap(5, 20) for n in range(a, b)}
        assert inside == {n for n in numbers if 5 <= n < 20}


# ---- sizes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "size"),
    [(100_000, 32, 256), (1_000, 2, 16), (1_000, 3, 18), (60, 4, 4), (3, 8, 3), (1, 1, 1), (10_000, 64, 192)],
)
def test_a_lease_is_a_fiftieth_of_an_epoch_or_eight_batches_in_whole_batches(num_samples, batch_size, size):
    assert lease_size(num_samples, batch_size) == size


# ---- one learner, two learners --------------------------------------------------------------------------------------------------


def test_the_lowest_free_range_of_the_oldest_epoch_is_handed_out_and_the_next_epoch_opens_when_nothing_is_free():
    ledger = ledger_of(10)
    a, b = ledger.life(0, 0), ledger.life(1, 0)
    assert ledger.grant(a, 1, wanted=4, batch_size=2, until=None) == (LeaseRange(0, 0, 4),)
    assert ledger.grant(b, 1, wanted=4, batch_size=4, until=None) == (LeaseRange(0, 4, 8),)
    # Nobody waits: what is left of the first epoch, and the beginning of the next one.
    assert ledger.grant(a, 2, wanted=4, batch_size=2, until=None) == (LeaseRange(0, 8, 10), LeaseRange(1, 0, 2))


def test_nothing_is_granted_of_an_epoch_that_is_not_wanted():
    ledger = ledger_of(4)
    assert ledger.grant(ledger.life(0, 0), 1, wanted=10, batch_size=2, until=1) == (LeaseRange(0, 0, 4),)
    assert ledger.grant(ledger.life(0, 0), 2, wanted=2, batch_size=2, until=1) == ()
    assert [x["epoch"] for x in ledger.accounts()] == [0]


def test_what_a_dead_learner_had_not_reported_is_handed_out_again_first_to_one_that_is_epochs_ahead():
    ledger = ledger_of(8)
    a, b = ledger.life(0, 0), ledger.life(1, 0)
    ledger.grant(a, 1, wanted=4, batch_size=4, until=None)
    ledger.grant(b, 1, wanted=8, batch_size=4, until=None)
    ledger.trained(1, 0, 8)
    ledger.trained(0, 0, 1)
    ledger.end(0, 0, "a", said_last_word=False)
    assert ledger.grant(b, 2, wanted=4, batch_size=4, until=None) == (LeaseRange(0, 1, 4), LeaseRange(1, 4, 5))
    assert account(ledger, 0)["unsure"] == 3


def test_the_counter_file_of_a_dead_learner_says_exactly_what_is_trained_twice():
    ledger = ledger_of(8)
    ledger.grant(ledger.life(0, 0), 1, wanted=8, batch_size=2, until=1)
    ledger.trained(0, 0, 2)
    ledger.counted(0, 0, 5)
    ledger.end(0, 0, "a", said_last_word=False)
    assert account(ledger, 0) | {"done": 2, "free": 6, "twice": 0, "unsure": 0} == account(ledger, 0)
    ledger.grant(ledger.life(1, 0), 1, wanted=8, batch_size=2, until=1)
    ledger.trained(1, 0, 6)
    assert account(ledger, 0) | {"done": 8, "twice": 3, "twice_ranges": [[2, 5]], "unsure": 0} == account(ledger, 0)
    assert (ledger.samples(0), ledger.samples(1)) == (5, 6)


def test_a_counter_file_of_a_learner_that_lives_on_changes_nothing():
    ledger = ledger_of(8)
    ledger.grant(ledger.life(0, 0), 1, wanted=8, batch_size=2, until=1)
    ledger.counted(0, 0, 5)
    ledger.trained(0, 0, 8)
    ledger.end(0, 0, "a", said_last_word=True)
    assert account(ledger, 0) | {"done": 8, "twice": 0} == account(ledger, 0)


def test_a_late_word_of_a_learner_that_was_given_up_tells_what_is_trained_twice():
    ledger = ledger_of(6)
    ledger.grant(ledger.life(0, 0), 1, wanted=6, batch_size=2, until=1)
    ledger.end(0, 0, "a", said_last_word=False)
    ledger.grant(ledger.life(1, 0), 1, wanted=6, batch_size=2, until=1)
    ledger.trained(1, 0, 2)
    assert ledger.late("a", 4)
    assert not ledger.late("a", 4)
    assert not ledger.late("nobody", 4)
    assert account(ledger, 0)["twice"] == 2
    ledger.trained(1, 0, 6)
    assert account(ledger, 0) | {"done": 6, "twice": 4, "twice_ranges": [[0, 4]]} == account(ledger, 0)


def test_a_range_that_two_lives_were_given_is_twice_when_both_report_it():
    ledger = ledger_of(4)
    ledger.grant(ledger.life(0, 0), 1, wanted=4, batch_size=2, until=1)
    ledger.take(ledger.life(1, 0), 1, (LeaseRange(0, 0, 2),))
    ledger.end(0, 0, "a", said_last_word=True)
    assert account(ledger, 0)["free"] == 2, "what another life still holds is not free"
    ledger.trained(1, 0, 2)
    ledger.grant(ledger.life(2, 0), 1, wanted=4, batch_size=2, until=1)
    ledger.trained(2, 0, 2)
    assert account(ledger, 0) | {"done": 4, "twice": 0} == account(ledger, 0)


def test_more_samples_than_were_granted_wait_for_the_grant_that_the_tape_has_lost():
    ledger = ledger_of(10)
    ledger.trained(0, 0, 4)
    assert ledger.accounts() == []
    ledger.take(ledger.life(0, 0), 1, (LeaseRange(0, 0, 6),))
    assert account(ledger, 0) | {"done": 4, "free": 4, "outstanding": 2} == account(ledger, 0)


def test_a_rebuilt_ledger_takes_what_lies_below_the_ranges_that_learners_show_for_handed_out():
    ledger = LeaseLedger(DataSpec(num_samples=10, is_shuffled=False), is_rebuilt=True)
    assert ledger.is_possible((LeaseRange(700, 6, 8),))
    ledger.take(ledger.life(0, 0), 40, (LeaseRange(700, 6, 8),))
    ledger.take(ledger.life(1, 0), 30, (LeaseRange(699, 9, 10), LeaseRange(700, 0, 2)))
    assert not ledger.is_possible((LeaseRange(900, 0, 1),))
    assert ledger.grant(ledger.life(0, 0), 41, wanted=2, batch_size=2, until=None) == (LeaseRange(700, 8, 10),)
    ledger.trained(0, 0, 4)
    ledger.trained(1, 0, 3)
    assert account(ledger, 700) | {"done": 6, "free": 0, "outstanding": 4, "twice": 0} == account(ledger, 700)
    assert account(ledger, 699) | {"done": 1, "free": 0} == account(ledger, 699)


# ---- any order ------------------------------------------------------------------------------------------------------------------


class World:
    """Learners that train in the order of their grants, some of which die; what each sample went through is written down here."""

    def __init__(self, num_samples: int, until: int) -> None:
        self.ledger, self.until, self.num_samples = ledger_of(num_samples), until, num_samples
        self.held: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.trained: dict[tuple[int, int], int] = {}
        self.reported: dict[tuple[int, int], int] = {}
        self.taken_back: Counter[tuple[int, int]] = Counter()
        self.numbers: dict[tuple[int, int], int] = {}
        self.lives = [0, 0, 0]
        self.times: Counter[tuple[int, int]] = Counter()
        self.known: Counter[tuple[int, int]] = Counter()
        self.late: list[tuple[str, tuple[int, int]]] = []

    def key(self, m: int) -> tuple[int, int]:
        key = (m, self.lives[m])
        self.held.setdefault(key, [])
        self.trained.setdefault(key, 0)
        self.reported.setdefault(key, 0)
        return key

    def ask(self, m: int, wanted: int, batch: int) -> None:
        key = self.key(m)
        self.numbers[key] = self.numbers.get(key, 0) + 1
        ranges = self.ledger.grant(self.ledger.life(*key), self.numbers[key], wanted=wanted, batch_size=batch, until=self.until)
        self.held[key] += [(r.epoch, i) for r in ranges for i in range(r.start, r.stop)]

    def train(self, m: int, count: int) -> None:
        key = self.key(m)
        done = self.held[key][self.trained[key] : self.trained[key] + count]
        self.trained[key] += len(done)
        self.times.update(done)

    def report(self, m: int) -> None:
        key = self.key(m)
        self.known.update(self.held[key][self.reported[key] : self.trained[key]])
        self.reported[key] = self.trained[key]
        self.ledger.trained(*key, self.trained[key])

    def end(self, m: int, how: str) -> None:
        key = self.key(m)
        if how == "leave":
            self.report(m)
        elif how == "counted":
            self.ledger.counted(*key, self.trained[key])
        self.ledger.end(*key, f"{m}.{key[1]}", said_last_word=how == "leave")
        if how == "late":
            self.late.append((f"{m}.{key[1]}", key))
        self.lives[m] += 1

    def take_back(self, m: int) -> None:
        key = self.key(m)
        self.taken_back[key] = len(self.held[key])
        self.ledger.reclaim(*key)

    def say_late(self) -> None:
        for session, key in self.late:
            self.ledger.late(session, self.trained[key])

    def check(self) -> None:
        for x in self.ledger.accounts():
            assert x["done"] + x["free"] + x["outstanding"] == self.num_samples
            free, done, before = self.ledger.state(x["epoch"])
            held = {
                i
                for key, items in self.held.items()
                for e, i in items[max(self.reported[key], self.taken_back[key]) :]
                if e == x["epoch"] and key[1] == self.lives[key[0]]
            }
            assert {i for a, b in done for i in range(a, b)} == {i for (e, i), n in self.known.items() if e == x["epoch"] and n}
            assert not any(set(range(a, b)) & held for a, b in free)
            assert sum(b - a for a, b in free) == self.num_samples - done.size - len(held - {i for a, b in done for i in range(a, b)})
            assert not any(done.overlap(a, b) for a, b in before)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 2), st.integers(1, 9), st.integers(1, 4)),
        st.tuples(st.just("train"), st.integers(0, 2), st.integers(1, 6)),
        st.tuples(st.just("report"), st.integers(0, 2)),
        st.tuples(st.just("take_back"), st.integers(0, 2)),
        st.tuples(st.just("end"), st.integers(0, 2), st.sampled_from(["leave", "counted", "late"])),
    ),
    max_size=60,
)


@given(schedule=steps, num_samples=st.integers(1, 23), until=st.integers(1, 3))
@settings(max_examples=120, deadline=None)
def test_every_epoch_is_trained_exactly_once_but_for_what_died_unreported_and_the_ledger_says_how_often(schedule, num_samples, until):
    world = World(num_samples, until)
    for name, *arguments in schedule:
        getattr(world, name)(*arguments)
        world.check()
    world.say_late()
    # The job goes on to its end with what is alive.
    for _ in range(num_samples * until + 1):
        for m in range(3):
            world.ask(m, 4, 2)
            world.train(m, 100)
            world.report(m)
    world.check()
    accounts = world.ledger.accounts()
    assert [x["epoch"] for x in accounts] == list(range(until))
    for x in accounts:
        assert (x["done"], x["free"], x["outstanding"]) == (num_samples, 0, 0)
        times = {i: n for (e, i), n in world.times.items() if e == x["epoch"]}
        assert set(times) == set(range(num_samples)), "a sample was lost"
        assert x["twice"] == sum(times.values()) - num_samples
        listed = {i for a, b in x["twice_ranges"] for i in range(a, b)}
        assert listed == {i for i, n in times.items() if n > 1}
    assert sum(world.ledger.samples(m) for m in range(3)) == sum(world.times.values())


@given(schedule=steps, num_samples=st.integers(1, 23))
@settings(max_examples=100, deadline=None)
def test_memory_follows_what_learners_hold_not_the_samples(schedule, num_samples):
    world = World(num_samples * 50, 3)
    for name, *arguments in schedule:
        getattr(world, name)(*arguments)
        spans = sum(len(part) for x in world.ledger.accounts() for part in world.ledger.state(x["epoch"]))
        assert spans <= 3 * len(schedule) + 9
