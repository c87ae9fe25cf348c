"""From a merged fragment to what is published of it: the last part of a merge, for the syncer and for a replay alike.

A merge ends in one of three ways: running statistics are replaced by the merged values; a merge from which nobody trains on takes the
last step (`last_step`); any other one takes a step of the outer optimizer (`outer_step`). What comes out is encoded against the shadow.

Should a step leave float32's range, the fragment stays as it was, without momentum: NaN in the global model would be for good. Every
branch is decided by values that are the same on every machine, so whoever is given the same numbers ends at the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.outer import memory
from lightning_diloco.outer.codec import payload_bytes, publish_block
from lightning_diloco.outer.memory import BLOCK_ELEMENTS, blocks
from lightning_diloco.outer.merge import Merged
from lightning_diloco.outer.optimizer import FragmentState, last_step, new_step, step_block
from lightning_diloco.outer.spec import Fragment

__all__ = ["OuterStep", "Published", "take_step"]

Checksum = Callable[[Tensor, int], int]
"""Of a tensor's memory, given the checksum of what stands before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterStep:
    """What a step is taken with."""

    lr: float
    """Outer learning rate."""
    momentum: float
    """mu of this merge; see `momentum_at`."""
    last_share: float | None
    """None, or learners do not train on from the result: see `last_step`."""
    wire_dtype: str
    """How differences of parameters travel, "fp32", "bf16" or "int4"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a step made."""

    state: FragmentState
    """The fragment after it, the new shadow included."""
    difference: Tensor
    """The payload for whoever holds the shadow before it, uint8."""
    momentum: float
    """mu as it was used: 0 for values and for a last step."""
    is_finite: bool
    """False: the step was not taken."""
    crc: int
    """Checksum of the new shadow; 0 if none was asked for."""


def take_step(
    fragment: Fragment,
    before: FragmentState,
    merged: Merged | Tensor,
    step: OuterStep,
    merge_index: int,
    *,
    checksum: Checksum | None = None,
    flat: Callable[[int], Tensor] = memory.flat,
    raw: Callable[[int], Tensor] = memory.raw,
) -> Published:
    """Put a merge's result into the fragment, and encode its publication.

    Args:
        fragment: of the layout.
        before: its state; stays as it is.
        merged: what `MergeAccumulator.close` returned, or a flat float32 [N].
        step: learning rate, momentum, wire dtype.
        merge_index: of the new state.
        checksum: of the new shadow, computed where it is in the cache; None: it is not wanted.
        flat: where new tensors' memory comes from, float32 of so many elements.
        raw: the same for payloads, uint8 of so many bytes.

    Raises:
        ConfigurationError: learning rate, momentum or wire dtype is outside its range.
        LocalProtocolError: sizes do not fit, or the share is outside [0, 1].
    """
    merged = Merged.plain(merged) if isinstance(merged, Tensor) else merged
    wire_dtype, momentum, g = fragment.wire_dtype(step.wire_dtype), step.momentum, None
    if merged.num_elements != before.theta.numel():
        raise LocalProtocolError(f"A merge of {merged.num_elements} elements: the fragment has {before.theta.numel()}.")
    if fragment.holds_values:
        momentum, stepped = 0.0, FragmentState.founded(merged.whole())
    elif step.last_share is not None:
        momentum, stepped = 0.0, last_step(before, merged.whole(), lr=step.lr, share=step.last_share, allocate=flat)
    else:
        g, stepped = merged, new_step(before, lr=step.lr, momentum=momentum, allocate=flat)
    published = _Publication(before, stepped, wire_dtype, flat, raw)
    is_taken = published.run(g, step.lr, checksum)
    if not is_taken:
        # Finite contributions can still overflow, with a huge outer learning rate for one.
        published = _Publication(before, FragmentState.founded(before.theta), wire_dtype, flat, raw)
        published.run(None, step.lr, checksum)
    state = replace(published.after, shadow=published.shadow, merge_index=merge_index)
    return Published(state=state, difference=published.payload, momentum=momentum, is_finite=is_taken, crc=published.crc)


class _Publication:
    """The passes that are left when it is known what becomes of a fragment, as one, block by block, while a block is in the cache."""

    def __init__(
        self,
        before: FragmentState,
        after: FragmentState,
        wire_dtype: str,
        flat: Callable[[int], Tensor],
        raw: Callable[[int], Tensor],
    ) -> None:
        size = before.theta.numel()
        self.before, self.after, self.wire_dtype = before, after, wire_dtype
        self.payload = raw(payload_bytes(size, wire_dtype))
        self.shadow = after.theta if wire_dtype == "fp32" else flat(size)
        self.crc = 0
        self._size, self._flat = size, flat

    def run(self, g: Merged | None, lr: float, checksum: Checksum | None) -> bool:
        """Take the step with `g` (None: it was taken), encode, look at the new shadow; whether all of it is finite."""
        scratch = self._flat(min(self._size, BLOCK_ELEMENTS)) if g is not None else None
        for part in blocks(self._size):
            if g is not None and scratch is not None:
                step_block(self.before, self.after, g.part(part, scratch), part, lr=lr)
            if not publish_block(self.after.theta, self.before.shadow, self.payload, self.shadow, part, self.wire_dtype):
                return False
            if checksum is not None:
                self.crc = checksum(self.shadow[part], self.crc)
        return True
