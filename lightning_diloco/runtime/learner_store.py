"""A learner's tensors: bases, published copies, prepared adoptions, snapshots and the payloads that they become.

Ownership (DESIGN.md section 4): the training thread owns the parameters; the background thread owns everything here and computes in it.
The two meet only under the client's lock, and under it only references change hands: `take` gives a prepared adoption to the training
thread and makes the published copy the base; `set_prepared` puts one there. Tensors that were published or are a base are never changed
in place, so an encoder may still read a base that has been replaced.

Memory for N parameters: base 4 N, the outer momentum 4 N where checkpoints may ask for it. For every fragment of n parameters under way:
the snapshot that becomes its payload, the published copy, the prepared difference, and with momentum the new one, 4 n each, and what
arrives (2 n in bf16, 0.53 n in int4). A pool keeps all but the last from one to the next: 16 n for each fragment that is due in a step.
``benchmarks/memory.py`` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import (
    Encoded,
    FragmentView,
    Layout,
    blocks,
    buffer_of,
    bytes_of,
    check_payload,
    decode,
    decode_full,
    decode_publication,
    encode_in_place,
    flat,
    is_finite,
    pseudo_gradient,
    rebase_delta,
    reference,
)
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.device_copies import DeviceCopies
from lightning_diloco.runtime.global_state import GlobalState, MomentumTracker
from lightning_diloco.runtime.healing import Remedy
from lightning_diloco.runtime.memory import Pool

__all__ = ["Adoption", "Encode", "LearnerStore", "Receive", "Received"]


@dataclass(slots=True)
class Adoption:
    """A version that the training thread can put in place."""

    published: Tensor
    """The values, float32 [N] in host memory."""
    values: Tensor
    """The same where they are put from: on the parameters' device if it is these that are put there, as a rule."""
    delta_views: list[Tensor] | None
    """With rebase: the difference, on the parameters' device, split by tensor."""


@dataclass(frozen=True, slots=True)
class Encode:
    """A snapshot that waits for encoding; `base` is the one that the parameters stood on at its boundary."""

    fragment_id: int
    seq: int
    base: Tensor
    local: Tensor
    after: int
    wait: Callable[[], None] | None = None
    """Returns when the snapshot is there; None: it is."""

    def settle(self) -> None:
        """Background thread: wait until the snapshot is there."""
        if self.wait is not None:
            self.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Receive:
    """A version that has arrived."""

    fragment_id: int
    n: int
    """Its number."""
    crc: int
    """Of its float32 values."""
    is_full: bool
    """Whether the payload is these values, and not the difference to the version before."""
    base: Tensor | None
    """What the parameters stand on now, float32 [N]; None while joining: nothing is adopted then."""
    with_contribution: int
    """seq of the contribution that is in it (0: none)."""


@dataclass(frozen=True, slots=True)
class Received:
    """The same, ready to be put in place, with the outer momentum that goes with it (None: nobody asks for it)."""

    adoption: Adoption
    momentum: Tensor | None


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
        # A fragment on its way takes a snapshot, a version, its momentum and a difference, and gives as many back. As much again, of an
        # average one, is for those of another size, whose turn comes once in an interval.
        due = math.ceil(count / config.sync_interval_steps)
        self._copies = DeviceCopies.of(self.views)
        sizes = sorted(view.num_params for view in self.views)
        self._memory = Pool(4 * 4 * (sum(sizes[-due:]) + due * math.ceil(sum(sizes) / count)))
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
        values = flat(self.views[fragment_id].num_params)
        self.views[fragment_id].copy_to(values)
        self._base[fragment_id] = self._published[fragment_id] = values
        self._versions[fragment_id] = version
        return values

    # ---- publications (background thread) -----------------------------------------------------------------------------------

    def receive(self, job: Receive, payload: memoryview) -> Received | None:
        """Decode a version, and compute what its adoption has to do, so that the training thread only adds.

        All of it is done block by block, while a block is in the cache: memory is what takes the time.

        Args:
            job: what arrived.
            payload: its bytes.

        Returns:
            None if the result does not have its checksum, or is not finite: NaN in the parameters is for good.

        Raises:
            RemoteProtocolError: the payload has another length.
        """
        fragment_id, size = job.fragment_id, self.views[job.fragment_id].num_params
        dtype = "fp32" if job.is_full else self._dtype(fragment_id)
        check_payload(payload, size, dtype)
        version = self._memory.flat(size)
        before = version if job.is_full and job.base is None else self.published(fragment_id)
        delta = self._memory.flat(size) if self._is_rebase and job.base is not None else None
        momenta = self.momentum.momenta(fragment_id, self._versions[fragment_id], job.n) if job.base is not None else []
        momentum = self._memory.flat(size) if momenta else None
        crc, all_finite = 0, True
        for part in blocks(size):
            block, out = payload[bytes_of(part, dtype)], version[part]
            if job.is_full:
                decode_full(block, out.numel(), out=out)
            else:
                decode_publication(block, before[part], out.numel(), dtype, out=out)
            crc = crc32(out, crc)
            all_finite = all_finite and is_finite(out)
            if delta is not None and job.base is not None:
                sent = self._sent(fragment_id, job.with_contribution, part, out=delta[part])
                self._prepare(fragment_id, out, job.base[part], sent, delta[part])
            if momentum is not None:
                self.momentum.follow(fragment_id, part, before[part], out, momenta, out=momentum[part])
        if crc != job.crc or not all_finite:
            return None
        return Received(self._adoption(fragment_id, version, delta) if job.base is not None else Adoption(version, version, None), momentum)

    def _adoption(self, fragment_id: int, version: Tensor, delta: Tensor | None) -> Adoption:
        """What the training thread is given, on its device already."""
        if delta is None:
            return Adoption(version, self._copies.bring(version), None)
        values = self._copies.bring(version) if self.layout.fragments[fragment_id].holds_values else version
        return Adoption(version, values, self.views[fragment_id].split(self._copies.bring(delta)))

    def _prepare(self, fragment_id: int, published: Tensor, base: Tensor, sent: Tensor | None, delta: Tensor) -> None:
        if self.layout.fragments[fragment_id].holds_values:
            torch.sub(published, base if sent is None else sent, out=delta)
        else:
            rebase_delta(published, base, sent, out=delta)

    def set_joined(self, fragment_id: int, published: Tensor, version: int) -> None:
        """While joining: this version is the base."""
        self._base[fragment_id] = self._published[fragment_id] = published
        self._versions[fragment_id] = version

    def set_prepared(self, fragment_id: int, received: Received, version: int) -> None:
        """Under the lock: this version can be adopted."""
        self._published[fragment_id], self._prepared[fragment_id] = received.adoption.published, received.adoption
        self._versions[fragment_id] = version
        self.momentum.set(fragment_id, received.momentum)

    def drop_prepared(self, fragment_id: int) -> None:
        """Under the lock: what was received and not adopted is no version any more."""
        self._prepared[fragment_id], self._published[fragment_id] = None, self._base[fragment_id]

    def take(self, fragment_id: int) -> Adoption:
        """Under the lock: the training thread adopts this version; it is the base from here on."""
        adoption = self._prepared[fragment_id]
        if adoption is None:
            raise RuntimeError(f"fragment {fragment_id} has no prepared version")
        self._prepared[fragment_id] = None
        self._base[fragment_id] = adoption.published
        return adoption

    def adopt(self, fragment_id: int, adoption: Adoption, mode: Literal["rebase", "overwrite"]) -> None:
        """Training thread, outside of the lock: change the parameters."""
        view, delta_views = self.views[fragment_id], adoption.delta_views
        for tensor in [adoption.values, *(delta_views or [])[:1]]:  # the others are parts of the same
            self._copies.use(tensor)
        if delta_views is None or mode == "overwrite":
            view.copy_from(adoption.values)
        elif view.fragment.holds_values:
            view.move_to(adoption.values, delta_views)
        else:
            view.add_(delta_views)

    # ---- contributions ------------------------------------------------------------------------------------------------------

    def stage(self, fragment_id: int) -> Tensor:
        """Memory for the fragment's values at this moment, float32 [N]."""
        return self._memory.flat(self.views[fragment_id].num_params)

    def snapshot(self, job: Encode) -> Encode:
        """Training thread, outside of the lock: copy the fragment's values into what `stage` gave."""
        return replace(job, wait=self._copies.take(self.views[job.fragment_id], job.local))

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
        if not self.layout.fragments[fragment_id].holds_values:
            for part in blocks(local.numel()):
                pseudo_gradient(reference(base[part], self._sent(fragment_id, after, part)), local[part], out=local[part])
        payload = self._payloads[fragment_id, seq] = encode_in_place(local, self._dtype(fragment_id))
        return crc32(payload)

    def _sent(self, fragment_id: int, seq: int, part: slice, *, out: Tensor | None = None) -> Tensor | None:
        """A block of a contribution that is not resolved, as the syncer decodes it, float32; None if there is none."""
        payload, dtype = self._payloads.get((fragment_id, seq)), self._dtype(fragment_id)
        return None if payload is None else decode(payload[bytes_of(part, dtype)], part.stop - part.start, dtype, out=out)

    def remedy(self, fragment_id: int, keep_seq: int) -> Remedy:
        """Under the lock: from what a healed fragment is mended.

        Args:
            fragment_id: whose values.
            keep_seq: seq of the contribution on its way (0: none).
        """
        fragment = self.layout.fragments[fragment_id]
        payload = None if fragment.holds_values else self._payloads.get((fragment_id, keep_seq))
        sent = None if payload is None else Encoded.of(payload, fragment.num_params, self._dtype(fragment_id))
        return Remedy(fragment, self.base(fragment_id), sent)

    def payload(self, fragment_id: int, seq: int) -> memoryview:
        """The encoded contribution, to be sent (again)."""
        return buffer_of(self._payloads[fragment_id, seq])

    def forget(self, fragment_id: int, seq: int) -> None:
        """The contribution is resolved: its payload is not needed any more."""
        self._payloads.pop((fragment_id, seq), None)
