"""A learner's tensors: bases, published copies, prepared adoptions, staging buffers, decoded contributions.

Ownership (DESIGN.md section 4): the training thread owns the parameters; the background thread owns everything here and computes in it.
The two meet only under the client's lock, and under it only references change hands: `take` gives a prepared adoption to the training
thread and makes the published copy the base; `set_prepared` puts one there. Tensors that were published or are a base are never changed
in place, so an encoder may still read a base that has been replaced.

Memory for N parameters: base 4 N, the outer momentum 4 N where checkpoints may ask for it. For every fragment of n parameters under way:
the snapshot that becomes its payload, the published copy, the prepared difference, and with momentum the new one, 4 n each. A pool keeps
that memory from one to the next: 4 blocks of the largest fragment for each fragment that is due in a step. ``benchmarks/memory.py``
measures it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import (
    FragmentView,
    Layout,
    Pool,
    buffer_of,
    decode_full,
    decode_publication,
    encode_in_place,
    payload_values,
    pseudo_gradient,
    rebase_delta,
    reference,
)
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.global_state import GlobalState, MomentumTracker
from lightning_diloco.runtime.healing import Remedy

__all__ = ["Adoption", "LearnerStore"]


@dataclass(slots=True)
class Adoption:
    """A version that the training thread can put in place: the values, and (rebase) the difference split by tensor."""

    published: Tensor
    delta_views: list[Tensor] | None


class LearnerStore:
    """All host copies of one learner.

    Args:
        module: the user's module.
        layout: planned from it.
        config: of the job: how contributions and differences are encoded, and whether adoption adds a difference or overwrites.
        momentum: follows the syncer's momentum for checkpoints.
    """

    def __init__(self, module: nn.Module, layout: Layout, config: SyncConfig, *, momentum: MomentumTracker) -> None:
        self.layout = layout
        self.views = [FragmentView(module, fragment) for fragment in layout.fragments]
        self._wire_dtype = config.wire_dtype
        self._is_rebase = config.adopt == "rebase"
        count = len(layout.fragments)
        self._base: list[Tensor | None] = [None] * count
        self._published: list[Tensor | None] = [None] * count
        self._prepared: list[Adoption | None] = [None] * count
        self._payloads: dict[tuple[int, int], Tensor] = {}
        # A fragment on its way takes a snapshot, a version, its momentum and a difference, and gives as many back.
        largest = max(view.num_params for view in self.views)
        self._memory = Pool(4 * largest, keep=4 * math.ceil(count / config.sync_interval_steps))
        self._versions = [0] * count
        self.momentum = momentum

    def base(self, fragment_id: int) -> Tensor:
        """The last adopted version, float32 [N]."""
        base = self._base[fragment_id]
        if base is None:
            raise RuntimeError(f"fragment {fragment_id} has no base before the join")
        return base

    def published(self, fragment_id: int) -> Tensor:
        """The newest version received, float32 [N]."""
        published = self._published[fragment_id]
        return self.base(fragment_id) if published is None else published

    def _dtype(self, fragment_id: int) -> str:
        return self.layout.fragments[fragment_id].wire_dtype(self._wire_dtype)

    def global_state(self) -> GlobalState:
        """Under the lock: the published fragments of this moment with all that belongs to them."""
        published = tuple(self.published(i) for i in range(len(self.views)))
        return GlobalState(published=published, momentum=self.momentum.buffers, versions=tuple(self._versions))

    # ---- joining ------------------------------------------------------------------------------------------------------------

    def found(self, fragment_id: int, version: int) -> Tensor:
        """Take the module's present values as the founding base, which begins with this version."""
        flat = torch.empty(self.views[fragment_id].num_params)
        self.views[fragment_id].copy_to(flat)
        self._base[fragment_id] = self._published[fragment_id] = flat
        self._versions[fragment_id] = version
        return flat

    # ---- publications (background thread) -----------------------------------------------------------------------------------

    def decode(self, fragment_id: int, payload: memoryview, *, is_full: bool, crc: int) -> Tensor | None:
        """Decode a publication; None if the result does not have its checksum."""
        num_params = self.views[fragment_id].num_params
        new = self._memory.flat(num_params)
        if is_full:
            decode_full(payload, num_params, out=new)
        else:
            decode_publication(payload, self.published(fragment_id), num_params, self._dtype(fragment_id), out=new)
        return new if crc32(new) == crc else None

    def prepare(self, fragment_id: int, published: Tensor, base: Tensor, with_contribution: int) -> Adoption:
        """Compute what adoption has to do, so that the training thread only adds.

        Args:
            fragment_id: whose version this is.
            published: the version, float32 [N].
            base: the base that the parameters stand on now.
            with_contribution: seq of the contribution that is in it (0: none).
        """
        if not self._is_rebase:
            return Adoption(published, None)
        merged, delta = self._sent(fragment_id, with_contribution), self._memory.flat(published.numel())
        if self.layout.fragments[fragment_id].holds_values:
            torch.sub(published, base if merged is None else merged, out=delta)
        else:
            rebase_delta(published, base, merged, out=delta)
        return Adoption(published, self.views[fragment_id].split(delta))

    def set_joined(self, fragment_id: int, published: Tensor, version: int) -> None:
        """While joining: this version is the base."""
        self._base[fragment_id] = self._published[fragment_id] = published
        self._versions[fragment_id] = version

    def momentum_of(self, fragment_id: int, published: Tensor, version: int) -> Tensor | None:
        """The momentum that goes with this version, which is the next one; None if nobody asks for it."""
        before = self.published(fragment_id)
        return self.momentum.after(fragment_id, before, published, self._versions[fragment_id], version, allocate=self._memory.flat)

    def set_prepared(self, fragment_id: int, adoption: Adoption, version: int, momentum: Tensor | None) -> None:
        """Under the lock: this version can be adopted."""
        self._published[fragment_id], self._prepared[fragment_id] = adoption.published, adoption
        self._versions[fragment_id] = version
        self.momentum.set(fragment_id, momentum)

    def take(self, fragment_id: int) -> Adoption:
        """Under the lock: the training thread adopts this version; it is the base from here on."""
        adoption = self._prepared[fragment_id]
        if adoption is None:
            raise RuntimeError(f"fragment {fragment_id} has no prepared version")
        self._prepared[fragment_id] = None
        self._base[fragment_id] = adoption.published
        return adoption

    # ---- contributions ------------------------------------------------------------------------------------------------------

    def stage(self, fragment_id: int) -> Tensor:
        """Memory for the fragment's values at this moment, float32 [N]."""
        return self._memory.flat(self.views[fragment_id].num_params)

    def encode(self, fragment_id: int, seq: int, base: Tensor, local: Tensor, after: int) -> int:
        """Encode base minus local, relative to contribution `after` if there is one; of buffers the values. Keeps the payload.

        Args:
            fragment_id: whose.
            seq: of the contribution.
            base: what it starts from, float32 [N].
            local: what `stage` gave, with the values; it becomes the payload.
            after: seq of the part of this learner's work before it (0: none).

        Returns:
            crc of the payload.
        """
        wire_dtype = self._dtype(fragment_id)
        if not self.layout.fragments[fragment_id].holds_values:
            pseudo_gradient(reference(base, self._sent(fragment_id, after)), local, out=local)
        payload = self._payloads[fragment_id, seq] = encode_in_place(local, wire_dtype)
        return crc32(payload)

    def _sent(self, fragment_id: int, seq: int) -> Tensor | None:
        """The values of a contribution that is not resolved, as the syncer decodes them, in the wire's dtype; None if there is none."""
        payload = self._payloads.get((fragment_id, seq))
        return None if payload is None else payload_values(payload, self.views[fragment_id].num_params, self._dtype(fragment_id))

    def remedy(self, fragment_id: int, keep_seq: int) -> Remedy:
        """Under the lock: from what a healed fragment is mended.

        Args:
            fragment_id: whose values.
            keep_seq: seq of the contribution on its way (0: none).
        """
        sent = None if self.layout.fragments[fragment_id].holds_values else self._sent(fragment_id, keep_seq)
        return Remedy(self.base(fragment_id), None if sent is None else sent.to(torch.float32))

    def payload(self, fragment_id: int, seq: int) -> memoryview:
        """The encoded contribution, to be sent (again)."""
        return buffer_of(self._payloads[fragment_id, seq])

    def forget(self, fragment_id: int, seq: int) -> None:
        """The contribution is resolved: its payload is not needed any more."""
        self._payloads.pop((fragment_id, seq), None)
