"""What an observer asks and is told. An observer holds no slot, has no session, and changes nothing.

Its question reaches the syncer on the control socket and is answered beside the rules (`runtime/observers.py`): `SyncerMachine` never
hears of it. The answer is bounded: of at most `MAX_TOLD` learners everything is told, of the rest their number.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lightning_diloco.protocol.identity import Count, Seconds
from lightning_diloco.protocol.message_base import Message, Name, Sentence

__all__ = ["MAX_TOLD", "Fault", "FromObserver", "LearnerStatus", "Status", "StatusRefused", "StatusRequest", "ToObserver"]

MAX_TOLD = 256
"""Learners that one answer tells of."""

_Share = Annotated[float, Meta(ge=0.0, le=1.0)]
_Rate = Annotated[float, Meta(ge=0.0)]
_Text = Annotated[str, Meta(max_length=200)]
"""What a peer said of itself, cut: 256 of them and their faults fit into one control message."""


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that went wrong, and how long ago."""

    what: _Text
    age_s: Seconds


class LearnerStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One learner as the syncer sees it.

    Args:
        learner_id: its id.
        incarnation: its newest life.
        device: as it calls it.
        state: joining (not a member, or no step done yet), active (pulled, counts for the quorum), paused (validation, checkpoint),
            leaving (its last words are on their way), silent (its step counter stands still, or it missed a round's deadline), gone.
        heard_age_s: since the last sign of life (None: gone).
        inner_step: on the job's scale: where it joined, plus the steps of this life.
        tokens: of all its lives.
        version_min, version_max: n of the versions that were delivered to it, over its fragments (None: none).
        participation: merges with a contribution of it, of those that it could have been in.
        staleness_versions: versions between the base of a contribution and the version that it was merged onto, mean of the last ones.
        steps_per_s, tokens_per_s: over the last half minute.
        bytes_up, bytes_down: payload bytes taken from it, and handed to the transport for it.
        fault: what went wrong with it last.
    """

    learner_id: Count
    incarnation: Count
    device: _Text
    state: Literal["joining", "active", "paused", "leaving", "silent", "gone"]
    heard_age_s: Seconds | None
    inner_step: Count
    tokens: Count
    version_min: Count | None
    version_max: Count | None
    participation: _Share | None
    staleness_versions: _Rate | None
    steps_per_s: _Rate | None
    tokens_per_s: _Rate | None
    bytes_up: Count
    bytes_down: Count
    fault: Fault | None = None


class StatusRequest(Message, frozen=True, kw_only=True):
    """Asks how the job is.

    `token`: where the syncer has one for observers (local mode: it stands in the run directory's ``syncer.json``).
    """

    protocol_version: Count
    token: Name = ""


class StatusRefused(Message, frozen=True, kw_only=True):
    """No answer, and why."""

    reason: Literal["token", "protocol_version"]
    detail: Sentence


class Status(Message, frozen=True, kw_only=True):
    """The job at this moment. Figures are those of `summary.json`, of the same names, as of the last reading of the tape.

    Args:
        status: waiting (for its founder), recovering (a syncer that started again collects what learners hold), running; finished,
            stopped, failed: the end, said once more to whoever asked lately.
        num_members: learners that hold all fragments; num_active: those that are pulled and count for the quorum.
        num_fragments: of parameters, and one of running statistics if the model has any.
        version_min, version_max: n of the published versions, over the fragments (None: not founded).
        open_rounds: fragments whose round collects or merges.
        num_learners: ids that ever joined or are joining; of `MAX_TOLD` of them `learners` tells, those that are present first.
        refused_join: the last process that was turned away and was no member.
    """

    job_id: Name
    epoch: Count
    status: Literal["waiting", "recovering", "running", "finished", "stopped", "failed"]
    wall_s: Seconds | None
    merges: Count
    mean_members: _Rate | None
    num_members: Count
    num_active: Count
    num_fragments: Count
    version_min: Count | None
    version_max: Count | None
    open_rounds: Count
    tokens: Count
    tokens_merged: Count
    tokens_pending: Count
    tokens_discarded: Count
    bytes_up: Count
    bytes_down: Count
    goodput: _Share | None
    uptime: _Share | None
    num_learners: Count
    learners: Annotated[tuple[LearnerStatus, ...], Meta(max_length=MAX_TOLD)]
    refused_join: Fault | None = None


FromObserver = StatusRequest
ToObserver = Status | StatusRefused
