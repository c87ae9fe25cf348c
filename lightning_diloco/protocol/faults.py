"""What a message says that no learner of this job can say. The limits of the wire are wider; who breaks these loses its session."""

from __future__ import annotations

from typing import Final, get_args

from lightning_diloco.protocol.identity import DiscardReason
from lightning_diloco.protocol.job import Job
from lightning_diloco.protocol.messages import Contribution, FromLearner, Heartbeat, Leave

__all__ = ["fault_of"]

MAX_TOTAL = 2**53
"""No counter of a learner gets above this: weights are floats, and sums of a few of them must stay within the wire's 62 bits."""
REPORTED_DISCARDS: Final = ("overwritten", "nonfinite", "norm")
"""What a learner may say of discarded tokens, and `rollback` after a restart; all other reasons are the syncer's own findings."""


def fault_of(job: Job, message: FromLearner | Contribution) -> str:
    """What of this message no learner of this job can say, or nothing. The limits of the wire are wider."""
    report = message.report if isinstance(message, Leave) else message
    fragment_id = getattr(report, "fragment_id", 0)
    if fragment_id >= job.num_fragments:
        return f"fragment_id={fragment_id}: the job has {job.num_fragments} fragments."
    totals = [(name, getattr(report, name, 0)) for name in ("inner_step", "tokens", "total_tokens", "seq", "first_gap", "samples")]
    totals += [("again", count) for _, count in getattr(report, "again", ())]
    totals += [("before", grant.before) for grant in getattr(report, "known", ())]
    for name, total in totals:
        if total > MAX_TOTAL:
            return f"{name}={total}: no learner gets above {MAX_TOTAL}; totals must stay exact in 64 bits."
    return _false_discards(job, report) if isinstance(report, Heartbeat) else ""


def _false_discards(job: Job, report: Heartbeat) -> str:
    """What is wrong with its list of discarded tokens: a running total for each fragment and reason, and no other reasons."""
    limit = len(get_args(DiscardReason)) * job.num_fragments
    if len(report.discarded) > limit:
        return f"discarded: {len(report.discarded)} totals, but {job.num_fragments} fragments have at most {limit}."
    for item in report.discarded:
        is_possible = item.reason in REPORTED_DISCARDS or (item.reason == "rollback" and job.epoch > 0)
        if item.fragment_id >= job.num_fragments or not is_possible:
            return f"discarded: ({item.fragment_id}, {item.reason!r}) is no fragment or reason that a learner of this job reports."
    if len({(item.fragment_id, item.reason) for item in report.discarded}) < len(report.discarded):
        return "discarded: there is one running total for each fragment and reason."
    return ""
