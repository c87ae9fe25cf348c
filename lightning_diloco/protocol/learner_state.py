"""What a learner keeps: of each fragment versions, counters, and at most one unresolved contribution; of itself the running totals.

Counters are kept as marks in the learner's running totals: steps since the base's content = inner_step - since_step. A contribution that
turns out to be in an adopted version moves the marks by exactly its steps and tokens, so what was done while it was on its way counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_diloco.protocol.identity import DataSpec, DiscardReason, MergedThrough, Version
from lightning_diloco.protocol.messages import Contribution, Envelope

__all__ = ["NOTHING", "FragmentState", "LearnerOptions", "LearnerState", "Pending", "Stage"]

NOTHING = MergedThrough(0, 0)
MAX_SETTLED = 32
"""So many versions of a fragment are more than a syncer can lose that takes the newest one that any learner shows."""


@dataclass(slots=True)
class Pending:
    """A contribution whose fate is not known here.

    `in_counters`: its work still stands in the parameters and counters (False after an overwrite). `is_mended`: the fragment was healed
    for `nonfinite` while this was on its way; if it is refused for the same reason, there is nothing left to heal.
    """

    header: Contribution
    in_counters: bool = True
    is_sent: bool = False
    is_acknowledged: bool = False
    is_mended: bool = False


@dataclass(frozen=True, slots=True)
class Content:
    """What a version consists of: the crc of its values, what of this learner is in it, and what of all learners."""

    crc: int = 0
    mine: MergedThrough = NOTHING
    through: Mapping[int, MergedThrough] = field(default_factory=dict)


EMPTY = Content()


@dataclass(slots=True)
class FragmentState:
    """One fragment as its learner sees it.

    Invariant: `base` <= `held`; `held` > `base` means that a version was received and not adopted. `settled`: (seq, tokens) of own
    contributions that were adopted, newest last, for the case that a syncer comes back without them. `is_handed_over`: the final
    contribution turned out to be merged, so nothing local is left. `discarded_in_place`: of the discarded tokens those whose work still
    stands in the parameters, because it was refused for its values while the learner leaves.
    """

    fragment_id: int
    next_seq: int = 1
    base: Version | None = None
    base_content: Content = EMPTY
    held: Version | None = None
    held_content: Content = EMPTY
    arriving: Version | None = None
    arriving_content: Content = EMPTY
    settled: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=MAX_SETTLED))
    since_step: int = 0
    since_tokens: int = 0
    unresolved: Pending | None = None
    final: Pending | None = None
    pulled_by: int | None = None
    heal: str | None = None
    is_missed: bool = False
    is_handed_over: bool = False
    discarded: dict[DiscardReason, int] = field(default_factory=dict)
    discarded_in_place: int = 0

    @property
    def is_behind(self) -> bool:
        """Whether a version was received (or is being decoded) and not adopted."""
        return self.arriving is not None or self.held != self.base

    @property
    def is_ready(self) -> bool:
        """Whether a version can be adopted at this boundary."""
        return self.arriving is None and self.held != self.base

    @property
    def merged_tokens(self) -> int:
        """Tokens of this life that are in the base."""
        kept = self.unresolved.header.tokens if self.unresolved is not None and not self.unresolved.in_counters else 0
        return self.since_tokens - (sum(self.discarded.values()) - self.discarded_in_place) - kept

    @property
    def tokens_on_hand(self) -> int:
        """Tokens of this life that are in the version received and not in the base."""
        seq = self.held_content.mine.seq if self.held != self.base else 0
        return sum(p.header.tokens for p in (self.unresolved, self.final) if p is not None and seq >= p.header.seq)

    def contains(self, merged: MergedThrough) -> int:
        """The seq of the unresolved contribution if a version with this merged_through has it in it, else 0."""
        if self.unresolved is not None and merged.seq >= self.unresolved.header.seq:
            return self.unresolved.header.seq
        return 0

    def take_seq(self) -> int:
        """The next sequence number."""
        seq = self.next_seq
        self.next_seq += 1
        return seq

    def discard(self, reason: DiscardReason, tokens: int) -> None:
        """Count tokens that will never be merged."""
        if tokens > 0:
            self.discarded[reason] = self.discarded.get(reason, 0) + tokens

    def settle(self) -> None:
        """The unresolved contribution is in the version now adopted: its work leaves the counters."""
        pending = self.unresolved
        if pending is not None:
            self._take_out(pending)
        self.unresolved = None

    def settle_final(self) -> None:
        """The unresolved contribution and the final one after it are in the version received: nothing local is left."""
        self.settle()
        if self.final is not None:
            self._take_out(self.final)
        self.final, self.is_handed_over = None, True

    def _take_out(self, pending: Pending) -> None:
        self.settled.append((pending.header.seq, pending.header.tokens))
        if pending.in_counters:
            self.since_step += pending.header.steps
            self.since_tokens += pending.header.tokens

    def accept_held(self) -> None:
        """What arrived is the newest version now."""
        self.held, self.held_content, self.arriving = self.arriving, self.arriving_content, None

    def put_in_place(self) -> None:
        """The newest version is the base from here on."""
        self.base, self.base_content = self.held, self.held_content

    def drop_held(self) -> bool:
        """The syncer has lost what was received and not adopted; returns whether there was anything."""
        was_behind, self.arriving = self.is_behind, None
        self.held, self.held_content = self.base, self.base_content
        return was_behind

    def roll_back(self, merged: MergedThrough) -> None:
        """The base is replaced by a version in which own work that it had is missing: that work is gone."""
        while self.settled and self.settled[-1][0] > merged.seq:
            self.discard("rollback", self.settled.pop()[1])

    def overwrite(self, inner_step: int, tokens: int) -> None:
        """The parameters were replaced: what was neither merged nor is held is gone."""
        kept = self.unresolved.header.tokens if self.unresolved is not None and self.unresolved.in_counters else 0
        self.discard("overwritten", tokens - self.since_tokens - kept)
        if self.unresolved is not None:
            self.unresolved.in_counters = False
        self.since_step, self.since_tokens = inner_step, tokens


Stage = Literal["new", "greeting", "founding", "receiving", "joined", "leaving", "left", "refused", "fenced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerOptions:
    """What a learner's process says of itself.

    Args:
        nonce: random name of the process, hexadecimal.
        num_fragments: P of its own layout.
        fingerprint: of its own layout.
        config: JSON of its `SyncConfig`.
        adopt: the adoption rule of that configuration.
        learner_id: the id it wants (None: any free one).
        founded_n: what a founder says in `Found.versions` (founding from a checkpoint).
        value_fragments: ids of the fragments that hold running statistics: their merges are left out of the figures, as in summary.json.
        data: what the job shall hand out in leases (None: each learner trains on its own part).
    """

    nonce: str
    num_fragments: int
    fingerprint: str
    config: bytes
    adopt: Literal["rebase", "overwrite"] = "rebase"
    learner_id: int | None = None
    token: str = ""
    takeover_token: str = ""
    device: str = ""
    batch_size: int = 0
    tokens_per_step: int = 0
    life: int = 0
    founded_n: tuple[int, ...] = ()
    value_fragments: tuple[int, ...] = ()
    data: DataSpec | None = None


class LearnerState:
    """A learner's state, shared by the parts of `LearnerMachine`; nothing here decides anything.

    Args:
        options: who this process is.
    """

    def __init__(self, options: LearnerOptions) -> None:
        self.options = options
        self.stage: Stage = "new"
        self.envelope = Envelope("", "", 0, 0)
        self.learner_id = -1
        self.joined_at_step = 0
        self.inner_step = 0
        self.tokens = 0
        self.batch_size = options.batch_size
        self.is_paused = False
        self.leave_reason: Literal["limit", "signal", "stopped"] | None = None
        self.said_leave: Literal["limit", "signal", "stopped"] | None = None
        self.wants_stop: str | None = None
        self.is_stopped = False
        self.fragments = [FragmentState(fragment_id=i) for i in range(options.num_fragments)]
        self.merges_seen = 0
        self.merges_with_us = 0
