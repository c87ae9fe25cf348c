"""What the syncer says to a learner: control messages, and the headers of its payloads."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lightning_diloco.config import MAX_SHARDS
from lightning_diloco.protocol.identity import Count, DataSpec, MergedThrough, Refusal, Seconds, Version
from lightning_diloco.protocol.learner_messages import PeerState
from lightning_diloco.protocol.message_base import Kinds, Message, Name, PerFragment, Ranges, Sentence

__all__ = [
    "ID_IN_USE",
    "Describe",
    "Fenced",
    "FromSyncer",
    "JoinRefused",
    "LeaseGrant",
    "Left",
    "PeerStateWanted",
    "Pong",
    "Publication",
    "Pull",
    "Recall",
    "Released",
    "Resolved",
    "SendState",
    "ShardAddress",
    "Sharded",
    "StaticState",
    "Stop",
    "SyncerHeader",
    "Welcome",
    "WhoAreYou",
]


class ShardAddress(msgspec.Struct, frozen=True):
    """Where a set of fragments is served; no ids means all of them."""

    bulk_endpoint: Name
    fragment_ids: PerFragment = ()


# ---- syncer to learner, control ---------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, kw_only=True):
    """Answer to `Hello`.

    `role`: "waiting" (another founds; a second Welcome follows), "founder" (send `Found`), "joiner" (full transfers follow),
    "member" (the founder's fragments are in; it holds everything), "resumed" (same process as before).
    `next_seq` holds the next sequence number per fragment; `job_step` the median inner step of the active learners; `data` what is handed
    out in leases, with the founder's seed.
    """

    role: Literal["waiting", "founder", "joiner", "member", "resumed"]
    learner_id: Count
    incarnation: Count
    shards: tuple[ShardAddress, ...] = ()
    job_step: Count = 0
    next_seq: PerFragment = ()
    static_crc: Count = 0
    static_bytes: Count = 0
    data: DataSpec | None = None


ID_IN_USE = "id_in_use"
"""Reason of a `JoinRefused` that may not hold for long: the process that has the id may be dead."""


class JoinRefused(Message, frozen=True, kw_only=True):
    """The process may not join; it ends with the sentence."""

    reason: Name
    detail: Sentence


class WhoAreYou(Message, frozen=True, kw_only=True):
    """The session is not known here: say `Hello` again."""


class Sharded(Message, frozen=True, kw_only=True):
    """Answer to a `Hello` for the whole model, of a syncer that has several shards: say it to each, for its part of the model.

    The one that answers is the lead, shard 0; these are the control endpoints of the others, by number.
    """

    endpoints: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=MAX_SHARDS - 1)]


class SendState(Message, frozen=True, kw_only=True):
    """The founder's description is accepted and memory is ready: the payloads may come (control and bulk keep no order)."""


class Pull(Message, frozen=True, kw_only=True):
    """Asks for a contribution to this round, at the next inner-step boundary."""

    fragment_id: Count
    round_id: Count


class Recall(Message, frozen=True, kw_only=True):
    """A syncer that starts again asks for a published version that it has lost: answered by `HeldFragment`, to these addresses."""

    fragment_id: Count
    version: Version
    shards: tuple[ShardAddress, ...] = ()


class Describe(Message, frozen=True, kw_only=True):
    """A syncer of whose run directory nothing is left asks what the job is: answered by `Description`.

    `with_static`: and by the static state, as `FoundingStatic` to these addresses.
    """

    with_static: bool = False
    shards: tuple[ShardAddress, ...] = ()


class Released(Message, frozen=True, kw_only=True):
    """The round ended; an unanswered pull of it needs no answer. Never ends a contribution."""

    fragment_id: Count
    round_id: Count


class Resolved(Message, frozen=True, kw_only=True):
    """The fate of one contribution, sent for refusals, final contributions and copies."""

    fragment_id: Count
    seq: Count
    outcome: Literal["held", "merged", "refused", "unknown"]
    reason: Refusal | None = None


class Fenced(Message, frozen=True, kw_only=True):
    """Another process holds this learner's id: end with a sentence, never rejoin."""

    detail: Sentence


class Stop(Message, frozen=True, kw_only=True):
    """The job ends for all: leave at the next boundary."""

    reason: Name


class Left(Message, frozen=True, kw_only=True):
    """The leave is complete; `versions` are the published ones at this moment (n per fragment)."""

    versions: PerFragment


class Pong(Message, frozen=True, kw_only=True):
    """Answer to `Ping`; with the number of gaps between steps of this incarnation that are on the tape (0: it is no member).

    `target_step_s`: the time that a step is to take under ``batch_sizing="auto"`` (0: not known yet).
    """

    number: Count
    num_gaps: Count = 0
    target_step_s: Seconds = 0.0


class LeaseGrant(Message, frozen=True, kw_only=True):
    """Answer to the `LeaseRequest` with this number: ranges, in the order in which they are to be trained.

    `is_over`: nothing is free below the epoch that the learner has named.
    """

    number: Count
    ranges: Ranges = ()
    is_over: bool = False


class PeerStateWanted(Message, frozen=True, kw_only=True):
    """Asks for this learner's inner optimizer state of one fragment, for a learner that has none: answered by `PeerState`."""

    ticket: Count
    fragment_id: Count
    optimizers: Kinds


# ---- syncer to learner, payload headers -------------------------------------------------------------------------------------


class Publication(Message, frozen=True, kw_only=True):
    """Payload: a version of one fragment, as a difference to `parent` in the wire dtype or, with no parent, the float32 shadow.

    `crc` is that of the resulting float32 values.
    """

    fragment_id: Count
    version: Version
    parent: Version | None
    crc: Count
    merged_through: dict[Count, MergedThrough]


class StaticState(Message, frozen=True, kw_only=True):
    """Payload: the job's static state for a joiner."""

    crc: Count


FromSyncer = (
    Welcome
    | Sharded
    | SendState
    | JoinRefused
    | WhoAreYou
    | Pull
    | Recall
    | Describe
    | Released
    | Resolved
    | Fenced
    | Stop
    | Left
    | Pong
    | LeaseGrant
    | PeerStateWanted
)
SyncerHeader = Publication | StaticState | PeerState
