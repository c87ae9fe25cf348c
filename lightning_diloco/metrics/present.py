"""What a running job is doing now: rates, staleness, members, refusals. A fold over the tape beside `SummaryFold`.

`summary.json` says what became of a job's work since T0; who watches a job asks for the last half minute and for what went wrong last.

**Rate** of a learner: inner steps (tokens) between the oldest and the newest report of its present life within `WINDOW_S`, over the time
between them. A learner that reports and does not step falls to 0 within the window.

**Staleness** of a learner: versions between the base of a contribution and the version before the merge that took it; mean over its last
`NUM_STALENESS` merged contributions of fragments of parameters.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from lightning_diloco.protocol.records import (
    ContributionRecord,
    JobRecord,
    JoinRecord,
    LeaveRecord,
    MergeRecord,
    ProgressRecord,
    PublishRecord,
    RestartRecord,
    TapeLine,
)

__all__ = ["NUM_STALENESS", "WINDOW_S", "PresentFold", "PresentLearner"]

WINDOW_S = 30.0
"""Seconds of reports that a rate is taken over."""
NUM_STALENESS = 32
"""Merged contributions that a learner's staleness is the mean of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PresentLearner:
    """One learner id as of the last line.

    Args:
        incarnation: its newest life.
        session: that life's process.
        is_member: whether that life has joined and not left.
        device: as told at the join.
        inner_step: the job's step at its join, plus its own steps since.
        steps_per_s: inner steps per second (None: not known, or no member).
        tokens_per_s: tokens per second, likewise.
        staleness_versions: see the top of this file (None: nothing of it was merged).
        bytes_up: payload bytes of its contributions that were taken, and of its founding; all lives.
        bytes_down: payload bytes that were handed to the transport for it; all lives.
        fault: what went wrong with it last, and when on the tape's clock (None: nothing has).
    """

    incarnation: int
    session: str
    is_member: bool
    device: str
    inner_step: int
    steps_per_s: float | None
    tokens_per_s: float | None
    staleness_versions: float | None
    bytes_up: int
    bytes_down: int
    fault: tuple[str, float] | None


@dataclass(slots=True)
class _Learner:
    incarnation: int = -1
    session: str = ""
    is_member: bool = False
    device: str = ""
    joined_at_step: int = 0
    inner_steps: int = 0
    samples: deque[tuple[float, int, int]] = field(default_factory=deque)
    staleness: deque[int] = field(default_factory=lambda: deque(maxlen=NUM_STALENESS))
    bytes_up: int = 0
    bytes_down: int = 0
    fault: tuple[str, float] | None = None

    def join(self, t_s: float, record: JoinRecord) -> None:
        """A life begins."""
        self.incarnation, self.session, self.is_member = record.incarnation, record.session, True
        self.device, self.joined_at_step, self.inner_steps = record.device, record.job_step, 0
        self.samples = deque([(t_s, 0, 0)])

    def report(self, t_s: float, record: ProgressRecord) -> None:
        """Totals of a life; those of one that is over say nothing about the present."""
        if record.incarnation != self.incarnation:
            return
        self.inner_steps = max(self.inner_steps, record.inner_steps)
        self.samples.append((t_s, record.inner_steps, record.tokens))
        while len(self.samples) > 2 and self.samples[0][0] < t_s - WINDOW_S:
            self.samples.popleft()

    def shown(self) -> PresentLearner:
        """As of the last line."""
        (first_s, first_steps, first_tokens), (last_s, steps, tokens) = (
            (self.samples[0], self.samples[-1]) if self.samples else 2 * ((0.0, 0, 0),)
        )
        has_rate = self.is_member and last_s > first_s
        return PresentLearner(
            incarnation=max(self.incarnation, 0),
            session=self.session,
            is_member=self.is_member,
            device=self.device,
            inner_step=self.joined_at_step + self.inner_steps,
            steps_per_s=(steps - first_steps) / (last_s - first_s) if has_rate else None,
            tokens_per_s=(tokens - first_tokens) / (last_s - first_s) if has_rate else None,
            staleness_versions=sum(self.staleness) / len(self.staleness) if self.staleness else None,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            fault=self.fault,
        )


class PresentFold:
    """Folds a tape into what is happening at its end."""

    def __init__(self) -> None:
        self.refused: dict[str, int] = {}
        """Contributions refused so far, by reason."""
        self.epoch = 0
        self._learners: dict[int, _Learner] = {}
        self._counted: set[int] = set()
        self._bases: dict[tuple[int, int, int], int] = {}

    @property
    def num_members(self) -> int:
        """Learners whose newest life has joined and not left."""
        return sum(learner.is_member for learner in self._learners.values())

    def learners(self) -> dict[int, PresentLearner]:
        """Every learner that joined, by id."""
        return {m: learner.shown() for m, learner in sorted(self._learners.items()) if learner.incarnation >= 0}

    def feed(self, line: TapeLine) -> None:
        """Take the next line of the tape."""
        t_s = line.t_s
        match line.record:
            case JobRecord() as record:
                self._counted = {f.fragment_id for f in record.fragments if f.kind == "parameters"}
                self.epoch = record.epoch
                self._of(record.founder_id).bytes_up += record.founding_bytes
            case JoinRecord() as record:
                self._of(record.learner_id).join(t_s, record)
            case ProgressRecord() as record:
                self._of(record.learner_id).report(t_s, record)
            case LeaveRecord() as record:
                self._leave(t_s, record)
            case ContributionRecord() as record:
                self._contribution(t_s, record)
            case MergeRecord() as record:
                self._merge(record)
            case PublishRecord() as record:
                for learner_id in record.learners:
                    self._of(learner_id).bytes_down += record.payload_bytes
            case RestartRecord() as record:
                # What was held is lost; it comes again under the same numbers, from another base.
                self.epoch = record.epoch
                self._bases.clear()
            case _:
                pass

    def _of(self, learner_id: int) -> _Learner:
        return self._learners.setdefault(learner_id, _Learner())

    def _leave(self, t_s: float, record: LeaveRecord) -> None:
        learner = self._of(record.learner_id)
        if record.incarnation == learner.incarnation:
            learner.is_member = False
        if record.reason in ("died", "fenced"):
            learner.fault = (f"life {record.incarnation} ended: {record.reason}", t_s)

    def _contribution(self, t_s: float, record: ContributionRecord) -> None:
        learner = self._of(record.learner_id)
        if record.outcome == "refused":
            reason = record.reason or "unknown"
            self.refused[reason] = self.refused.get(reason, 0) + 1
            learner.fault = (f"contribution to fragment {record.fragment_id} refused: {reason}", t_s)
        elif record.outcome != "duplicate":
            learner.bytes_up += record.payload_bytes
            self._bases[record.learner_id, record.fragment_id, record.seq] = record.base.n

    def _merge(self, record: MergeRecord) -> None:
        for member in record.members:
            base_n = self._bases.pop((member.learner_id, record.fragment_id, member.seq), None)
            if base_n is not None and record.fragment_id in self._counted:
                self._of(member.learner_id).staleness.append(max(0, record.version.n - 1 - base_n))
