"""How one process takes part in a job, and what it is told when it has joined."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import Layout, plan_layout
from lightning_diloco.protocol.learner_state import LearnerOptions
from lightning_diloco.runtime.global_state import FoundingState
from lightning_diloco.runtime.keys import SiteKeys
from lightning_diloco.runtime.leases import Leases

__all__ = ["JOIN_TIMEOUT_S", "ClientOptions", "JoinInfo", "learner_options", "planned_layout"]

JOIN_TIMEOUT_S = 60.0
"""How long a learner looks for a syncer that answers, unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """How one process takes part in a job.

    Args:
        endpoint: the syncer's control endpoint.
        config: must equal the job's.
        learner_id: the wanted id (None: the next free one).
        token: the job's token ("" on loopback by hand).
        takeover_token: the supervisor's, to take the id of a process that died.
        device: name of the device, for the records.
        batch_size: samples per micro-batch, for the records (0: unknown).
        tokens_per_step: of one inner step, for the records (0: unknown).
        life: how many processes of this learner its supervisor started before.
        counters_path: folder of the memory-mapped totals; the file is named by this process.
        join_timeout_s: no syncer answers for so long: `SyncerUnavailableError` (None: 60 s).
        founding: versions and outer momentum to begin with, should this process found the job.
        keys: of this site; must be given if the syncer has keys (None: the link is not encrypted).
        keeps_momentum: follow the outer momentum, for `LearnerClient.global_state`; costs 4 bytes per parameter.
        leases: of the training data (None: this learner trains on its own part).
    """

    endpoint: str
    config: SyncConfig
    learner_id: int | None = None
    token: str = ""
    takeover_token: str = ""
    device: str = "cpu"
    batch_size: int = 0
    tokens_per_step: int = 0
    life: int = 0
    counters_path: Path | None = None
    join_timeout_s: float | None = None
    founding: FoundingState = field(default_factory=FoundingState)
    keeps_momentum: bool = False
    keys: SiteKeys | None = None
    leases: Leases | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinInfo:
    """What the syncer said at the join. `job_step`: the job's inner step (0 at its beginning); `lineage`: the job's history."""

    learner_id: int
    incarnation: int
    role: str
    job_step: int
    lineage: str


def planned_layout(module: nn.Module, config: SyncConfig) -> Layout:
    """What of a module a job of this configuration synchronizes, and how; see `plan_layout`.

    Args:
        module: the user's.
        config: of the job.
    """
    return plan_layout(
        module,
        num_fragments=config.num_fragments,
        merge=config.merge,
        mean_patterns=config.mean_patterns,
        include_frozen=config.include_frozen,
    )


def learner_options(options: ClientOptions, layout: Layout, nonce: bytes) -> LearnerOptions:
    """What the process tells the rules of itself.

    Args:
        options: of the process.
        layout: of its module.
        nonce: its random name.
    """
    return LearnerOptions(
        nonce=nonce.hex(),
        num_fragments=len(layout.fragments),
        fingerprint=layout.fingerprint(),
        config=json.dumps(options.config.as_dict()).encode(),
        adopt=options.config.adopt,
        learner_id=options.learner_id,
        token=options.token,
        takeover_token=options.takeover_token,
        device=options.device,
        batch_size=options.batch_size,
        tokens_per_step=options.tokens_per_step,
        life=options.life,
        founded_n=options.founding.numbers(layout),
        value_fragments=tuple(i for i, fragment in enumerate(layout.fragments) if fragment.holds_values),
        data=options.leases.spec if options.leases is not None else None,
    )
