"""What a test reads from a `Pair`: published values, versions, and the tape."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.records import DiscardRecord, MergeRecord, Record
from tests.protocol.toy import Bag

if TYPE_CHECKING:
    from lightning_diloco.protocol.syncer import SyncerMachine


class Readings:
    """The reading half of `Pair`."""

    syncer: SyncerMachine
    history: list[dict[Version, Bag]]
    tape: list[Record]

    def shadow(self, fragment_id: int) -> Bag:
        """The published values of a fragment."""
        return self.history[fragment_id][self.syncer.job.currents[fragment_id].version]

    def version(self, fragment_id: int) -> int:
        """n of the published version."""
        return self.syncer.job.currents[fragment_id].version.n

    def of(self, *kinds: type) -> list[Any]:
        """Records of the tape of these types, in order."""
        return [r for r in self.tape if isinstance(r, kinds)]

    def merges(self, fragment_id: int | None = None) -> list[MergeRecord]:
        """Merges, of one fragment or of all."""
        return [r for r in self.of(MergeRecord) if fragment_id in (None, r.fragment_id)]

    def discarded(self, learner_id: int, fragment_id: int) -> dict[str, int]:
        """Tokens by reason, from the tape."""
        found: Counter[str] = Counter()
        for record in self.of(DiscardRecord):
            if (record.learner_id, record.fragment_id) == (learner_id, fragment_id):
                found[record.reason] += record.tokens
        return dict(found)
