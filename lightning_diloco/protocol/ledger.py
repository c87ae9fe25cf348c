"""The ledger: every token of every learner and fragment is merged, held, discarded with a reason, or still pending at its learner.

    tokens[m] = merged[m, p] + pending[m, p] + discarded[m, p]        in integers, for every learner m and fragment p

`tokens` is the learner's own total over its incarnations. What died with a process is computed as tokens - merged - held - discarded,
never by adding up what is believed lost (PROTOCOL.md section 11).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.protocol.identity import DiscardReason
from lightning_diloco.protocol.messages import Discarded

__all__ = ["Ledger"]


class Ledger:
    """Token accounts of one job.

    Args:
        num_fragments: P.
    """

    def __init__(self, num_fragments: int) -> None:
        self._num_fragments = num_fragments
        self._ended: dict[int, int] = {}
        self._current: dict[int, int] = {}
        self._merged: dict[tuple[int, int], int] = {}
        self._held: dict[tuple[int, int], int] = {}
        self._discarded: dict[tuple[int, int], int] = {}
        self._reported: dict[tuple[int, int, DiscardReason], int] = {}

    def trained(self, learner_id: int, tokens: int) -> None:
        """The present incarnation of this learner has trained so many tokens so far; a total never falls."""
        self._current[learner_id] = max(tokens, self._current.get(learner_id, 0))

    def tokens(self, learner_id: int) -> int:
        """The learner's total over all incarnations."""
        return self._ended.get(learner_id, 0) + self._current.get(learner_id, 0)

    def current(self, learner_id: int) -> int:
        """Tokens of its present incarnation."""
        return self._current.get(learner_id, 0)

    def learners(self) -> list[int]:
        """Everyone who ever trained a token, sorted."""
        return sorted(self._ended.keys() | self._current.keys())

    def hold(self, learner_id: int, fragment_id: int, tokens: int) -> None:
        """A contribution was accepted."""
        key = (learner_id, fragment_id)
        self._held[key] = self._held.get(key, 0) + tokens

    def merge(self, learner_id: int, fragment_id: int, tokens: int) -> None:
        """An accepted contribution is in a version."""
        key = (learner_id, fragment_id)
        held = self._held.get(key, 0) - tokens
        if held < 0:
            raise LocalProtocolError(f"Learner {learner_id}, fragment {fragment_id}: {tokens} tokens merged that were not held.")
        self._held[key] = held
        self._merged[key] = self._merged.get(key, 0) + tokens

    def unmerge(self, learner_id: int, fragment_id: int, tokens: int) -> None:
        """A version with so many tokens of this learner was lost, and the one before it holds again: they are open."""
        self._merged[learner_id, fragment_id] = self.merged(learner_id, fragment_id) - tokens

    def restate(self, fragment_id: int, merged: Mapping[int, int]) -> None:
        """The version that holds says itself how much of every learner is in it: nothing of those whom it does not name."""
        self._merged = {key: tokens for key, tokens in self._merged.items() if key[1] != fragment_id}
        for learner_id, tokens in merged.items():
            self._merged[learner_id, fragment_id] = tokens
            self._ended.setdefault(learner_id, 0)

    def release(self, learner_id: int, fragment_id: int, tokens: int) -> None:
        """Accepted contributions were lost before they were merged: they are open again."""
        key = (learner_id, fragment_id)
        self._held[key] = self._held.get(key, 0) - tokens

    def merged(self, learner_id: int, fragment_id: int) -> int:
        """Tokens of this learner in this fragment's present version."""
        return self._merged.get((learner_id, fragment_id), 0)

    def discarded(self, learner_id: int, fragment_id: int) -> int:
        """Tokens of this learner that this fragment will never see."""
        return self._discarded.get((learner_id, fragment_id), 0)

    def pending(self, learner_id: int, fragment_id: int) -> int:
        """Tokens whose fate is open: at the learner, on their way, or held."""
        return self.tokens(learner_id) - self.merged(learner_id, fragment_id) - self.discarded(learner_id, fragment_id)

    def report_discarded(self, learner_id: int, item: Discarded) -> int:
        """Take in a running total of the present incarnation; returns what is new in it."""
        key = (learner_id, item.fragment_id, item.reason)
        room = self.pending(learner_id, item.fragment_id) - self._held.get((learner_id, item.fragment_id), 0)
        # A report can only speak of what is still open; anything more would break the identity on a peer's word.
        new = min(max(item.tokens - self._reported.get(key, 0), 0), room)
        self._reported[key] = self._reported.get(key, 0) + new
        self._discard(learner_id, item.fragment_id, new)
        return new

    def end_incarnation(self, learner_id: int) -> Iterator[tuple[int, int]]:
        """Close the present incarnation's account; yields (fragment_id, tokens) of what went with it."""
        self.close(learner_id)
        for fragment_id in range(self._num_fragments):
            lost = self.pending(learner_id, fragment_id) - self._held.get((learner_id, fragment_id), 0)
            if lost > 0:
                self._discard(learner_id, fragment_id, lost)
                yield fragment_id, lost

    def close(self, learner_id: int) -> None:
        """The present incarnation's tokens are those of an ended one; what became of them is said elsewhere."""
        self._ended[learner_id] = self.tokens(learner_id)
        self._current.pop(learner_id, None)
        for key in [k for k in self._reported if k[0] == learner_id]:
            del self._reported[key]

    def discard(self, learner_id: int, fragment_id: int, reason: DiscardReason, tokens: int, *, is_reported: bool) -> None:
        """Tokens that will never be merged, as the tape has them; `is_reported`: a running incarnation's own total may be behind it."""
        if is_reported:
            key = (learner_id, fragment_id, reason)
            self._reported[key] = self._reported.get(key, 0) + tokens
        self._discard(learner_id, fragment_id, tokens)

    def _discard(self, learner_id: int, fragment_id: int, tokens: int) -> None:
        key = (learner_id, fragment_id)
        self._discarded[key] = self._discarded.get(key, 0) + tokens
