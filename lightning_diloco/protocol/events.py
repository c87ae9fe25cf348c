"""Events: everything that can happen to a machine.

Messages arrive as they are, with the session they came through; payloads arrive as facts about them (a norm, a checksum), never as
tensors. Time is not in an event: the runtime, the simulator and the tests pass `now_s` beside it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from lightning_diloco.protocol.identity import LeaveReason, Version
from lightning_diloco.protocol.messages import Contribution, Envelope, FromLearner, FromSyncer, HeldFragment, PeerState, Publication

__all__ = [
    "Boundary",
    "ContributionArrived",
    "ControlReceived",
    "CountersRead",
    "Decoded",
    "Durable",
    "Encoded",
    "Finish",
    "FoundingArrived",
    "HeldArrived",
    "HeldMoves",
    "JoinRequested",
    "LeaveRequested",
    "LearnerEvent",
    "LearnerLost",
    "MessageReceived",
    "Merged",
    "PauseChanged",
    "PayloadFailed",
    "PeerStateArrived",
    "PeerStateRelayed",
    "PublicationArrived",
    "PublicationDelivered",
    "PublicationFailed",
    "StaticInstalled",
    "StopRequested",
    "SyncerEvent",
    "Tick",
]


class _Event(msgspec.Struct, frozen=True, kw_only=True):
    pass


# ---- of a syncer ------------------------------------------------------------------------------------------------------------


class MessageReceived(_Event, frozen=True, kw_only=True):
    """A control message of a learner. `session` names the process that sent it (its nonce, in hexadecimal)."""

    session: str
    envelope: Envelope
    message: FromLearner


class ContributionArrived(_Event, frozen=True, kw_only=True):
    """A contribution is complete, decoded and measured. `norm` is the float64 norm; `is_finite` is False for NaN or infinity in it.

    `crc_ok` is False if the decoded bytes do not have the header's crc. `payload_at`: where the payload was recorded (None: nowhere).
    """

    session: str
    envelope: Envelope
    header: Contribution
    norm: float
    is_finite: bool
    payload_bytes: int
    crc_ok: bool = True
    payload_at: int | None = None


class PayloadFailed(_Event, frozen=True, kw_only=True):
    """A payload was refused below the rules (size, checksum, layout)."""

    session: str
    reason: Literal["wrong_layout", "bad_checksum", "oversized"]
    fragment_id: int | None = None
    seq: int | None = None


class FoundingArrived(_Event, frozen=True, kw_only=True):
    """All founding payloads of the appointed founder are in and stored; crc of each fragment, payload bytes in all.

    `payload_at`: where they were recorded (None: nowhere).
    """

    session: str
    crcs: tuple[int, ...]
    payload_bytes: int
    payload_at: int | None = None


class HeldArrived(_Event, frozen=True, kw_only=True):
    """A version that was recalled is complete and stored; `crc_ok` is False if its values do not have the header's crc."""

    session: str
    header: HeldFragment
    crc_ok: bool


class HeldMoves(_Event, frozen=True, kw_only=True):
    """More of a version that was recalled has come from this session; it is not complete."""

    session: str


class PeerStateArrived(_Event, frozen=True, kw_only=True):
    """A peer's inner optimizer state is complete; nobody has looked into it."""

    session: str
    header: PeerState


class PeerStateRelayed(_Event, frozen=True, kw_only=True):
    """`RelayPeerState` was performed: it was taken, or the transport gave up."""

    ticket: int


class Durable(_Event, frozen=True, kw_only=True):
    """`MakeDurable` was performed, or cannot be (the disk failed; the runtime has said so): the syncer may serve."""


class Merged(_Event, frozen=True, kw_only=True):
    """`Close` was performed: the new shadow's crc, the time it took, and what a replay needs."""

    fragment_id: int
    crc: int
    merge_s: float
    outer_momentum: float = 0.0
    norms: tuple[tuple[float, ...], ...] = ()
    scales: tuple[float, ...] = ()


class PublicationDelivered(_Event, frozen=True, kw_only=True):
    """The transport's end-to-end acknowledgement of one publication to one learner (`version`: which one, where it is known)."""

    session: str
    fragment_id: int
    version: Version | None = None


class PublicationFailed(_Event, frozen=True, kw_only=True):
    """The transport gave up on one publication to one learner (`version`: which one, where it is known)."""

    session: str
    fragment_id: int
    version: Version | None = None


class LearnerLost(_Event, frozen=True, kw_only=True):
    """Somebody who knows (the supervisor) says that this learner's process is gone.

    `incarnation`, or `life` by the supervisor's own count: which of its processes, where that is known. The word has a channel of its own,
    so it may come after the next process has taken the id: that one is spared.
    """

    learner_id: int
    incarnation: int | None = None
    life: int | None = None
    reason: LeaveReason = "died"


class CountersRead(_Event, frozen=True, kw_only=True):
    """The memory-mapped totals of an incarnation whose process is gone."""

    learner_id: int
    incarnation: int
    inner_steps: int
    tokens: int
    samples: int = 0


class Finish(_Event, frozen=True, kw_only=True):
    """No learner will come back: close what is held and end."""

    status: Literal["finished", "stopped", "failed"]


class Tick(_Event, frozen=True, kw_only=True):
    """Time has passed; nothing else happened."""


SyncerEvent = (
    MessageReceived
    | ContributionArrived
    | PayloadFailed
    | FoundingArrived
    | HeldArrived
    | HeldMoves
    | PeerStateArrived
    | PeerStateRelayed
    | Durable
    | Merged
    | PublicationDelivered
    | PublicationFailed
    | LearnerLost
    | CountersRead
    | Finish
    | Tick
)

# ---- of a learner -----------------------------------------------------------------------------------------------------------


class JoinRequested(_Event, frozen=True, kw_only=True):
    """Say hello."""


class ControlReceived(_Event, frozen=True, kw_only=True):
    """A control message of the syncer."""

    envelope: Envelope
    message: FromSyncer


class PublicationArrived(_Event, frozen=True, kw_only=True):
    """A publication's payload is complete; it has not been decoded."""

    envelope: Envelope
    header: Publication


class Decoded(_Event, frozen=True, kw_only=True):
    """`Decode` was performed: the published copy now is this version (or is not, if the crc differed)."""

    fragment_id: int
    version: Version
    crc_ok: bool


class StaticInstalled(_Event, frozen=True, kw_only=True):
    """While joining: the static state is in place."""


class Boundary(_Event, frozen=True, kw_only=True):
    """The training thread ended `steps` inner steps (mostly one) of `tokens` tokens in all; nothing was exchanged between them.

    `poisoned`: while a heal for `nonfinite` is due, here or in another shard's part of the model, the fragments whose parameters are not
    finite: they are healed with it, because one of them left over would poison the others in the next step. None: nobody has looked, so
    such a heal waits for the next boundary.
    """

    tokens: int
    steps: int = 1
    can_snapshot: bool = True
    poisoned: tuple[int, ...] | None = ()


class Encoded(_Event, frozen=True, kw_only=True):
    """A snapshot was encoded; the payload waits under (fragment_id, seq). `crc` of the payload's bytes."""

    fragment_id: int
    seq: int
    crc: int


class PauseChanged(_Event, frozen=True, kw_only=True):
    """Inner steps stop for a while (validation, checkpoint), or go on."""

    is_paused: bool


class StopRequested(_Event, frozen=True, kw_only=True):
    """`trainer.should_stop` was set here."""

    reason: str


class LeaveRequested(_Event, frozen=True, kw_only=True):
    """The learner ends: push what is left. `poisoned` as in `Boundary`; what nobody has looked at is refused or accepted as it is."""

    reason: Literal["limit", "signal", "stopped"]
    poisoned: tuple[int, ...] | None = ()


LearnerEvent = (
    JoinRequested
    | ControlReceived
    | PublicationArrived
    | Decoded
    | StaticInstalled
    | Boundary
    | Encoded
    | PauseChanged
    | StopRequested
    | LeaveRequested
    | Tick
)
