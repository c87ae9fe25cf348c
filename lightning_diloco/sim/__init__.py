"""A simulator of whole jobs: the real machines of `lightning_diloco.protocol` on a virtual clock.

Nothing here reads a clock, opens a socket or imports torch. `simulate(options)` gives the tape of a job, the same bytes for the same
options. Two quick learners and one of a quarter of their speed, one of which dies and is replaced:

    >>> from lightning_diloco.config import SyncConfig
    >>> from lightning_diloco.sim import Kill, SimLearner, SimOptions, Takeover, simulate
    >>> result = simulate(
    ...     SimOptions(
    ...         config=SyncConfig(num_fragments=4, sync_interval_steps=8),
    ...         learners=(SimLearner(), SimLearner(), SimLearner(step_s=4.0)),
    ...         happenings=(Kill(learner_id=1, at_s=100.5), Takeover(learner_id=1, at_s=110.0)),
    ...         stop_at_s=400.0,
    ...     )
    ... )
    >>> result.status, result.processes, result.pending
    ('finished', ((0, 'left'), (1, 'killed'), (2, 'left'), (1, 'left')), {})
    >>> summary = result.summary()
    >>> summary["tokens_pending"], [learner["incarnations"] for learner in summary["learners"]]
    (0, [1, 2, 1])
"""

from __future__ import annotations

from lightning_diloco.sim.engine import Engine
from lightning_diloco.sim.options import Cut, Freeze, Kill, Link, Pause, SimLearner, SimOptions, Takeover
from lightning_diloco.sim.world import SimResult, simulate

__all__ = [
    "Cut",
    "Engine",
    "Freeze",
    "Kill",
    "Link",
    "Pause",
    "SimLearner",
    "SimOptions",
    "SimResult",
    "Takeover",
    "simulate",
]
