"""Merges, their members, and the share of merges that each learner took part in.

Only fragments of kind "parameters" count; merges of buffers are ignored. A merge that a restart of the syncer rolled back (its
version is above the one that the restart goes on from) is taken out again, so every figure speaks of the versions that exist. A merge that
a full disk kept off the tape is in no figure of members and shares; its tokens count as merged from the next restart on, whose record says
what is in the versions.

A learner is *eligible* for a merge if it was joined, not paused and had work when it closed. A member is always eligible: its work is in
the merge, even if it was carried there after the learner had left. So participation = rounds merged / rounds eligible is in [0, 1].

References:
    Decoupled DiLoCo, arXiv 2604.21428: minimum quorum and participation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_diloco.protocol.identity import FragmentInfo, MergedThrough
from lightning_diloco.protocol.records import MergeRecord

__all__ = ["MergeLog"]


@dataclass(frozen=True, slots=True)
class _Merge:
    n: int
    tokens: dict[int, int]
    eligible: tuple[int, ...]


class MergeLog:
    """The merges that are part of the present versions, with running counts.

    Memory grows by one small entry a merge, because a restart may take merges back.
    """

    def __init__(self) -> None:
        self._fragments: dict[int, FragmentInfo] = {}
        self._merges: dict[int, list[_Merge]] = {}
        self._merged: dict[tuple[int, int], int] = {}
        self._rounds_merged: dict[int, int] = {}
        self._rounds_eligible: dict[int, int] = {}
        self.num_merges = 0
        """Merges of parameter fragments."""
        self.num_members = 0
        """Learners in them, summed over merges; a learner with two contributions in one merge is one member."""

    def found(self, fragments: Iterable[FragmentInfo]) -> None:
        """Take the job's fragments; merges of any other fragment, or of buffers, are ignored."""
        self._fragments = {f.fragment_id: f for f in fragments if f.kind == "parameters"}

    def merge(self, record: MergeRecord) -> None:
        """Count one merge."""
        if record.fragment_id not in self._fragments:
            return
        tokens: dict[int, int] = {}
        for member in record.members:
            tokens[member.learner_id] = tokens.get(member.learner_id, 0) + member.tokens
        eligible = tuple(sorted({*record.eligible, *tokens}))
        merge = _Merge(record.version.n, tokens, eligible)
        self._merges.setdefault(record.fragment_id, []).append(merge)
        self._count(record.fragment_id, merge, 1)

    def restart(self, versions: Mapping[int, int], through: Mapping[int, Mapping[int, MergedThrough]] | None = None) -> None:
        """Take out what the restart rolled back, and count what the versions hold though their merges are on no tape.

        Args:
            versions: n of the version gone on from, by fragment id.
            through: what is merged in it of each learner, by fragment id, and nothing of the others; None: the record does not say.
        """
        for fragment_id, n in versions.items():
            merges = self._merges.get(fragment_id, [])
            while merges and merges[-1].n > n:
                self._count(fragment_id, merges.pop(), -1)
        told = {p: learners for p, learners in (through or {}).items() if p in self._fragments}
        self._merged = {key: tokens for key, tokens in self._merged.items() if key[1] not in told}
        for fragment_id, learners in told.items():
            self._merged |= {(learner_id, fragment_id): merged.tokens for learner_id, merged in learners.items()}

    def merged_tokens(self, learner_id: int, fragment_id: int) -> int:
        """Tokens of this learner that are in the present version of this fragment."""
        return self._merged.get((learner_id, fragment_id), 0)

    def mean_members(self) -> float | None:
        """Members per merge, or None before the first one."""
        return self.num_members / self.num_merges if self.num_merges else None

    def rounds_merged(self, learner_id: int) -> int:
        """Merges that contain a contribution of this learner."""
        return self._rounds_merged.get(learner_id, 0)

    def rounds_eligible(self, learner_id: int) -> int:
        """Merges that this learner could have been in."""
        return self._rounds_eligible.get(learner_id, 0)

    def participation(self, learner_id: int) -> float | None:
        """Rounds merged / rounds eligible, in [0, 1], or None if the learner was never eligible."""
        eligible = self.rounds_eligible(learner_id)
        return self.rounds_merged(learner_id) / eligible if eligible else None

    def _count(self, fragment_id: int, merge: _Merge, sign: int) -> None:
        self.num_merges += sign
        self.num_members += sign * len(merge.tokens)
        for learner_id, tokens in merge.tokens.items():
            self._rounds_merged[learner_id] = self.rounds_merged(learner_id) + sign
            self._merged[learner_id, fragment_id] = self.merged_tokens(learner_id, fragment_id) + sign * tokens
        for learner_id in merge.eligible:
            self._rounds_eligible[learner_id] = self.rounds_eligible(learner_id) + sign
