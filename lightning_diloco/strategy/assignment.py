"""A process's place in a job: which learner it is, where the syncer answers, where its files go.

Made by whoever starts the learner (supervisor, inline launcher, or the strategy itself for a learner of a foreign syncer), given to the
strategy, and never pickled with the Trainer: a payload is the same for all learners, an assignment is one process's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diloco.runtime.counters import counters_folder
from lightning_diloco.runtime.keys import SiteKeys
from lightning_diloco.runtime.rejoin import FOLDER
from lightning_diloco.strategy.options import ProcessOptions, Role

if TYPE_CHECKING:
    import zmq

__all__ = ["CHECKPOINT_DUMP", "Assignment"]

CHECKPOINT_DUMP = "fit.ckpt"
"""Learner 0's training state at its end, in the launch folder; the supervisor makes ``checkpoints/last.ckpt`` of it."""


_PATIENCE_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one learner process is and knows."""

    role: Role
    """Never ``supervisor``: a supervisor trains nothing."""
    endpoint: str
    """The syncer's control endpoint."""
    learner_id: int = 0
    """Its id; for an ``island`` without a given id the syncer decides at the join, and this stays 0."""
    is_id_given: bool = True
    """Whether `learner_id` is to be asked for at the join."""
    num_learners: int = 1
    """How many learners share the training data."""
    life: int = 0
    """How many processes of this learner the supervisor has started before."""
    keys: Path | None = None
    """Folder of this site's keys; None: the link is not encrypted."""
    token: str = ""
    """The job's token."""
    takeover_token: str = ""
    """Lets this process take over the id of a dead predecessor."""
    run_dir: Path | None = None
    """Where counters and rejoin checkpoints go; None: nowhere."""
    launch_dir: Path | None = None
    """Where learner 0 leaves its final training state; None: nowhere."""
    spare_dir: Path | None = None
    """Where it does if `launch_dir` does not take it; None: nowhere."""
    context: zmq.Context[Any] | None = None
    """Shared with the syncer's thread, for inproc endpoints."""

    @classmethod
    def of_island(cls, options: ProcessOptions) -> Assignment:
        """That of a learner of a syncer elsewhere; makes the folder for its counters if it has a run directory."""
        assert options.syncer is not None
        run_dir = options.run_dir
        if run_dir is not None:
            counters_folder(run_dir)
        return cls(
            role="island",
            endpoint=options.syncer,
            keys=options.keys,
            learner_id=options.learner_id or 0,
            is_id_given=options.learner_id is not None,
            num_learners=options.num_learners or 1,
            run_dir=run_dir,
        )

    def site_keys(self) -> SiteKeys | None:
        """This site's keys, read now: what a secret is kept in lives as short as possible.

        Raises:
            ConfigurationError: the folder is not what it was in the constructor.
        """
        return None if self.keys is None else SiteKeys.read(self.keys)

    def counters_path(self) -> Path | None:
        """The folder for this process's running totals, which survive its death."""
        return None if self.run_dir is None else self.run_dir / "counters"

    @property
    def join_timeout_s(self) -> float | None:
        """How long a join waits for a syncer; None: the default. A supervised one is looked after, and may wait for room on its disk."""
        return _PATIENCE_S if self.role == "learner" else None

    def rejoin_path(self) -> Path | None:
        """The folder of rejoin checkpoints; None where no later life of this learner could find it, or would look."""
        return None if self.run_dir is None or self.role == "inline" else self.run_dir / FOLDER
