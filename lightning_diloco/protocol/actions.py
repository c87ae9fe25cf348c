"""Actions: everything that a machine asks its runtime to do, in this order.

The runtime performs them with sockets and tensors, the simulator as durations, a replay from the tape. A machine never learns how.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from lightning_diloco.protocol.identity import ContributionKey, DataSpec, MergedThrough, Origin, Refusal, Version
from lightning_diloco.protocol.messages import Contribution, FromLearner, FromSyncer, HeldFragment, PeerState
from lightning_diloco.protocol.records import Record

__all__ = [
    "Adopt",
    "BeginFounding",
    "Close",
    "CloseSession",
    "Decode",
    "DropPayload",
    "DropPeerState",
    "DropPrepared",
    "Ended",
    "Fence",
    "Fold",
    "Forget",
    "Heal",
    "Joined",
    "LearnerAction",
    "LeaveAgain",
    "LeftDone",
    "MakeDurable",
    "RefuseJoin",
    "RelayPeerState",
    "Reply",
    "Send",
    "SendContribution",
    "SendDescription",
    "SendFounding",
    "SendHeld",
    "SendLeave",
    "Snapshot",
    "StopTraining",
    "SyncerAction",
    "Tape",
    "Transmit",
    "TransmitStatic",
    "UnsayLeave",
]


class _Action(msgspec.Struct, frozen=True, kw_only=True):
    pass


# ---- of a syncer ------------------------------------------------------------------------------------------------------------


class Reply(_Action, frozen=True, kw_only=True):
    """Send a control message to a session."""

    session: str
    message: FromSyncer
    incarnation: int = 0


class BeginFounding(_Action, frozen=True, kw_only=True):
    """Prepare the store for this founder's payloads; what it announced must fit its configuration (JSON) and fingerprint."""

    session: str
    config: bytes
    fingerprint: str


class Fold(_Action, frozen=True, kw_only=True):
    """Fold the waiting contribution into its fragment's merge with this weight; its payload is released when it was added."""

    key: ContributionKey
    weight: float


class DropPayload(_Action, frozen=True, kw_only=True):
    """Release the waiting contribution without using it."""

    key: ContributionKey


class Close(_Action, frozen=True, kw_only=True):
    """Merge what was folded, take the outer step, produce the shadow of `version`; answer with `Merged`.

    `merge_index` counts the fragment's merges from 1: the momentum's warm-up needs it. Contributions folded after this action belong to
    the fragment's next merge. `last_share`: None if learners train on from the result. When every member has said a last word it is the
    longest contribution in sync intervals, at most 1.
    """

    fragment_id: int
    version: Version
    merge_index: int
    last_share: float | None = None


class Transmit(_Action, frozen=True, kw_only=True):
    """Send the fragment's current version to a session, as the difference to `parent` or (None) as the full shadow."""

    session: str
    fragment_id: int
    version: Version
    parent: Version | None
    crc: int
    merged_through: dict[int, MergedThrough]


class TransmitStatic(_Action, frozen=True, kw_only=True):
    """Send the static state to a session."""

    session: str
    learner_id: int


class RelayPeerState(_Action, frozen=True, kw_only=True):
    """Send the waiting payload on, under its header, to the session that asked for it; answer with `PeerStateRelayed`."""

    session: str
    header: PeerState


class DropPeerState(_Action, frozen=True, kw_only=True):
    """Give a payload up that is being relayed: nobody takes it."""

    ticket: int


class MakeDurable(_Action, frozen=True, kw_only=True):
    """Write a snapshot of all fragments as they are now, and answer with `Durable`: only then may a syncer that started again serve.

    `origins`: what each was before the restart that is about to be on the tape; empty, where it is no restart that asks.
    """

    origins: tuple[Origin, ...] = ()


class CloseSession(_Action, frozen=True, kw_only=True):
    """Forget everything of a session at the transport."""

    session: str


class Tape(_Action, frozen=True, kw_only=True):
    """Write one record."""

    record: Record


class Ended(_Action, frozen=True, kw_only=True):
    """The job is over: write the global state and stop."""

    status: Literal["finished", "stopped", "failed"]
    versions: tuple[int, ...]


SyncerAction = (
    Reply
    | BeginFounding
    | Fold
    | DropPayload
    | Close
    | Transmit
    | TransmitStatic
    | RelayPeerState
    | DropPeerState
    | MakeDurable
    | CloseSession
    | Tape
    | Ended
)

# ---- of a learner -----------------------------------------------------------------------------------------------------------


class Send(_Action, frozen=True, kw_only=True):
    """Send a control message to the syncer."""

    message: FromLearner


class SendFounding(_Action, frozen=True, kw_only=True):
    """Send `Found` and the founding payloads."""


class Decode(_Action, frozen=True, kw_only=True):
    """Decode the waiting publication into the published copy and prepare its adoption; answer with `Decoded`.

    `with_contribution`: the seq of the unresolved contribution that is in it (0: none): the reference is base minus its decoded value.
    `is_joining`: nothing local exists yet; the published copy becomes the base at once.
    """

    fragment_id: int
    version: Version
    is_full: bool
    with_contribution: int = 0
    is_joining: bool = False


class Adopt(_Action, frozen=True, kw_only=True):
    """Training thread: put the prepared version into the parameters; the base becomes it."""

    fragment_id: int
    version: Version
    mode: Literal["rebase", "overwrite"]


class Heal(_Action, frozen=True, kw_only=True):
    """Training thread: parameters of the fragment become the base; non-finite inner moments are re-initialized.

    `keep_seq`: a contribution of this fragment is on its way (0: none): if its decoded value is finite, parameters become base minus
    it, as they were when it was taken.
    """

    fragment_id: int
    reason: Literal["nonfinite", "norm"]
    keep_seq: int = 0


class Snapshot(_Action, frozen=True, kw_only=True):
    """Training thread: copy the fragment aside; the background encodes it and answers with `Encoded`.

    `after_unresolved`: relative to base minus the unresolved contribution (a final one).
    """

    fragment_id: int
    seq: int
    after_unresolved: bool = False


class SendContribution(_Action, frozen=True, kw_only=True):
    """Send the encoded payload under this header."""

    header: Contribution


class SendHeld(_Action, frozen=True, kw_only=True):
    """Send the values of the newest version received, under this header; its crc says whether they are the ones that were asked for."""

    header: HeldFragment


class SendDescription(_Action, frozen=True, kw_only=True):
    """Tell what the job is: `Description`, and the static state as it is now if that was asked for."""

    earlier: tuple[int, ...]
    with_static: bool


class DropPrepared(_Action, frozen=True, kw_only=True):
    """The syncer has lost a version that was received and not adopted: the published copy is the base again."""

    fragment_id: int


class UnsayLeave(_Action, frozen=True, kw_only=True):
    """`Leave` was said to a syncer that has lost what was handed over: it is not repeated before it is said again."""


class LeaveAgain(_Action, frozen=True, kw_only=True):
    """Training thread, which waits for the end of its leave: ask for it once more, the syncer has lost what was handed over."""

    reason: Literal["limit", "signal", "stopped"]


class SendLeave(_Action, frozen=True, kw_only=True):
    """Send `Leave` with a last report."""

    reason: Literal["limit", "signal", "stopped"]


class Forget(_Action, frozen=True, kw_only=True):
    """The decoded value of this contribution is not needed any more."""

    fragment_id: int
    seq: int
    reason: Refusal | None = None


class Joined(_Action, frozen=True, kw_only=True):
    """The join is complete."""

    learner_id: int
    incarnation: int
    role: str
    job_step: int
    data: DataSpec | None = None


class RefuseJoin(_Action, frozen=True, kw_only=True):
    """The join failed for good."""

    reason: str
    detail: str


class Fence(_Action, frozen=True, kw_only=True):
    """Another process has this id."""

    detail: str


class StopTraining(_Action, frozen=True, kw_only=True):
    """The job ends for all."""

    reason: str


class LeftDone(_Action, frozen=True, kw_only=True):
    """The leave is complete."""


LearnerAction = (
    Send
    | SendFounding
    | Decode
    | Adopt
    | Heal
    | Snapshot
    | SendContribution
    | SendHeld
    | SendDescription
    | SendLeave
    | DropPrepared
    | UnsayLeave
    | LeaveAgain
    | Forget
    | Joined
    | RefuseJoin
    | Fence
    | StopTraining
    | LeftDone
)
