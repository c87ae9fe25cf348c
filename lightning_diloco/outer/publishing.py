"""From a merged fragment to what is published of it: the last part of a merge, for the syncer and for a replay alike.

A merge ends in one of three ways: running statistics are replaced by the merged values; a merge from which nobody trains on takes the
last step (`last_step`); any other one takes a step of the outer optimizer (`outer_step`). What comes out is encoded against the shadow.

Should a step leave float32's range, the fragment stays as it was, without momentum: NaN in the global model would be for good. Every
branch is decided by values that are the same on every machine, so whoever is given the same numbers ends at the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_diloco.outer import memory
from lightning_diloco.outer.codec import encode_publication, payload_bytes
from lightning_diloco.outer.optimizer import FragmentState, last_step, outer_step
from lightning_diloco.outer.spec import Fragment

__all__ = ["OuterStep", "Published", "is_finite", "take_step"]


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


def take_step(
    fragment: Fragment,
    before: FragmentState,
    merged: Tensor,
    step: OuterStep,
    merge_index: int,
    *,
    flat: Callable[[int], Tensor] = memory.flat,
    raw: Callable[[int], Tensor] = memory.raw,
) -> Published:
    """Put a merge's result into the fragment, and encode its publication.

    Args:
        fragment: of the layout.
        before: its state; stays as it is.
        merged: what `MergeAccumulator.result` returned, flat float32 [N].
        step: learning rate, momentum, wire dtype.
        merge_index: of the new state.
        flat: where new tensors' memory comes from, float32 of so many elements.
        raw: the same for payloads, uint8 of so many bytes.

    Raises:
        ConfigurationError: learning rate, momentum or wire dtype is outside its range.
        LocalProtocolError: sizes do not fit, or the share is outside [0, 1].
    """
    momentum = step.momentum
    if fragment.holds_values:
        momentum, stepped = 0.0, FragmentState.founded(merged)
    elif step.last_share is not None:
        momentum, stepped = 0.0, last_step(before, merged, lr=step.lr, share=step.last_share, allocate=flat)
    else:
        stepped = outer_step(before, merged, lr=step.lr, momentum=momentum, allocate=flat)
    wire_dtype = fragment.wire_dtype(step.wire_dtype)
    difference, shadow = _publication(stepped.theta, before.shadow, wire_dtype, flat, raw)
    is_taken = is_finite(shadow)
    if not is_taken:
        # Finite contributions can still overflow, with a huge outer learning rate for one.
        stepped = FragmentState.founded(before.theta)
        difference, shadow = _publication(before.theta, before.shadow, wire_dtype, flat, raw)
    state = replace(stepped, shadow=shadow, merge_index=merge_index)
    return Published(state=state, difference=difference, momentum=momentum, is_finite=is_taken)


def is_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN; exact, whatever the number of threads."""
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _publication(
    theta: Tensor, shadow: Tensor, wire_dtype: str, flat: Callable[[int], Tensor], raw: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    size = theta.numel()
    out = raw(payload_bytes(size, wire_dtype)), None if wire_dtype == "fp32" else flat(size)
    return encode_publication(theta, shadow, wire_dtype, out=out)
