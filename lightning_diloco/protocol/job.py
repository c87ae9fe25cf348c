"""The syncer's state of one job, shared by the parts of `SyncerMachine`; nothing here decides anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_diloco.config import SyncConfig
from lightning_diloco.protocol.actions import SyncerAction
from lightning_diloco.protocol.gates import NormGate
from lightning_diloco.protocol.grace import GraceWindow
from lightning_diloco.protocol.identity import FragmentInfo, MergedThrough, Refusal, Version
from lightning_diloco.protocol.leases import LeaseLedger
from lightning_diloco.protocol.ledger import Ledger
from lightning_diloco.protocol.members import GIVEN_UP_S, MAX_IDS, SILENT_HEARTBEATS, SILENT_S, Membership
from lightning_diloco.protocol.messages import ShardAddress
from lightning_diloco.protocol.pace import Pace
from lightning_diloco.protocol.publisher import Current, Publisher

__all__ = ["Decision", "Held", "Job", "JobOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What the process that starts a syncer decides.

    Args:
        job_id: name of the job.
        lineage: random name of the history that a founding begins.
        token: what a learner must show ("" = nothing).
        takeover_token: what lets a process take the id of another one ("" = nobody may).
        founder_id: the one learner that may found the job.
        num_slots: configured learners; None = open membership.
        shards: where payloads go.
        is_supervised: the end is decided from outside (`Finish`), not by the last leaver.
        epoch: of this start of a syncer.
        may_found: whether the job may still be empty.
        starts_together: the first lives of all learners are started at once (local mode, a number of learners that is configured), so
            that none of them is a late joiner.
        versions: package versions for the tape.
        shard: which of a syncer's shards this is.
        num_shards: how many it has.
    """

    job_id: str
    lineage: str
    token: str = ""
    takeover_token: str = ""
    founder_id: int = 0
    num_slots: int | None = None
    shards: tuple[ShardAddress, ...] = ()
    is_supervised: bool = False
    starts_together: bool = False
    epoch: int = 0
    may_found: bool = True
    versions: dict[str, str] = field(default_factory=dict)
    shard: int = 0
    num_shards: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An accepted contribution that is folded but not merged yet."""

    learner_id: int
    incarnation: int
    seq: int
    steps: int
    tokens: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was decided on one seq; a later copy gets the same answer."""

    crc: int
    outcome: Literal["held", "merged", "refused"]
    reason: Refusal | None = None


class Job:
    """State of a job from its founding on; before, only `options` and the membership mean anything."""

    def __init__(self, options: JobOptions) -> None:
        self.options = options
        self.members = Membership()
        self.publisher = Publisher()
        self.epoch = options.epoch
        self.is_recovering = False
        self.config = SyncConfig()
        self.fingerprint = ""
        self.fragments: tuple[FragmentInfo, ...] = ()
        self.static_crc = 0
        self.static_bytes = 0
        self.currents: list[Current] = []
        self.last_seq: dict[tuple[int, int], int] = {}
        self.decisions: dict[tuple[int, int], dict[int, Decision]] = {}
        self.ledger = Ledger(0)
        self.leases: LeaseLedger | None = None
        """None: each learner trains on its own part of the data."""
        self.stop_reason: str | None = None
        self.finish_status: str | None = None
        self.is_ended = False
        self._prepare()

    def found(self, *, config: SyncConfig, fingerprint: str, fragments: tuple[FragmentInfo, ...], currents: list[Current]) -> None:
        """Begin the history. The caller has checked that the job is empty."""
        self.config, self.fingerprint, self.fragments, self.currents = config, fingerprint, fragments, currents
        self.ledger = Ledger(len(fragments))
        self._prepare()

    def restore(
        self,
        *,
        config: SyncConfig,
        fingerprint: str,
        fragments: tuple[FragmentInfo, ...],
        currents: list[Current],
        ledger: Ledger,
        last_seq: dict[tuple[int, int], int],
    ) -> None:
        """Go on with a history that another syncer began."""
        self.found(config=config, fingerprint=fingerprint, fragments=fragments, currents=currents)
        self.ledger, self.last_seq, self.is_recovering = ledger, last_seq, True

    @property
    def is_founded(self) -> bool:
        """Whether there is a global model."""
        return bool(self.currents)

    @property
    def is_serving(self) -> bool:
        """Whether there is a global model that can be given to learners."""
        return self.is_founded and not self.is_recovering

    @property
    def num_fragments(self) -> int:
        """P."""
        return len(self.fragments)

    @property
    def num_ids(self) -> int:
        """Learner ids that there can be."""
        return MAX_IDS if self.options.num_slots is None else min(self.options.num_slots, MAX_IDS)

    @property
    def silent_after_s(self) -> float:
        """Silence, in seconds, after which a process may be replaced and is not waited for at the end."""
        return max(SILENT_S, SILENT_HEARTBEATS * self.config.heartbeat_s)

    @property
    def given_up_after_s(self) -> float:
        """Silence, in seconds, after which a process is taken for dead where no supervisor says so."""
        return max(GIVEN_UP_S, SILENT_HEARTBEATS * self.config.heartbeat_s)

    def merged_seq(self, learner_id: int, fragment_id: int) -> int:
        """Highest seq of this learner in the fragment's current version (0: none)."""
        through = self.currents[fragment_id].merged_through.get(learner_id)
        return through.seq if through is not None else 0

    def next_seq(self, learner_id: int) -> tuple[int, ...]:
        """The next seq per fragment for a new life of this learner."""
        return tuple(self.last_seq.get((learner_id, f.fragment_id), 0) + 1 for f in self.fragments)

    def decide(self, learner_id: int, fragment_id: int, seq: int, decision: Decision) -> None:
        """Remember a decision; the last few of each learner and fragment are enough, older seqs cannot come back."""
        key = (learner_id, fragment_id)
        known = self.decisions.setdefault(key, {})
        known[seq] = decision
        while len(known) > 4:
            known.pop(next(iter(known)))
        self.last_seq[key] = max(seq, self.last_seq.get(key, 0))

    def offer_all(self, fragment_id: int) -> list[SyncerAction]:
        """Publish to everyone who holds or waits for this fragment, members of the round or not."""
        actions: list[SyncerAction] = []
        for member in self.members.present():
            if member.stage in ("receiving", "joined"):
                actions += self.publisher.offer(member, fragment_id, self.currents[fragment_id])
        return actions

    def _prepare(self) -> None:
        config, count = self.config, max(1, len(self.fragments))
        # Buffers are values: their size says nothing about the steps behind it.
        kinds = [f.kind for f in self.fragments] or ["parameters"]
        self.gates = [NormGate(config.norm_gate if kind == "parameters" else None) for kind in kinds]
        self.pace = Pace(
            num_fragments=count,
            sync_interval_steps=config.sync_interval_steps,
            shard=self.options.shard,
            num_shards=self.options.num_shards,
        )
        self.grace = GraceWindow(
            overlap_steps=config.overlap_steps, grace_fraction=config.grace_fraction, grace_cap_steps=config.grace_cap_steps
        )


def merged_through_after(before: dict[int, MergedThrough], members: list[Held]) -> dict[int, MergedThrough]:
    """The merged_through of a version whose parent had `before` and whose merge holds these contributions."""
    after = dict(before)
    for held in members:
        known = after.get(held.learner_id, MergedThrough(0, 0))
        after[held.learner_id] = MergedThrough(max(known.seq, held.seq), known.tokens + held.tokens)
    return after


def next_version(current: Version, epoch: int) -> Version:
    """The version after this one."""
    return Version(epoch, current.n + 1)
