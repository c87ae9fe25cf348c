"""What all messages share: frozen, tagged with the class name, closed, validated when decoded; and their field types."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from lightning_diloco.protocol.identity import Count, LeaseRange, Seconds

__all__ = ["MAX_FRAGMENTS", "Again", "Kinds", "Message", "Name", "PerFragment", "Ranges", "Sentence", "StepTimes"]

Name = Annotated[str, Meta(max_length=200)]
Kinds = Annotated[tuple[Name, ...], Meta(max_length=64)]
"""Class names of a learner's optimizers, in order."""
Sentence = Annotated[str, Meta(max_length=2000)]
MAX_FRAGMENTS = 100_000
PerFragment = Annotated[tuple[Count, ...], Meta(max_length=MAX_FRAGMENTS)]
Ranges = Annotated[tuple[LeaseRange, ...], Meta(max_length=256)]
Again = Annotated[tuple[tuple[Count, Count], ...], Meta(max_length=64)]
"""Per epoch, samples that were trained without a lease."""
StepTimes = Annotated[tuple[Seconds, ...], Meta(max_length=8192)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages; the tag is the class name."""
