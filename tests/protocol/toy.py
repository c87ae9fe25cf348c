"""The toy model: bags of atoms, and one learner process that holds them."""

from __future__ import annotations

import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from lightning_diloco.protocol import actions as act
from lightning_diloco.protocol.learner import LearnerMachine
from lightning_diloco.protocol.messages import Publication
from lightning_diloco.protocol.records import MergeRecord, Record

Bag = Counter[int]
"""Atoms and their coefficients; none is 0."""

TOKENS = 10
"""Tokens of an inner step, if a test does not say otherwise."""


def bag_sum(*parts: tuple[int, Bag]) -> Bag:
    """The sum of sign times bag."""
    total: Bag = Counter()
    for sign, bag in parts:
        for atom, count in bag.items():
            total[atom] += sign * count
    return Counter({a: c for a, c in total.items() if c})


def bag_crc(bag: Bag) -> int:
    """A checksum of the values."""
    return zlib.crc32(repr(sorted(bag.items())).encode())


@dataclass
class Node:
    """One learner process: its machine, its parameters, and its ends of the four queues."""

    machine: LearnerMachine
    nonce: str
    theta: list[Bag]
    base: list[Bag]
    published: list[Bag]
    live: list[set[int]]
    """Per fragment: atoms of this life that were neither healed nor overwritten away."""
    made: set[int] = field(default_factory=set)
    """All atoms of this life."""
    references: dict[int, Bag] = field(default_factory=dict)
    payloads: dict[tuple[int, int], tuple[Bag, bool, float]] = field(default_factory=dict)
    to_encode: deque[act.Snapshot] = field(default_factory=deque)
    poisoned: set[int] = field(default_factory=set)
    loud: set[int] = field(default_factory=set)
    control_up: deque[bytes] = field(default_factory=deque)
    control_down: deque[bytes] = field(default_factory=deque)
    bulk_up: deque[tuple[str, Any, Any]] = field(default_factory=deque)
    bulk_down: deque[tuple[bytes, Any]] = field(default_factory=deque)
    joined: act.Joined | None = None
    stop_reason: str | None = None
    detail: str = ""
    has_left: bool = False
    is_dead: bool = False
    publication: tuple[Publication, Bag] | None = None

    @property
    def stage(self) -> str:
        return self.machine.state.stage

    @property
    def learner_id(self) -> int:
        return self.machine.state.learner_id

    @property
    def is_joined(self) -> bool:
        return self.stage == "joined"


def check_members(record: Record) -> Record:
    """A merge averages its members, so two parts of one process's work must not be among them: they would count half."""
    processes = [(m.learner_id, m.incarnation) for m in record.members] if isinstance(record, MergeRecord) else []
    assert len(set(processes)) == len(processes), f"merged with itself: {processes}"
    return record
