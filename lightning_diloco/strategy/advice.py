"""What a finished run's figures say that its user should know: sentences with the figure and the remedy.

Nobody looks at participation when all processes are alive and the loss falls, and a job whose merges hold half of the learners wastes the
other half's work for an interval each time, or worse: with outer momentum, contributions that learned the same thing and arrive one after
the other add up instead of being averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["advise"]

LOW_PARTICIPATION = 0.8
"""Below it a learner is told about. Two equal learners that answer in time have 1.0, one that is always late about 0.5."""
FEW_ROUNDS = 20
"""Of fewer merges a share says little."""


def advise(summary: Mapping[str, Any]) -> list[str]:
    """Sentences about the figures of one run.

    Args:
        summary: the content of ``summary.json``; may be empty.

    Returns:
        One sentence for each thing to know; none for a run with nothing to say about.
    """
    learners = summary.get("learners", [])
    late = [row for row in learners if row["rounds_eligible"] >= FEW_ROUNDS and row["participation"] < LOW_PARTICIPATION]
    if not late:
        return []
    worst, config = min(late, key=lambda row: row["participation"]), summary["config"]
    quorum, overlap = config["min_quorum"], config["overlap_steps"]
    pace = "" if worst["step_median_s"] is None else f", with steps of {1e3 * worst['step_median_s']:.1f} ms"
    longer = f"overlap_steps={2 * max(1, overlap)}, so that answers have more time."
    remedy = (
        f"Pass {longer}"
        if quorum >= len(learners)
        else f"Pass min_quorum={len(learners)}, so that a merge waits for all learners that are active, or {longer}"
    )
    return [
        f"{len(late)} of {len(learners)} learners had a participation below {LOW_PARTICIPATION:g}; the lowest is learner "
        f"{worst['learner_id']}, in {100 * worst['participation']:.0f} % of the merges it could have been in{pace}. A merge waits for "
        f"min_quorum={quorum} contributions and then for the grace window, which is 0 where answers take more than "
        f"overlap_steps={overlap} steps. {remedy}"
    ]
