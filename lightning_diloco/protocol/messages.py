"""Messages: the frozen vocabulary between learner and syncer (PROTOCOL.md sections 1, 3 to 7, 10).

Every message travels in an `Envelope` that names the job, the lineage, the epoch and the sender's incarnation. Control messages are
small and go over the control socket; `Header` messages announce a payload and go with it over the bulk socket. Types are tagged,
frozen, closed (unknown fields are refused) and validated by msgspec when they are decoded; values that one type alone cannot rule out are
checked by the machines.
"""

from __future__ import annotations

import msgspec

from lightning_diloco.protocol.identity import Count
from lightning_diloco.protocol.learner_messages import (
    Adopted,
    BatchChosen,
    Busy,
    Contribution,
    Description,
    Discarded,
    Found,
    FoundingFragment,
    FoundingStatic,
    FromLearner,
    Granted,
    Heartbeat,
    HeldFragment,
    Hello,
    LearnerHeader,
    LeaseRequest,
    Leave,
    NeedFull,
    NotHeld,
    Paused,
    PeerState,
    PeerStateRequest,
    Ping,
    Progress,
    Ready,
    StopRequest,
    Unresolved,
)
from lightning_diloco.protocol.message_base import Message, Name
from lightning_diloco.protocol.observer_messages import FromObserver, Status, StatusRefused, StatusRequest, ToObserver
from lightning_diloco.protocol.syncer_messages import (
    ID_IN_USE,
    Describe,
    Fenced,
    FromSyncer,
    JoinRefused,
    LeaseGrant,
    Left,
    PeerStateWanted,
    Pong,
    Publication,
    Pull,
    Recall,
    Released,
    Resolved,
    SendState,
    ShardAddress,
    Sharded,
    StaticState,
    Stop,
    SyncerHeader,
    Welcome,
    WhoAreYou,
)

__all__ = [
    "Adopted",
    "BatchChosen",
    "Busy",
    "Contribution",
    "Describe",
    "Description",
    "Discarded",
    "Envelope",
    "Fenced",
    "Found",
    "FoundingFragment",
    "FoundingStatic",
    "FromLearner",
    "FromObserver",
    "FromSyncer",
    "Granted",
    "Header",
    "Heartbeat",
    "HeldFragment",
    "Hello",
    "ID_IN_USE",
    "JoinRefused",
    "LearnerHeader",
    "LeaseGrant",
    "LeaseRequest",
    "Leave",
    "Left",
    "Message",
    "NeedFull",
    "NotHeld",
    "PROTOCOL_VERSION",
    "Paused",
    "PeerState",
    "PeerStateRequest",
    "PeerStateWanted",
    "Ping",
    "Pong",
    "Progress",
    "Publication",
    "Pull",
    "Ready",
    "Recall",
    "Released",
    "Resolved",
    "SendState",
    "ShardAddress",
    "Sharded",
    "StaticState",
    "Status",
    "StatusRefused",
    "StatusRequest",
    "Stop",
    "StopRequest",
    "SyncerHeader",
    "ToObserver",
    "Unresolved",
    "Welcome",
    "WhoAreYou",
]

PROTOCOL_VERSION = 6
"""Raised by one whenever a message changes; both sides must speak the same."""

Header = LearnerHeader | SyncerHeader


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """What stands around every message: whose job, which history, which life of the sender."""

    job_id: Name
    lineage: Name
    epoch: Count
    incarnation: Count
