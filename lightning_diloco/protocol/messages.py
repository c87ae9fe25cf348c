"""Messages: the frozen vocabulary between learner and syncer (PROTOCOL.md sections 1, 3 to 7, 10).

Every message travels in an `Envelope` that names the job, the lineage, the epoch and the sender's incarnation. Control messages are
small and go over the control socket; `Header` messages announce a payload and go with it over the bulk socket. Types are tagged,
frozen, closed (unknown fields are refused) and validated by msgspec when they are decoded; values that one type alone cannot rule out are
checked by the machines. Shapes of later issues (leases, peer state) stand here already, so that nothing is torn up when they come.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lightning_diloco.protocol.identity import Count, DiscardReason, FragmentInfo, MergedThrough, Refusal, Seconds, Version

__all__ = [
    "PROTOCOL_VERSION",
    "Adopted",
    "Busy",
    "Contribution",
    "Discarded",
    "Envelope",
    "Fenced",
    "Found",
    "FoundingFragment",
    "FoundingStatic",
    "FromLearner",
    "FromSyncer",
    "Header",
    "Heartbeat",
    "Hello",
    "JoinRefused",
    "LearnerHeader",
    "Leave",
    "LeaseDone",
    "LeaseGrant",
    "LeaseRequest",
    "Left",
    "NeedFull",
    "Paused",
    "PeerState",
    "PeerStateRequest",
    "Ping",
    "Pong",
    "Progress",
    "Publication",
    "Pull",
    "Ready",
    "Released",
    "Resolved",
    "ShardAddress",
    "StaticState",
    "Stop",
    "StopRequest",
    "SyncerHeader",
    "Unresolved",
    "Welcome",
    "WhoAreYou",
]

PROTOCOL_VERSION = 1
"""Raised by one whenever a message changes; both sides must speak the same."""

Name = Annotated[str, Meta(max_length=200)]
Sentence = Annotated[str, Meta(max_length=2000)]
MAX_FRAGMENTS = 100_000
PerFragment = Annotated[tuple[Count, ...], Meta(max_length=MAX_FRAGMENTS)]
StepTimes = Annotated[tuple[Seconds, ...], Meta(max_length=8192)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages; the tag is the class name."""


class Unresolved(msgspec.Struct, frozen=True, array_like=True):
    """A contribution whose fate its learner does not know yet."""

    fragment_id: Count
    seq: Count


class Discarded(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that one incarnation has discarded of one fragment so far, for one reason (a running total)."""

    fragment_id: Count
    reason: DiscardReason
    tokens: Count


class ShardAddress(msgspec.Struct, frozen=True):
    """Where a set of fragments is served; no ids means all of them."""

    bulk_endpoint: Name
    fragment_ids: PerFragment = ()


# ---- learner to syncer, control ---------------------------------------------------------------------------------------------


class Hello(Message):
    """First word of a process, and of a reconnection. `lineage` is "" for one that holds nothing.

    `config` is the JSON of the job's `SyncConfig`; `fingerprint` that of the layout; `versions` and `unresolved` what the process holds.
    """

    protocol_version: Count
    token: Name
    learner_id: Count | None
    nonce: Name
    takeover_token: Name
    config: Annotated[bytes, Meta(max_length=65536)]
    fingerprint: Name
    lineage: Name = ""
    versions: tuple[Version, ...] = ()
    unresolved: tuple[Unresolved, ...] = ()
    inner_step: Count = 0
    tokens: Count = 0
    device: Name = ""
    batch_size: Count = 0
    tokens_per_step: Count = 0


class Found(Message):
    """The appointed founder's description of the job; its fragments and static state follow as payloads.

    `versions` and `has_momentum` serve a founding from a checkpoint: n per fragment to go on from, and whether momentum follows.
    """

    layout: Annotated[bytes, Meta(max_length=1 << 20)]
    fragments: Annotated[tuple[FragmentInfo, ...], Meta(min_length=1, max_length=MAX_FRAGMENTS)]
    static_bytes: Count
    static_crc: Count
    versions: PerFragment = ()
    has_momentum: bool = False


class Ready(Message):
    """All fragments are held: from here on this learner is a member."""

    inner_step: Count = 0


class Progress(Message):
    """The running totals of this incarnation, sent after inner steps, newest only."""

    inner_step: Count
    tokens: Count


class Heartbeat(Message):
    """A full report: everything that mends a lost message, and the figures of the last steps.

    Args:
        inner_step: inner steps of this incarnation so far.
        tokens: tokens of this incarnation so far.
        versions: n of the newest version held, per fragment.
        unresolved: contributions whose fate is not known here.
        discarded: running totals of this incarnation.
        step_gaps_s: times between two ends of steps since the last report, oldest first.
        paused_s: of each gap, the part spent paused (validation, checkpoints).
        stalls_s: of each gap, the time spent inside outer-sync code at the boundary.
        last_step_age_s: from the end of the last step to the sending of this report.
        is_paused: inside validation or a checkpoint at this moment.
    """

    inner_step: Count
    tokens: Count
    versions: PerFragment = ()
    unresolved: tuple[Unresolved, ...] = ()
    discarded: tuple[Discarded, ...] = ()
    step_gaps_s: StepTimes = ()
    paused_s: StepTimes = ()
    stalls_s: StepTimes = ()
    last_step_age_s: Seconds = 0.0
    is_paused: bool = False
    batch_size: Count = 0


class Busy(Message):
    """This pull ends without a contribution; nothing is dropped."""

    fragment_id: Count
    round_id: Count


class Adopted(Message):
    """A version is in place; crc of the learner's base, which must equal the shadow's."""

    fragment_id: Count
    version: Version
    crc: Count


class NeedFull(Message):
    """A difference could not be applied here: send the full shadow."""

    fragment_id: Count


class Paused(Message):
    """Begin or end of a time without inner steps (validation, checkpoint)."""

    is_paused: bool


class StopRequest(Message):
    """`trainer.should_stop` of this learner; learner 0's decision ends the job for all."""

    reason: Name


class Leave(Message):
    """Last word of a learner: its final contributions are on their way or decided."""

    reason: Literal["limit", "signal", "stopped"]
    report: Heartbeat


class Ping(Message):
    """Asks for a `Pong` with the same number."""

    number: Count


class LeaseRequest(Message):
    """Asks for sample ranges (data leases: a later issue)."""

    num_samples: Count


class LeaseDone(Message):
    """Sample ranges that an optimizer step has finished (data leases: a later issue)."""

    ranges: tuple[tuple[Count, Count], ...]


class PeerStateRequest(Message):
    """Asks a peer for inner optimizer state (recovery: a later issue)."""

    learner_id: Count


# ---- learner to syncer, payload headers -------------------------------------------------------------------------------------


class FoundingFragment(Message):
    """Payload: one fragment's float32 values (`part` "values"), or its outer momentum."""

    fragment_id: Count
    crc: Count
    part: Literal["values", "momentum"] = "values"


class FoundingStatic(Message):
    """Payload: the static state, packed in the order of the layout."""

    crc: Count


class Contribution(Message):
    """Payload: base minus local of one fragment, in the wire dtype.

    `after` is set on a final contribution that continues an unresolved one: it is folded after seq `after` or with it, and
    refused if that one is refused. `inner_step` is the learner's counter at the snapshot.
    """

    fragment_id: Count
    seq: Annotated[int, Meta(ge=1, le=2**62)]
    round_id: Count | None
    base: Version
    base_merged_seq: Count
    steps: Annotated[int, Meta(ge=1, le=2**62)]
    tokens: Annotated[int, Meta(ge=1, le=2**62)]
    inner_step: Count
    crc: Count
    is_final: bool = False
    after: Count | None = None


class PeerState(Message):
    """Payload: inner optimizer state of a healthy peer (recovery: a later issue)."""

    fragment_id: Count
    crc: Count


# ---- syncer to learner, control ---------------------------------------------------------------------------------------------


class Welcome(Message):
    """Answer to `Hello`.

    `role`: "waiting" (another founds; a second Welcome follows), "founder" (send `Found`), "joiner" (full transfers follow),
    "member" (the founder's fragments are in; it holds everything), "resumed" (same process as before).
    `next_seq` holds the next sequence number per fragment; `job_step` the median inner step of the active learners.
    """

    role: Literal["waiting", "founder", "joiner", "member", "resumed"]
    learner_id: Count
    incarnation: Count
    shards: tuple[ShardAddress, ...] = ()
    job_step: Count = 0
    next_seq: PerFragment = ()
    static_crc: Count = 0
    static_bytes: Count = 0


class JoinRefused(Message):
    """The process may not join; it ends with the sentence."""

    reason: Name
    detail: Sentence


class WhoAreYou(Message):
    """The session is not known here: say `Hello` again."""


class Pull(Message):
    """Asks for a contribution to this round, at the next inner-step boundary."""

    fragment_id: Count
    round_id: Count


class Released(Message):
    """The round ended; an unanswered pull of it needs no answer. Never ends a contribution."""

    fragment_id: Count
    round_id: Count


class Resolved(Message):
    """The fate of one contribution, sent for refusals, final contributions and copies."""

    fragment_id: Count
    seq: Count
    outcome: Literal["held", "merged", "refused", "unknown"]
    reason: Refusal | None = None


class Fenced(Message):
    """Another process holds this learner's id: end with a sentence, never rejoin."""

    detail: Sentence


class Stop(Message):
    """The job ends for all: leave at the next boundary."""

    reason: Name


class Left(Message):
    """The leave is complete; `versions` are the published ones at this moment (n per fragment)."""

    versions: PerFragment


class Pong(Message):
    """Answer to `Ping`."""

    number: Count


class LeaseGrant(Message):
    """Sample ranges handed out (data leases: a later issue)."""

    epoch: Count
    ranges: tuple[tuple[Count, Count], ...]


# ---- syncer to learner, payload headers -------------------------------------------------------------------------------------


class Publication(Message):
    """Payload: a version of one fragment, as a difference to `parent` in the wire dtype or, with no parent, the float32 shadow.

    `crc` is that of the resulting float32 values.
    """

    fragment_id: Count
    version: Version
    parent: Version | None
    crc: Count
    merged_through: dict[Count, MergedThrough]


class StaticState(Message):
    """Payload: the job's static state for a joiner."""

    crc: Count


FromLearner = (
    Hello
    | Found
    | Ready
    | Progress
    | Heartbeat
    | Busy
    | Adopted
    | NeedFull
    | Paused
    | StopRequest
    | Leave
    | Ping
    | LeaseRequest
    | LeaseDone
    | PeerStateRequest
)
LearnerHeader = FoundingFragment | FoundingStatic | Contribution | PeerState
FromSyncer = Welcome | JoinRefused | WhoAreYou | Pull | Released | Resolved | Fenced | Stop | Left | Pong | LeaseGrant
SyncerHeader = Publication | StaticState | PeerState
Header = LearnerHeader | SyncerHeader


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """What stands around every message: whose job, which history, which life of the sender."""

    job_id: Name
    lineage: Name
    epoch: Count
    incarnation: Count
