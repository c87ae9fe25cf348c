"""The content of `summary.json`, folded from the tape one line at a time.

`SummaryFold.feed` takes lines in their order; `result` may be asked at any time and does not change what later lines mean. Undefined
figures (0/0, or not known yet) are None. What only the supervisor knows (start-up time, restarts, validation) is None, or 0 for
restarts, until a `run` record was fed; without one, `startup_s` is the time from the syncer's start to T0, which is its meaning in
island mode.
"""

from __future__ import annotations

from typing import Any

from lightning_diloco.metrics.accounts import TokenAccounts
from lightning_diloco.metrics.activity import Activity
from lightning_diloco.metrics.participation import MergeLog
from lightning_diloco.protocol.lease_fold import fold_leases
from lightning_diloco.protocol.leases import LeaseLedger
from lightning_diloco.protocol.records import (
    BatchRecord,
    ContributionRecord,
    CountersRecord,
    DiscardRecord,
    EndRecord,
    JobRecord,
    JoinRecord,
    LeaveRecord,
    MergeRecord,
    ProgressRecord,
    PublishRecord,
    RestartRecord,
    RunRecord,
    TapeLine,
)

__all__ = ["SCHEMA", "SummaryFold"]

SCHEMA = 1
"""Raised when a figure changes its name or meaning."""


class SummaryFold:
    """Folds a tape into `summary.json`."""

    def __init__(self) -> None:
        self._merges = MergeLog()
        self._accounts = TokenAccounts(self._merges)
        self._activity = Activity()
        self._job: JobRecord | None = None
        self._versions: dict[int, int] = {}
        self._bytes_up = 0
        self._bytes_down = 0
        self._last_s = 0.0
        self._end: tuple[float, EndRecord] | None = None
        self._run: RunRecord | None = None
        self._startup_s: float | None = None
        self._leases: LeaseLedger | None = None
        self._sessions: dict[tuple[int, int], str] = {}

    @property
    def has_run_record(self) -> bool:
        """Whether the supervisor's last word was fed."""
        return self._run is not None

    def feed(self, line: TapeLine) -> None:
        """Take the next line of the tape."""
        t_s = line.t_s
        self._last_s = max(self._last_s, t_s)
        self._fold_leases(line)
        match line.record:
            case JobRecord() as record:
                self._found(record)
            case JoinRecord() as record:
                self._activity.join(t_s, record)
            case ProgressRecord() as record:
                self._activity.progress(t_s, record)
                self._accounts.report(record.learner_id, record.incarnation, record.inner_steps, record.tokens)
            case BatchRecord() as record:
                self._activity.chose(record)
            case CountersRecord() as record:
                self._accounts.report(record.learner_id, record.incarnation, record.inner_steps, record.tokens)
            case LeaveRecord() as record:
                self._activity.leave(t_s, record)
            case ContributionRecord(outcome="folded" | "carried") as record:
                self._bytes_up += record.payload_bytes
            case DiscardRecord() as record:
                self._accounts.discard(record)
            case MergeRecord() as record:
                self._merges.merge(record)
                self._versions[record.fragment_id] = record.version.n
            case PublishRecord() as record:
                self._bytes_down += record.payload_bytes * len(record.learners)
            case RestartRecord() as record:
                self._restart(record)
            case EndRecord() as record:
                self._end = (t_s, record)
            case RunRecord() as record:
                self._run = record
                # A syncer that goes on with a job has not seen its first join; the one before it may have.
                self._startup_s = record.startup_s if record.startup_s is not None else self._startup_s
            case _:
                pass  # rounds opened and cancelled, and what was refused, enter no figure of the summary

    def result(self, status: str | None = None, now_t_s: float | None = None, *, is_strict: bool = True) -> dict[str, Any]:
        """The content of `summary.json` as of the lines fed.

        Args:
            status: overrides what the tape says: the run record's, else the end record's, else "running".
            now_t_s: the present moment on the tape's clock, for a running job (None: the time of the last line).
            is_strict: check the ledger after the end. False takes a learner's tokens as at least what is accounted for, as it is
                done while the job runs, so that a summary can be had of a tape that lacks the last reports.

        Raises:
            LedgerError: after the end, more was merged and discarded of a learner than it has trained.
        """
        self._accounts.is_final = is_strict and self._end is not None
        job, t0_s = self._job, self._activity.first_join_s
        end_s = self._end[0] if self._end else max(self._last_s, now_t_s or 0.0)
        ids = self._activity.learner_ids()
        learners = [self._learner(m) for m in ids]
        kept = {x["learner_id"]: 1.0 - x["discarded"] / x["tokens"] if x["tokens"] else 1.0 for x in learners}
        goodput, goodput_alive = self._activity.goodput(end_s, kept)
        return {
            "schema": SCHEMA,
            "status": status or self._status(),
            "job_id": job.job_id if job else None,
            "config": dict(job.config) if job else {},
            "versions": dict(job.versions) if job else {},
            "startup_s": t0_s if self._startup_s is None else self._startup_s,
            "wall_s": end_s - t0_s if t0_s is not None else None,
            "merges": self._num_merges(),
            "mean_members": self._merges.mean_members(),
            **self._tokens(ids),
            "bytes_up": self._bytes_up,
            "bytes_down": self._bytes_down,
            "goodput": goodput,
            "goodput_alive": goodput_alive,
            "uptime": self._activity.uptime(end_s),
            "val": dict(self._run.val) if self._run and self._run.val is not None else None,
            "global_sha256": self._end[1].global_sha256 if self._end else None,
            "restarts": dict(self._run.restarts) if self._run else {"learners": 0, "syncer": 0},
            "steps_lost": self._accounts.steps_lost(),
            "leases": self._leases.accounts() if self._leases is not None else None,
            "learners": learners,
        }

    def _fold_leases(self, line: TapeLine) -> None:
        self._leases = fold_leases(self._leases, line.record, self._sessions)

    def _found(self, record: JobRecord) -> None:
        self._job = record
        self._activity.num_slots = record.num_slots
        self._accounts.found(record.fragments)
        self._merges.found(record.fragments)
        self._versions = {f.fragment_id: n for f, n in zip(record.fragments, record.founded_n, strict=True)}
        self._bytes_up += record.founding_bytes

    def _num_merges(self) -> int:
        """By the versions: a full disk keeps merges off the tape."""
        if self._job is None:
            return 0
        founded = zip(self._job.fragments, self._job.founded_n, strict=True)
        return sum(self._versions[f.fragment_id] - n for f, n in founded if f.kind == "parameters")

    def _restart(self, record: RestartRecord) -> None:
        self._versions = {p: version.n for p, version in zip(self._versions, record.versions, strict=True)}
        through = dict(zip(self._versions, record.merged_through, strict=True)) if record.merged_through else None
        self._merges.restart(self._versions, through)
        self._end = self._run = None

    def _status(self) -> str:
        if self._run:
            return self._run.status
        return self._end[1].status if self._end else "running"

    def _tokens(self, ids: list[int]) -> dict[str, Any]:
        accounts = self._accounts
        infos = [f for f in self._job.fragments if f.kind == "parameters"] if self._job else []
        per_fragment = {f.fragment_id: accounts.fragment(f.fragment_id, ids) for f in infos}
        tokens = sum(accounts.tokens(m) for m in ids)
        merged = accounts.weighted({p: a.merged for p, a in per_fragment.items()})
        discarded = accounts.weighted({p: a.discarded for p, a in per_fragment.items()})
        return {
            "tokens": tokens,
            "tokens_merged": merged,
            "tokens_discarded": discarded,
            "tokens_pending": tokens - merged - discarded,
            "discarded_by_reason": accounts.discarded_by_reason(ids),
            "fragments": [
                {
                    "fragment_id": f.fragment_id,
                    "version": self._versions[f.fragment_id],
                    "num_params": f.num_params,
                    "merged": per_fragment[f.fragment_id].merged,
                    "pending": per_fragment[f.fragment_id].pending,
                    "discarded": per_fragment[f.fragment_id].discarded,
                }
                for f in infos
            ],
        }

    def _learner(self, learner_id: int) -> dict[str, Any]:
        activity, merges, accounts = self._activity, self._merges, self._accounts
        return {
            "learner_id": learner_id,
            "incarnations": activity.incarnations(learner_id),
            "inner_steps": accounts.inner_steps(learner_id),
            "tokens": accounts.tokens(learner_id),
            "stall_s": activity.stall_s(learner_id),
            "stall_p99_s": activity.stall_p99_s(learner_id),
            "step_median_s": activity.step_median_s(learner_id),
            "rounds_merged": merges.rounds_merged(learner_id),
            "rounds_eligible": merges.rounds_eligible(learner_id),
            "participation": merges.participation(learner_id),
            "batch_size": activity.batch_size(learner_id),
            "batches": activity.batches(learner_id),
            "samples": self._leases.samples(learner_id) if self._leases is not None else None,
            "discarded": accounts.discarded(learner_id),
        }
