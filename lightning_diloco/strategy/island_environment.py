"""What Lightning is told of the cluster when this process is one learner of a syncer elsewhere: that it stands alone.

torchrun, SLURM and MPI number the processes that they start, and Lightning takes whatever they number for the ranks of one job: with
several tasks of SLURM it refuses ``devices=1``, and it answers SLURM's signals by asking for a requeue of its own. Here every process is
a learner, whose place in the job is ``learner_id``. So what a scheduler says of its tasks is not looked at.
"""

from __future__ import annotations

from lightning.fabric.plugins import ClusterEnvironment
from typing_extensions import override

__all__ = ["IslandEnvironment", "choose_environment"]


class IslandEnvironment(ClusterEnvironment):
    """One process, started by somebody else, rank 0 of 1."""

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    @override
    def main_port(self) -> int:
        """Nobody meets there: there is no process group."""
        return 0

    @staticmethod
    @override
    def detect() -> bool:
        """Never by itself: it is the strategy that knows."""
        return False

    @override
    def world_size(self) -> int:
        return 1

    @override
    def set_world_size(self, size: int) -> None:
        """It is 1."""

    @override
    def global_rank(self) -> int:
        return 0

    @override
    def set_global_rank(self, rank: int) -> None:
        """The strategy has one of its own, the learner's id."""

    @override
    def local_rank(self) -> int:
        return 0

    @override
    def node_rank(self) -> int:
        return 0


def choose_environment(given: ClusterEnvironment | None, syncer: str | None) -> ClusterEnvironment | None:
    """The environment that the strategy brings along.

    Args:
        given: the user's, which is left as it is.
        syncer: of a syncer elsewhere; None: this process brings its own, and Lightning looks around.
    """
    return given if given is not None or syncer is None else IslandEnvironment()
