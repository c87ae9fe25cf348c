"""What a learner says to the syncer: control messages, and the headers of its payloads."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lightning_diloco.protocol.identity import (
    Count,
    DataSpec,
    DiscardReason,
    FragmentInfo,
    MergedThrough,
    Seconds,
    Version,
)
from lightning_diloco.protocol.message_base import MAX_FRAGMENTS, Again, Kinds, Message, Name, PerFragment, Ranges, StepTimes

__all__ = [
    "Adopted",
    "BatchChosen",
    "Busy",
    "Contribution",
    "Description",
    "Discarded",
    "Found",
    "FoundingFragment",
    "FoundingStatic",
    "FromLearner",
    "Granted",
    "Heartbeat",
    "HeldFragment",
    "Hello",
    "LearnerHeader",
    "LeaseRequest",
    "Leave",
    "NeedFull",
    "NotHeld",
    "Paused",
    "PeerState",
    "PeerStateRequest",
    "Ping",
    "Progress",
    "Ready",
    "StopRequest",
    "Unresolved",
]


class Unresolved(msgspec.Struct, frozen=True, array_like=True):
    """A contribution whose fate its learner does not know yet."""

    fragment_id: Count
    seq: Count


class Discarded(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that one incarnation has discarded of one fragment so far, for one reason (a running total)."""

    fragment_id: Count
    reason: DiscardReason
    tokens: Count


class Granted(msgspec.Struct, frozen=True, array_like=True):
    """A grant that a learner has received, for a syncer that may have lost it; `before`: samples of all its grants before this one."""

    number: Count
    ranges: Ranges
    before: Count = 0


# ---- learner to syncer, control ---------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """First word of a process, and of a reconnection. `lineage` is "" for one that holds nothing.

    `config` is the JSON of the job's `SyncConfig`; `fingerprint` that of the layout; `versions` and `unresolved` what the process holds.
    `joined_at_step`: the job's step when it joined; 0 before.
    `life`: how many processes of this learner its supervisor started before this one; the supervisor's word of a death names it.
    `data`: what is handed out in leases; None: each learner trains on its own part.
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
    joined_at_step: Count = 0
    life: Count = 0
    data: DataSpec | None = None


class Found(Message, frozen=True, kw_only=True):
    """The appointed founder's description of the job; its fragments and static state follow as payloads.

    `versions` and `has_momentum` serve a founding from a checkpoint: n per fragment to go on from, and whether momentum follows.
    """

    layout: Annotated[bytes, Meta(max_length=1 << 20)]
    fragments: Annotated[tuple[FragmentInfo, ...], Meta(min_length=1, max_length=MAX_FRAGMENTS)]
    static_bytes: Count
    static_crc: Count
    versions: PerFragment = ()
    has_momentum: bool = False


class Ready(Message, frozen=True, kw_only=True):
    """All fragments are held: from here on this learner is a member."""

    inner_step: Count = 0


class Progress(Message, frozen=True, kw_only=True):
    """The running totals of this incarnation, sent after inner steps, newest only."""

    inner_step: Count
    tokens: Count


class Heartbeat(Message, frozen=True, kw_only=True):
    """A full report: everything that mends a lost message, and the figures of the last steps.

    Args:
        inner_step: inner steps of this incarnation so far.
        tokens: tokens of this incarnation so far.
        versions: n of the newest version held, per fragment.
        unresolved: contributions whose fate is not known here.
        discarded: running totals of this incarnation.
        first_gap: number of the first of the gaps, from 0 at the join: what is on the tape already is told again until it is confirmed.
        step_gaps_s: times between two ends of steps, oldest first.
        paused_s: of each gap, the part spent paused (validation, checkpoints).
        stalls_s: of each gap, the time spent inside outer-sync code at the boundary.
        last_step_age_s: from the end of the last step to the sending of this report.
        clock_s: the learner's monotonic clock at the sending (0: not told); tells how long the report was on its way.
        is_paused: inside validation or a checkpoint at this moment.
        samples: trained under leases by this incarnation so far, in the order of its grants.
        again: per epoch, samples trained once more because there was no lease (running totals).
    """

    inner_step: Count
    tokens: Count
    versions: PerFragment = ()
    unresolved: tuple[Unresolved, ...] = ()
    discarded: tuple[Discarded, ...] = ()
    first_gap: Count = 0
    step_gaps_s: StepTimes = ()
    paused_s: StepTimes = ()
    stalls_s: StepTimes = ()
    last_step_age_s: Seconds = 0.0
    clock_s: Seconds = 0.0
    is_paused: bool = False
    batch_size: Count = 0
    samples: Count = 0
    again: Again = ()


class BatchChosen(Message, frozen=True, kw_only=True):
    """The learner's batches have another size from now on, for the records.

    `batch_size`: samples of a micro-batch; `accumulate`: micro-batches of an inner step; `lr_factor`: what the inner learning rate is
    multiplied by; `reason`: why, in a few words.
    """

    inner_step: Count
    batch_size: Annotated[int, Meta(ge=1, le=2**53)]
    accumulate: Annotated[int, Meta(ge=1, le=2**53)]
    lr_factor: Annotated[float, Meta(gt=0, le=1e9)]
    reason: Name


class Busy(Message, frozen=True, kw_only=True):
    """This pull ends without a contribution; nothing is dropped."""

    fragment_id: Count
    round_id: Count


class Adopted(Message, frozen=True, kw_only=True):
    """A version is in place; crc of the learner's base, which must equal the shadow's."""

    fragment_id: Count
    version: Version
    crc: Count


class NeedFull(Message, frozen=True, kw_only=True):
    """A difference could not be applied here: send the full shadow."""

    fragment_id: Count


class Paused(Message, frozen=True, kw_only=True):
    """Begin or end of a time without inner steps (validation, checkpoint)."""

    is_paused: bool


class StopRequest(Message, frozen=True, kw_only=True):
    """`trainer.should_stop` of this learner; learner 0's decision ends the job for all."""

    reason: Name


class Leave(Message, frozen=True, kw_only=True):
    """Last word of a learner: its final contributions are on their way or decided."""

    reason: Literal["limit", "signal", "stopped"]
    report: Heartbeat


class Ping(Message, frozen=True, kw_only=True):
    """Asks for a `Pong` with the same number."""

    number: Count


class LeaseRequest(Message, frozen=True, kw_only=True):
    """Asks for sample ranges; answered by `LeaseGrant` with the same number. Said again, unchanged, until the answer is here.

    Args:
        number: of the request, from 1 in each life.
        wanted: samples (0: none; the learner only tells what it holds).
        batch_size: samples of a batch at this moment.
        until: the first epoch that is not wanted (None: all are).
        samples: as in `Heartbeat`.
        known: the last grants, told to a syncer that has started again and may have lost them.
    """

    number: Annotated[int, Meta(ge=1, le=2**62)]
    wanted: Count
    batch_size: Annotated[int, Meta(ge=1, le=2**62)]
    until: Count | None = None
    samples: Count = 0
    known: Annotated[tuple[Granted, ...], Meta(max_length=32)] = ()


class PeerStateRequest(Message, frozen=True, kw_only=True):
    """Asks for the inner optimizer state that a healthy peer has of one fragment: answered by `PeerState`, if anybody has it.

    `optimizers`: a state fits optimizers of its own kinds. `attempt`: how many answers were of no use, so that another peer is asked.
    """

    fragment_id: Count
    optimizers: Kinds
    attempt: Count = 0


# ---- learner to syncer, payload headers -------------------------------------------------------------------------------------


class FoundingFragment(Message, frozen=True, kw_only=True):
    """Payload: one fragment's float32 values (`part` "values"), or its outer momentum."""

    fragment_id: Count
    crc: Count
    part: Literal["values", "momentum"] = "values"


class FoundingStatic(Message, frozen=True, kw_only=True):
    """Payload: the static state, packed in the order of the layout."""

    crc: Count


class Contribution(Message, frozen=True, kw_only=True):
    """Payload: base minus local of one fragment, in the wire dtype.

    `after` is set on a final contribution that continues an unresolved one: it is folded after seq `after` or with it, and
    refused if that one is refused. `inner_step` and `total_tokens` are this incarnation's running totals at the snapshot.
    """

    fragment_id: Count
    seq: Annotated[int, Meta(ge=1, le=2**62)]
    round_id: Count | None
    base: Version
    base_merged_seq: Count
    steps: Annotated[int, Meta(ge=1, le=2**62)]
    tokens: Annotated[int, Meta(ge=1, le=2**62)]
    inner_step: Count
    total_tokens: Count
    crc: Count
    is_final: bool = False
    after: Count | None = None


class HeldFragment(Message, frozen=True, kw_only=True):
    """Payload: the float32 values of a published version that this learner holds, for a syncer that has lost it. Answer to `Recall`.

    `crc` is that of the values; `merged_through` came with the version.
    """

    fragment_id: Count
    version: Version
    crc: Count
    merged_through: dict[Count, MergedThrough]


class NotHeld(Message, frozen=True, kw_only=True):
    """A version that was recalled cannot be given: it is not held here, or its values are not what they were."""

    fragment_id: Count


class Description(Message, frozen=True, kw_only=True):
    """What the job is, as a member knows it. Answer to `Describe`.

    `earlier`: per fragment, what of the learner's ended lives is merged (its running one tells its own).
    """

    layout: Annotated[bytes, Meta(max_length=1 << 20)]
    earlier: PerFragment


class PeerState(Message, frozen=True, kw_only=True):
    """Payload: a peer's inner optimizer state of one fragment, as safetensors; no bytes: it has none that fits.

    From the peer to the syncer, and as it is from there to the learner that asked. `ticket`: of the `PeerStateWanted` that it answers.
    """

    ticket: Count
    fragment_id: Count


FromLearner = (
    Hello
    | Found
    | Ready
    | Progress
    | Heartbeat
    | BatchChosen
    | Busy
    | Adopted
    | NeedFull
    | NotHeld
    | Description
    | Paused
    | StopRequest
    | Leave
    | Ping
    | LeaseRequest
    | PeerStateRequest
)
LearnerHeader = FoundingFragment | FoundingStatic | Contribution | HeldFragment | PeerState
