"""A `Pair` whose training threads look for poisoned fragments while a heal is due, as `runtime/healing.py` does."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import msgspec

from lightning_diloco.protocol import actions as act
from lightning_diloco.protocol import events as ev
from tests.protocol.pair import Pair
from tests.protocol.toy import Bag, Node, bag_sum

__all__ = ["MendingPair"]


class MendingPair(Pair):
    """Boundaries and leaves name the poisoned fragments; a heal keeps what is on its way.

    `is_blind`: nobody looks, so a heal for `nonfinite` waits. `dice`: it is blind, and slow to encode, now and then. `heals`: every heal.
    """

    def __init__(self, *, dice: Random | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.is_blind = False
        self.heals: list[act.Heal] = []
        self._dice = dice
        self._refusable: dict[tuple[str, int, int], Bag] = {}

    def feed(self, node: Node, event: Any) -> None:
        """As in `Pair`, but the training thread looks at the parameters before it speaks."""
        if not isinstance(event, ev.Boundary | ev.LeaveRequested):
            return super().feed(node, event)
        is_due = any(f.heal == "nonfinite" for f in node.machine.state.fragments)
        looks = is_due and not self.is_blind and not self._happens(0.2)
        self.manual_encode = self.manual_encode or self._happens(0.5)
        super().feed(node, msgspec.structs.replace(event, poisoned=tuple(sorted(node.poisoned)) if looks else None))
        self.manual_encode = self.manual_encode and self._dice is None

    def _happens(self, chance: float) -> bool:
        return self._dice is not None and self._dice.random() < chance

    def encode(self, node: Node) -> None:
        """The background thread does not know yet that a snapshot was withdrawn: it encodes it in vain."""
        for snapshot in [s for s in node.to_encode if (s.fragment_id, s.seq) not in node.payloads]:
            node.to_encode.remove(snapshot)
            self.feed(node, ev.Encoded(fragment_id=snapshot.fragment_id, seq=snapshot.seq, crc=0))
        super().encode(node)

    def settle(self) -> None:
        """As in `Pair`, and every background thread catches up."""
        super().settle()
        while late := [n for n in self.nodes if n.to_encode and not n.is_dead]:
            for node in late:
                self.encode(node)
            super().settle()

    def _perform_learner(self, node: Node, action: act.LearnerAction) -> None:
        if isinstance(action, act.Heal):
            self._mend(node, action)
        else:
            if isinstance(action, act.Forget):
                self._strike_out(node, self._refusable.pop((node.nonce, action.fragment_id, action.seq), Counter()), action.fragment_id)
            super()._perform_learner(node, action)

    def _mend(self, node: Node, action: act.Heal) -> None:
        i = action.fragment_id
        kept, is_finite, norm = node.payloads[i, action.keep_seq] if action.keep_seq else (Counter(), True, 1.0)
        node.theta[i] = bag_sum((1, node.base[i]), (1, kept))
        node.live[i] = set(kept)
        node.poisoned.discard(i)
        if norm == 1.0:
            node.loud.discard(i)
        if not is_finite:
            # The parameters are the base. The toy keeps the work of what will be refused until then, because the counters do as well.
            self._refusable[node.nonce, i, action.keep_seq] = kept
        self.heals.append(action)

    def _strike_out(self, node: Node, kept: Bag, fragment_id: int) -> None:
        node.theta[fragment_id] = bag_sum((1, node.theta[fragment_id]), (-1, kept))
        node.live[fragment_id] -= set(kept)

    def _adopt(self, node: Node, action: act.Adopt) -> None:
        super()._adopt(node, action)
        if action.mode == "overwrite":
            for key in [k for k in self._refusable if k[:2] == (node.nonce, action.fragment_id)]:
                del self._refusable[key]
