"""The ledger: what became of every token, per learner and fragment, in exact integers.

For each learner m and fragment p of kind "parameters": tokens[m] = merged[m,p] + pending[m,p] + discarded[m,p].

- tokens[m]: the learner's own totals, the last of each incarnation, summed. A `counters` record (read from the file of a process that
  died) supersedes a report when it is larger.
- merged[m,p]: from the members of the merges that still exist (`participation`).
- discarded[m,p]: the sum of the discard records.
- pending[m,p]: the rest. It must not be negative.

While a job runs, a learner's contribution may be merged before the report that counts its tokens is on the tape; until the end record
the learner's tokens are therefore taken as the largest of its report and of merged + discarded over its fragments. After the end
everything has been reported, and a negative rest is a `LedgerError`.

One figure for the whole model weighs each fragment by its parameters: sum_p n_p * x_p / sum_p n_p, rounded down.

Steps lost: the inner steps whose tokens were discarded(`died`). A discard record names tokens, not steps, so they are converted at the rate
of the life that did them: the newest incarnation of that learner with tokens on the tape when the discard was recorded. Its steps lost
are its parameter-weighted discarded(`died`) tokens * its inner steps / its tokens, rounded to the nearest integer (half to even); with
batches of one size this is exact up to the rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

from lightning_diloco.errors import DiLoCoError
from lightning_diloco.metrics.participation import MergeLog
from lightning_diloco.protocol.identity import DiscardReason, FragmentInfo
from lightning_diloco.protocol.records import DiscardRecord

__all__ = ["REASONS", "FragmentAccount", "LedgerError", "TokenAccounts", "Totals"]

REASONS: tuple[DiscardReason, ...] = get_args(DiscardReason)
"""Every reason of discarding, in the order of the protocol."""


class LedgerError(DiLoCoError):
    """More tokens of a learner were merged and discarded than it has trained: the tape or the syncer is wrong."""


@dataclass(slots=True)
class Totals:
    """What one incarnation has done so far."""

    inner_steps: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class FragmentAccount:
    """Tokens of one fragment: merged + pending + discarded = tokens."""

    merged: int
    pending: int
    discarded: int


class TokenAccounts:
    """Folds totals and discards; takes the merged tokens from a `MergeLog`.

    Args:
        merges: the log of the same tape, fed by the caller.
    """

    def __init__(self, merges: MergeLog) -> None:
        self._merges = merges
        self._num_params: dict[int, int] = {}
        self._lives: dict[int, dict[int, Totals]] = {}
        self._discarded: dict[tuple[int, int, DiscardReason], int] = {}
        self._died: dict[tuple[int, int], int] = {}
        self.is_final = False
        """True after the end record: reports are complete, so the ledger is checked strictly."""

    def found(self, fragments: Iterable[FragmentInfo]) -> None:
        """Take the job's fragments; only those of kind "parameters" have accounts."""
        self._num_params = {f.fragment_id: f.num_params for f in fragments if f.kind == "parameters"}

    def report(self, learner_id: int, incarnation: int, inner_steps: int, tokens: int) -> None:
        """Take an incarnation's totals; they only grow, so the largest of all reports stands."""
        totals = self._lives.setdefault(learner_id, {}).setdefault(incarnation, Totals())
        totals.inner_steps = max(totals.inner_steps, inner_steps)
        totals.tokens = max(totals.tokens, tokens)

    def discard(self, record: DiscardRecord) -> None:
        """Count tokens that will never be merged."""
        num_params = self._num_params.get(record.fragment_id)
        if num_params is None:
            return
        key = (record.learner_id, record.fragment_id, record.reason)
        self._discarded[key] = self._discarded.get(key, 0) + record.tokens
        if record.reason == "died":
            self._count_died(record.learner_id, self._newest_life_with_tokens(record.learner_id), num_params * record.tokens)

    def correct(self, learner_id: int, incarnation: int, fragment_id: int, reason: DiscardReason, tokens: int) -> None:
        """Count tokens of one life that no record tells of; a negative number takes earlier ones back.

        Args:
            learner_id: whose.
            incarnation: of which life.
            fragment_id: of a fragment of parameters.
            reason: why they will never be merged.
            tokens: how many more.
        """
        key = (learner_id, fragment_id, reason)
        self._discarded[key] = self._discarded.get(key, 0) + tokens
        if reason == "died":
            self._count_died(learner_id, incarnation, self._num_params[fragment_id] * tokens)

    def _count_died(self, learner_id: int, incarnation: int, weighted_tokens: int) -> None:
        life = (learner_id, incarnation)
        self._died[life] = self._died.get(life, 0) + weighted_tokens

    def inner_steps(self, learner_id: int) -> int:
        """Inner steps of all lives of this learner."""
        return sum(t.inner_steps for t in self._lives.get(learner_id, {}).values())

    def tokens(self, learner_id: int) -> int:
        """Tokens of all lives of this learner; never below what is accounted for while the job runs (see the top of this file)."""
        reported = sum(t.tokens for t in self._lives.get(learner_id, {}).values())
        if self.is_final:
            return reported
        return max([reported, *(self._accounted(learner_id, p) for p in self._num_params)])

    def fragment(self, fragment_id: int, learner_ids: Iterable[int]) -> FragmentAccount:
        """The account of one fragment, summed over learners.

        Raises:
            LedgerError: a learner's pending tokens would be negative.
        """
        merged = pending = discarded = 0
        for learner_id in learner_ids:
            tokens, accounted = self.tokens(learner_id), self._accounted(learner_id, fragment_id)
            if accounted > tokens:
                raise LedgerError(
                    f"Learner {learner_id}, fragment {fragment_id}: merged + discarded = {accounted} tokens, but the learner has trained "
                    f"only {tokens}. merged + discarded must not exceed the learner's own total; keep the run directory and report it."
                )
            merged += self._merges.merged_tokens(learner_id, fragment_id)
            discarded += self._discarded_tokens(learner_id, fragment_id)
            pending += tokens - accounted
        return FragmentAccount(merged, pending, discarded)

    def weighted(self, per_fragment: dict[int, int]) -> int:
        """floor(sum_p n_p * x_p / sum_p n_p) of one number x_p per fragment; 0 without fragments."""
        total = sum(self._num_params.values())
        return sum(self._num_params[p] * x for p, x in per_fragment.items()) // total if total else 0

    def discarded_by_reason(self, learner_ids: Iterable[int]) -> dict[str, int]:
        """Parameter-weighted discarded tokens for every reason (0 where there was none)."""
        ids = list(learner_ids)
        return {
            reason: self.weighted({p: sum(self._discarded.get((m, p, reason), 0) for m in ids) for p in self._num_params})
            for reason in REASONS
        }

    def discarded(self, learner_id: int) -> int:
        """Parameter-weighted discarded tokens of one learner."""
        return self.weighted({p: self._discarded_tokens(learner_id, p) for p in self._num_params})

    def steps_lost(self) -> int:
        """Inner steps discarded(`died`), over all learners (see the top of this file)."""
        total_params, lost = sum(self._num_params.values()), 0
        for (learner_id, incarnation), weighted_tokens in self._died.items():
            life = self._lives.get(learner_id, {}).get(incarnation, Totals())
            if life.tokens:
                lost += round(Fraction(weighted_tokens * life.inner_steps, total_params * life.tokens))
        return lost

    def _accounted(self, learner_id: int, fragment_id: int) -> int:
        return self._merges.merged_tokens(learner_id, fragment_id) + self._discarded_tokens(learner_id, fragment_id)

    def _discarded_tokens(self, learner_id: int, fragment_id: int) -> int:
        return sum(self._discarded.get((learner_id, fragment_id, reason), 0) for reason in REASONS)

    def _newest_life_with_tokens(self, learner_id: int) -> int:
        lives = self._lives.get(learner_id, {})
        return max((i for i, totals in lives.items() if totals.tokens), default=-1)
