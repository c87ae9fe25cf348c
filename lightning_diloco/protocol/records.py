"""Records: what the event tape holds, one JSON object a line (PROTOCOL.md section 11).

Every figure of `summary.json` is a fold over these records, and a replay executes the merges that they name. The runtime adds `seq` (line
number from 0) and `t_s` (monotonic seconds since the syncer's start) around each; `event` is the tag. Accounts are in integers and
per fragment: tokens = merged + pending + discarded for every learner and fragment.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from lightning_diloco.protocol.identity import (
    Count,
    DataSpec,
    DiscardReason,
    FragmentInfo,
    LeaseRange,
    LeaveReason,
    MergedThrough,
    Refusal,
    Version,
)

__all__ = [
    "BatchRecord",
    "ContributionRecord",
    "CountersRecord",
    "DiscardRecord",
    "EndRecord",
    "JobRecord",
    "JoinRecord",
    "LeaseBackRecord",
    "LeaseLateRecord",
    "LeaseRecord",
    "LeaveRecord",
    "Member",
    "MergeRecord",
    "Outcome",
    "ProgressRecord",
    "PublishRecord",
    "Record",
    "RestartRecord",
    "RoundCancelRecord",
    "RoundOpenRecord",
    "RunRecord",
    "TapeLine",
    "decode_line",
    "encode_line",
]

Outcome = Literal["folded", "carried", "duplicate", "refused"]
"""What became of a contribution when it arrived: into the open round, held for the next one, known already, or refused."""


class _Base(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    pass


class JobRecord(_Base, frozen=True, kw_only=True, tag="job"):
    """The job is founded. `founded_n`: version numbers that it starts from. `num_slots`: configured learners (None: open).

    `payload_at`: where its tensors begin in the file of recorded payloads (None: they are not there).
    `is_rebuilt`: no founding, but what was taken from the learners of a job whose run directory was lost.
    `data`: what is handed out in leases; None: each learner trains on its own part.
    """

    job_id: str
    lineage: str
    epoch: int
    config: dict[str, Any]
    fingerprint: str
    fragments: tuple[FragmentInfo, ...]
    founded_n: tuple[int, ...]
    founder_id: int
    founding_bytes: int
    num_slots: int | None = None
    versions: dict[str, str] = {}
    payload_at: Count | None = None
    is_rebuilt: bool = False
    data: DataSpec | None = None


class JoinRecord(_Base, frozen=True, kw_only=True, tag="join"):
    """An incarnation became a member. The first one of a tape is T0.

    `session` names its process (its nonce), `life` how many its supervisor had started before: a syncer that starts again knows it by them.
    """

    learner_id: int
    incarnation: int
    role: str
    session: str = ""
    life: int = 0
    device: str = ""
    batch_size: int = 0
    tokens_per_step: int = 0
    job_step: int = 0


class ProgressRecord(_Base, frozen=True, kw_only=True, tag="progress"):
    """One report of an incarnation: totals since its start, and each step since the previous report, numbered from 0 at the join.

    `samples`: trained under its leases, in their order; `again`: (epoch, samples) trained once more without a lease.
    """

    learner_id: int
    incarnation: int
    inner_steps: int
    tokens: int
    first_gap: int = 0
    step_gaps_s: tuple[float, ...] = ()
    paused_s: tuple[float, ...] = ()
    stalls_s: tuple[float, ...] = ()
    last_step_age_s: float = 0.0
    is_paused: bool = False
    batch_size: int = 0
    samples: int = 0
    again: tuple[tuple[int, int], ...] = ()


class BatchRecord(_Base, frozen=True, kw_only=True, tag="batch"):
    """A learner has changed its batch. `target_step_s`: what a step was to take (0: nothing was said).

    `batch_size`: samples of a micro-batch; `accumulate`: micro-batches of an inner step; `lr_factor`: of the inner learning rate.
    """

    learner_id: int
    incarnation: int
    inner_step: int
    batch_size: int
    accumulate: int
    lr_factor: float
    reason: str
    target_step_s: float = 0.0


class CountersRecord(_Base, frozen=True, kw_only=True, tag="counters"):
    """Totals of an incarnation that could not report them itself, read from its memory-mapped file.

    `samples`: that it has trained under its leases (None: not known). What it had not reported of them is handed out again.
    """

    learner_id: int
    incarnation: int
    inner_steps: int
    tokens: int
    samples: int | None = None


class LeaseRecord(_Base, frozen=True, kw_only=True, tag="lease"):
    """Sample ranges were handed to an incarnation, which trains them in this order; `samples`: what it had trained by then.

    `number`: of its request. `before`: samples of all its grants before this one. `is_told`: a grant that the tape had lost and its
    learner tells of.
    """

    learner_id: int
    incarnation: int
    number: int
    ranges: tuple[LeaseRange, ...]
    samples: int = 0
    before: int = 0
    is_told: bool = False


class LeaseBackRecord(_Base, frozen=True, kw_only=True, tag="lease_back"):
    """An incarnation is silent, and nobody says whether it is dead: what it holds may be handed to others."""

    learner_id: int
    incarnation: int


class LeaseLateRecord(_Base, frozen=True, kw_only=True, tag="lease_late"):
    """A process whose incarnation had been ended says how many samples it had trained under its leases."""

    learner_id: int
    incarnation: int
    session: str
    samples: int


class LeaveRecord(_Base, frozen=True, kw_only=True, tag="leave"):
    """An incarnation ended."""

    learner_id: int
    incarnation: int
    reason: LeaveReason


class RoundOpenRecord(_Base, frozen=True, kw_only=True, tag="round_open"):
    """A round opened: who is active, who was pulled, whose contribution was carried into it."""

    fragment_id: int
    round_id: int
    quorum: int
    active: tuple[int, ...]
    pulled: tuple[int, ...]
    carried: tuple[int, ...]


class RoundCancelRecord(_Base, frozen=True, kw_only=True, tag="round_cancel"):
    """A round ended without a merge; what was folded stays held."""

    fragment_id: int
    round_id: int
    contributions: int
    quorum: int


class ContributionRecord(_Base, frozen=True, kw_only=True, tag="contribution", rename={"seq": "contribution_seq"}):
    """A contribution was decided on arrival. Its seq stands on the tape as `contribution_seq`: `seq` is the line's number there.

    `payload_at`: where it lies in the file of recorded payloads (None: it is not there).
    """

    learner_id: int
    incarnation: int
    fragment_id: int
    seq: int
    base: Version
    steps: int
    tokens: int
    weight: float
    norm: float
    payload_bytes: int
    outcome: Outcome
    reason: Refusal | None = None
    is_final: bool = False
    payload_at: Count | None = None


class DiscardRecord(_Base, frozen=True, kw_only=True, tag="discard"):
    """Tokens of one learner and fragment will never be merged (an increment, not a total).

    `incarnation`: whose report says so; None: the syncer found it.
    """

    learner_id: int
    fragment_id: int
    reason: DiscardReason
    tokens: int
    incarnation: int | None = None


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One contribution inside a merge."""

    learner_id: int
    incarnation: int
    seq: int
    steps: int
    tokens: int
    weight: float


class MergeRecord(_Base, frozen=True, kw_only=True, tag="merge"):
    """One merge: members in fold order, and everything a replay needs but the payloads.

    `eligible`: learners that were joined, not paused and had work when it closed. `norms`: per member, per tensor; `scales`: per tensor.
    `last_share`: None, or every member had said a last word: the longest contribution in sync intervals, at most 1. The step then left the
    momentum as it was, and `outer_momentum` is 0.
    """

    fragment_id: int
    round_id: int
    version: Version
    members: tuple[Member, ...]
    eligible: tuple[int, ...]
    quorum: int
    quorum_s: float
    grace_window_s: float
    grace_used_s: float
    merge_s: float
    outer_lr: float
    outer_momentum: float
    crc: int
    last_share: float | None = None
    norms: tuple[tuple[float, ...], ...] = ()
    scales: tuple[float, ...] = ()


class PublishRecord(_Base, frozen=True, kw_only=True, tag="publish"):
    """A version was handed to the transport for these learners (`is_full`: the float32 shadow instead of a difference)."""

    fragment_id: int
    version: Version
    is_full: bool
    learners: tuple[int, ...]
    payload_bytes: int


class RestartRecord(_Base, frozen=True, kw_only=True, tag="restart"):
    """A syncer goes on with the job after a restart, from these versions; merges above them are undone.

    `merged_through`: what is in them, per fragment. `recalled`: fragments whose values came from a learner, not from the snapshot.
    `origins`: the version, of an earlier epoch, that each of them was. `momenta`: the version whose outer momentum goes on (None: it begins
    at zero): for what came from a learner that of the snapshot, which may be older than the values, or of a branch that was given up.
    """

    epoch: int
    versions: tuple[Version, ...]
    merged_through: tuple[dict[int, MergedThrough], ...] = ()
    recalled: tuple[int, ...] = ()
    origins: tuple[Version, ...] = ()
    momenta: tuple[Version | None, ...] = ()


class EndRecord(_Base, frozen=True, kw_only=True, tag="end"):
    """The drain is over: T1. `versions`: n per fragment."""

    status: Literal["finished", "stopped", "failed"]
    versions: tuple[int, ...]
    global_sha256: str | None


class RunRecord(_Base, frozen=True, kw_only=True, tag="run"):
    """What only the supervisor knows, appended after the end: start-up time, restarts, validation of the global model.

    `startup_s`: None if it saw no first join: nobody joined, or it began after that. In `val` None is a metric that is not finite.
    """

    status: Literal["finished", "stopped", "failed"]
    startup_s: float | None
    restarts: dict[str, int]
    val: dict[str, float | None] | None


Record = (
    JobRecord
    | JoinRecord
    | ProgressRecord
    | BatchRecord
    | CountersRecord
    | LeaseRecord
    | LeaseBackRecord
    | LeaseLateRecord
    | LeaveRecord
    | RoundOpenRecord
    | RoundCancelRecord
    | ContributionRecord
    | DiscardRecord
    | MergeRecord
    | PublishRecord
    | RestartRecord
    | EndRecord
    | RunRecord
)


class TapeLine(msgspec.Struct, frozen=True):
    """A record with its place and time on the tape."""

    seq: int
    t_s: float
    record: Record


_DECODER: Final = msgspec.json.Decoder(Record)


class _Stamp(msgspec.Struct, frozen=True):
    seq: int
    t_s: float


_STAMP: Final = msgspec.json.Decoder(_Stamp)


def encode_line(line: TapeLine) -> bytes:
    """One line of the tape, newline included: `{"seq", "t_s", "event", ...}`."""
    body = msgspec.json.encode(line.record)
    return b'{"seq":%d,"t_s":%.6f,' % (line.seq, line.t_s) + body[1:] + b"\n"


def decode_line(data: bytes) -> TapeLine:
    """Read one line of a tape.

    Raises:
        ValueError: the line is no record (a half-written last line, for one).
    """
    stamp = _STAMP.decode(data)
    return TapeLine(stamp.seq, stamp.t_s, _DECODER.decode(data))
