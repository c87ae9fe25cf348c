"""Inner optimizer state from and for peers, on a learner's side.

A learner that joins a job which has been trained for a while, and whose run directory has no inner optimizer state or an old one, asks the
syncer for that of a healthy peer, a fragment at a time. Nothing waits for it: the learner trains with a fresh optimizer meanwhile, and
goes on with that if nobody answers.

Three threads meet here, by handing over references:

    training thread    `ask`; `arrived` and `took` at its boundaries; `next_wanted`, and `give` if it has nothing
    saver's thread     `give`, with a state that it has packed
    background thread  everything else: asks, looks at what comes, sends what is given

Bounds: one state is on its way to this learner, and the next one is asked for when it is in place; one is on its way from it, and
at most `MAX_WANTED` wait for the training thread's next boundary.

What arrives is hostile until it is validated: the size before memory is given, then format and checksum, job, optimizers, fragment,
version, and numbers that no optimizer has (a negative second moment or step count). Moments that are not finite begin at zero. Names,
shapes and dtypes are compared with the optimizer's own state when it is put in place (`strategy.peer_state`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.outer import Layout, buffer_of, global_id
from lightning_diloco.outer.spec import Fragment
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import Message, PeerState, PeerStateRequest, PeerStateWanted
from lightning_diloco.runtime.complaints import printable
from lightning_diloco.runtime.rejoin import InnerState, unpack

__all__ = ["PeerStates", "max_state_bytes"]

_log = logging.getLogger(__name__)

AGAIN_S = 10.0
"""A request that is not answered is said again after so long: it, or the answer, may be lost."""
MAX_ASKED = 12
"""And given up after so many."""
MAX_USELESS = 3
"""Answers of no use, for one fragment: each comes from another peer, if there are others."""
MAX_WANTED = 4
_NEVER_NEGATIVE: Final = frozenset({"step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "row_var", "col_var", "variance"})
"""State entries whose square root is taken, or that count."""


def max_state_bytes(fragment: Fragment) -> int:
    """The most that a packed state of this fragment may have: four float32 values per parameter, and room for names."""
    return 16 * fragment.num_params + 65536 + sum(4096 + 16 * len(part.name) for part in fragment.slices)


class PeerStates:
    """What one learner takes from its peers and gives to them.

    Args:
        layout: of this learner; of a shard its part. Outside of messages fragments have the numbers of the whole.
        send: sends a control message to the syncer.
        send_payload: sends a payload to the syncer; returns the transfer's id.
        wake: makes the background thread look.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        send: Callable[[Message], object],
        send_payload: Callable[[Message, memoryview], int],
        wake: Callable[[], None],
    ) -> None:
        self._layout, self._send, self._send_payload, self._wake = layout, send, send_payload, wake
        self.can_give = False
        """Whether somebody looks at `next_wanted` at every boundary."""
        self.is_asking = False
        self.arrived: InnerState | None = None
        """A fragment's state that can be put in place; then `took` is to be called."""
        self.num_taken = 0
        self._lineage, self._optimizers = "", tuple[str, ...]()
        self._newest: Mapping[int, Version | None] = {}
        self._left = deque[int]()
        self._fragment: int | None = None
        self._asked_s, self._num_asked, self._num_useless, self._attempt = 0.0, 0, 0, 0
        self._wanted = deque[PeerStateWanted]()
        self._given = deque[tuple[PeerStateWanted, Tensor | None]]()
        self._is_giving = False
        self._transfer_id: int | None = None

    # ---- taking -------------------------------------------------------------------------------------------------------------

    def ask(self, newest: Mapping[int, Version | None], *, lineage: str, optimizers: tuple[str, ...]) -> None:
        """Begin to ask for these fragments, in order.

        Args:
            newest: the version of the state that is held, by fragment; only a newer one is taken.
            lineage: of the job.
            optimizers: class names of the learner's optimizers.
        """
        self._newest, self._lineage, self._optimizers = newest, lineage, optimizers
        self._left.extend(newest)
        self.is_asking = True
        self._wake()

    def took(self, *, is_useful: bool) -> None:
        """What arrived is in place, or is of no use; on the training thread."""
        self._answered(is_useful=is_useful)
        self.arrived = None
        self._wake()

    def stop(self) -> None:
        """Ask for nothing any more."""
        self.is_asking = False
        self.arrived = None

    def accepts(self, header: PeerState, total_bytes: int) -> bool:
        """Whether memory may be given to a state that is offered."""
        fragment_id = self._global(header.fragment_id)
        is_due = self.is_asking and self.arrived is None and fragment_id == self._fragment
        return is_due and total_bytes <= max_state_bytes(self._at(fragment_id))

    def take(self, header: PeerState, payload: memoryview) -> None:
        """Look at a state that is complete."""
        if not self.accepts(header, len(payload)):
            return
        state = None
        if len(payload):
            try:
                state = unpack(payload)
                self._check(state)
            except RemoteProtocolError as error:
                _log.warning("A peer's inner optimizer state of fragment %d is not used: %s", header.fragment_id, printable(str(error)))
                state = None
        if state is None:
            self._answered(is_useful=False)
        else:
            self.arrived = state if self.is_asking else None

    def _check(self, state: InnerState) -> None:
        """Whether it is one of this job, for these optimizers, newer than what is held, and sound; what is not finite begins at zero."""
        fragment_id, newest = state.fragment_id, self._newest.get(state.fragment_id)
        if (state.lineage, state.optimizers, fragment_id) != (self._lineage, self._optimizers, self._fragment):
            raise RemoteProtocolError("wrong_layout", "it belongs to another job, optimizer or fragment")
        if newest is not None and state.version <= newest:
            raise RemoteProtocolError("wrong_layout", f"its version {state.version.n} is no newer than the {newest.n} that is held")
        for name, number in state.numbers.items():
            if number is not None and (abs(number) > 2**53 or (number < 0 and _entry(name) in _NEVER_NEGATIVE)):
                raise RemoteProtocolError("wrong_layout", f"{name!r:.200} is {number}")
        for name, tensor in state.tensors.items():
            if torch.is_floating_point(tensor) and not bool(torch.isfinite(tensor).all()):
                tensor.zero_()
            if _entry(name) in _NEVER_NEGATIVE and bool((tensor < 0).any()):
                raise RemoteProtocolError("wrong_layout", f"{name!r:.200} has negative values")

    def _answered(self, *, is_useful: bool) -> None:
        self._num_asked = 0
        if is_useful:
            self.num_taken += 1
        else:
            self._attempt += 1
            self._num_useless += 1
        if is_useful or self._num_useless >= MAX_USELESS:
            self._num_useless, self._fragment = 0, None
            if not self.num_taken:
                # One fragment is like another: who has none that fits has none at all.
                self._left.clear()

    def _ask_on(self, now_s: float) -> None:
        if not self.is_asking or self.arrived is not None:
            return
        if self._fragment is None:
            if not self._left:
                self.is_asking = False
                return
            self._fragment = self._left.popleft()
        elif self._num_asked and now_s < self._asked_s + AGAIN_S:
            return
        if self._num_asked >= MAX_ASKED:
            self.is_asking = False
            return
        self._asked_s, self._num_asked = now_s, self._num_asked + 1
        self._send(PeerStateRequest(fragment_id=self._local(self._fragment), optimizers=self._optimizers, attempt=self._attempt))

    # ---- giving -------------------------------------------------------------------------------------------------------------

    def heard(self, wanted: PeerStateWanted) -> None:
        """A learner wants this one's state of a fragment. Who has just joined itself has none that is worth it."""
        if not self.can_give or self.is_asking or wanted.fragment_id >= len(self._layout.fragments):
            if len(self._given) < MAX_WANTED:
                self._given.append((self._named(wanted), None))
        elif len(self._wanted) < MAX_WANTED:
            self._wanted.append(self._named(wanted))

    def next_wanted(self) -> PeerStateWanted | None:
        """On the training thread: what is to be copied aside at this boundary, and then given; None while one is on its way."""
        if not self._wanted or self._is_giving:
            return None
        self._is_giving = True
        return self._wanted.popleft()

    def give(self, wanted: PeerStateWanted, packed: Tensor | None) -> None:
        """Answer with a packed state, or with None; from any thread."""
        is_too_large = packed is not None and packed.numel() > max_state_bytes(self._at(wanted.fragment_id))
        if packed is None or is_too_large:
            packed, self._is_giving = None, False
        self._given.append((wanted, packed))
        self._wake()

    def ended(self, transfer_id: int) -> None:
        """A transfer has ended, delivered or not."""
        if transfer_id == self._transfer_id:
            self._transfer_id, self._is_giving = None, False

    def tick(self, now_s: float) -> None:
        """Send what is given, and ask for what is missing."""
        while self._given:
            wanted, packed = self._given.popleft()
            header = PeerState(ticket=wanted.ticket, fragment_id=self._local(wanted.fragment_id))
            transfer_id = self._send_payload(header, memoryview(b"") if packed is None else buffer_of(packed))
            if packed is not None:
                self._transfer_id = transfer_id
        self._ask_on(now_s)

    # ---- numbers of fragments -----------------------------------------------------------------------------------------------

    def _global(self, fragment_id: int) -> int:
        return global_id(fragment_id, self._layout.shard, self._layout.num_shards)

    def _local(self, fragment_id: int) -> int:
        return fragment_id // self._layout.num_shards

    def _at(self, fragment_id: int) -> Fragment:
        return self._layout.fragments[self._local(fragment_id)]

    def _named(self, wanted: PeerStateWanted) -> PeerStateWanted:
        return PeerStateWanted(ticket=wanted.ticket, fragment_id=self._global(wanted.fragment_id), optimizers=wanted.optimizers)


def _entry(name: str) -> str:
    return name.rpartition("/")[2]
