"""Identities that every other part of the protocol speaks in (PROTOCOL.md section 1).

- A **version** of a fragment is (epoch, n), ordered in this way; founding is n = 0; n goes on over epochs.
- **merged_through** belongs to a version's state: for each learner the highest sequence number whose contribution is in the
  version and the tokens merged so far. It answers "is my contribution in this version?" without naming rounds.
- A **contribution** is identified by (learner_id, fragment_id, seq); seq grows over all incarnations of a learner, and one key is
  decided once.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

__all__ = [
    "STATIC_FRAGMENT",
    "ContributionKey",
    "Count",
    "DataSpec",
    "DiscardReason",
    "FragmentInfo",
    "LeaseRange",
    "LeaveReason",
    "MergedThrough",
    "Refusal",
    "Seconds",
    "Version",
]

Count = Annotated[int, Meta(ge=0, le=2**62)]
"""A non-negative integer as it may stand on the wire."""
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
"""A duration as it may stand on the wire."""

STATIC_FRAGMENT = -1
"""Stands for the static state (frozen parameters and buffers) where a fragment id is written on the tape."""

Refusal = Literal[
    "wrong_layout",
    "bad_checksum",
    "oversized",
    "stale_incarnation",
    "stale_epoch",
    "overlap",
    "conflict",
    "nonfinite",
    "norm",
    "unknown_session",
]
"""Why a contribution or a message was refused. `wrong_layout`, `bad_checksum` and `oversized` also close the session."""

DiscardReason = Literal["overwritten", "died", "fenced", "nonfinite", "norm", "rollback", "drain"]
"""Why tokens will never be merged."""

LeaveReason = Literal["limit", "signal", "stopped", "died", "fenced"]
"""Why an incarnation ended: its own limit, SIGTERM, the job's stop, death, or another process in its place."""


class Version(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Version of one fragment: (epoch, n), ordered lexicographically."""

    epoch: Count
    n: Count


class Origin(msgspec.Struct, frozen=True):
    """What a fragment was before a syncer that started again gave it a version of the new epoch.

    `momentum`: the version whose outer momentum it has; None: it began at zero. `is_recalled`: its values came from a learner.
    """

    version: Version
    momentum: Version | None
    is_recalled: bool = False


class MergedThrough(msgspec.Struct, frozen=True, array_like=True):
    """What of one learner is in a version: its highest merged seq and the tokens merged so far."""

    seq: Count
    tokens: Count


class ContributionKey(msgspec.Struct, frozen=True, array_like=True):
    """Identity of a contribution; decided once."""

    learner_id: Count
    fragment_id: Count
    seq: Count


class FragmentInfo(msgspec.Struct, frozen=True):
    """What the rules need to know of a fragment; tensors and slices are `outer`'s business."""

    fragment_id: Count
    num_params: Annotated[int, Meta(ge=1, le=2**62)]
    kind: Literal["parameters", "buffers"] = "parameters"


class LeaseRange(msgspec.Struct, frozen=True, array_like=True):
    """Positions from `start` to below `stop` of one epoch's permutation."""

    epoch: Count
    start: Count
    stop: Count


class DataSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The data set that a job hands out in leases.

    Args:
        num_samples: of the whole data set.
        is_shuffled: whether an epoch's positions are a permutation of the samples, or their own order.
        seed: of the permutations; the founder's is the job's.
        first_epoch: number of the first epoch (a fit that goes on from a checkpoint begins later).
    """

    num_samples: Annotated[int, Meta(ge=1, le=2**53)]
    is_shuffled: bool
    seed: Count = 0
    first_epoch: Count = 0
