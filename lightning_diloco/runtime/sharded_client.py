"""A learner of a syncer with several shards: one `LearnerClient` for each, over disjoint sets of fragments, and one face for all.

A shard is a syncer of its own with a part of the model, so a learner is a member of each: with the same random name and the same id, over
links of its own, and with a background thread for each. At a boundary the training thread calls all of them in turn; each takes its own
lock without waiting, copies and adds its own fragments, and none knows of the others. So a shard that is dead costs the learner nothing:
its fragments stay as they are and their work is counted, the others' go on.

What belongs to the job and not to fragments is the lead's alone (shard 0): who takes part and under which id, the end for all, the
schedule's step, leases of samples, the target of step times, static state. Only healing crosses from one part to another: a NaN in one
fragment is in all of them after the next step, so when one shard has refused such values, every part is looked at.

A learner joins the lead first, then the others in turn; it trains only when it has joined all. So while a job is being founded nobody
trains, and a founder that dies in between is replaced by its next life.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import zmq
from torch import Tensor, nn

from lightning_diloco.errors import FencedError, JoinRefusedError, LearnerIdInUseError, ShardedSyncerError
from lightning_diloco.outer import global_id, parts_of
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.members import SILENT_HEARTBEATS, SILENT_S
from lightning_diloco.protocol.messages import PeerStateWanted
from lightning_diloco.runtime.addresses import reach
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from lightning_diloco.runtime.client_options import JoinInfo, planned_layout
from lightning_diloco.runtime.figures import Figures
from lightning_diloco.runtime.global_state import GlobalState
from lightning_diloco.runtime.leaving import leave_all
from lightning_diloco.runtime.life_signs import give_sign
from lightning_diloco.runtime.peer_state import PeerStates
from lightning_diloco.runtime.rejoin import InnerState
from lightning_diloco.runtime.weights import Weights

__all__ = ["AnyClient", "ShardedClient", "join_job"]

_T = TypeVar("_T")

AGAIN_S = 1.0
"""Between two attempts to join a shard that still takes a dead process for alive."""
MARGIN_S = 5.0
"""What the predecessor may have said last can be on its way for a while."""
HEAL_BOUNDARIES = 3
"""After a refusal for values that are not finite all parts are looked at for so long: at one boundary a part's lock may be taken."""


def join_job(
    module: nn.Module, options: ClientOptions, *, context: zmq.Context[zmq.Socket[bytes]] | None = None
) -> tuple[LearnerClient | ShardedClient, JoinInfo]:
    """Join the job of a syncer, however many shards it has.

    Args:
        module: the user's.
        options: see `ClientOptions`.
        context: see `LearnerClient`.

    Returns:
        The client that has joined, and what it was told.

    Raises:
        DiLoCoError: as `LearnerClient` and its `join`.
    """
    client = LearnerClient(module, options, context=context)
    try:
        return client, client.join()
    except ShardedSyncerError as sharded:
        endpoints = (options.endpoint, *(reach(options.endpoint, told) for told in sharded.endpoints))
    # It has host copies of the whole model, and its parts refer to one another: free it before the shards' clients take as much again.
    del client
    gc.collect()
    all_of_them = ShardedClient(module, options, endpoints, context=context)
    return all_of_them, all_of_them.join()


class ShardedClient:
    """One learner's side of the outer synchronization with a syncer of several shards; every method is as `LearnerClient` has it.

    Args:
        module: the user's module.
        options: see `ClientOptions`; the endpoint in it is not dialled.
        endpoints: control endpoints of the shards, by number.
        context: see `LearnerClient`.

    Raises:
        ConfigurationError: as `LearnerClient`; or there are more shards than fragments.
    """

    def __init__(
        self,
        module: nn.Module,
        options: ClientOptions,
        endpoints: tuple[str, ...],
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self.layout = planned_layout(module, options.config)
        self._module, self._options, self._context, self._endpoints = module, options, context, endpoints
        self._parts_of_layout = parts_of(self.layout, len(endpoints))
        self._lead = LearnerClient(module, replace(options, endpoint=endpoints[0]), context=context, layout=self._parts_of_layout[0])
        self._parts = [self._lead]
        self._heal_left = 0
        self.on_boundary: Callable[[], None] | None = None
        """Called on the training thread at the end of every boundary, inside of what counts as stall."""

    def join(self) -> JoinInfo:
        """Join the lead, then the others; on return the module's parameters are the global ones."""
        try:
            info = self._lead.join()
            for shard in range(1, len(self._endpoints)):
                self._parts.append(self._joined(shard, info))
        except BaseException:
            self.close()
            raise
        self.weights = ShardedWeights([part.weights for part in self._parts])
        self.peers = ShardedPeers([part.peers for part in self._parts])
        self._lead.on_boundary = lambda: self.on_boundary() if self.on_boundary is not None else None
        for part in self._parts:
            part.begin()
        return info

    def _joined(self, shard: int, info: JoinInfo) -> LearnerClient:
        """A client that has joined this shard under the id that the lead has given.

        The lead may know sooner than another shard that the id's process before this one is dead: that is waited for.
        """
        options = replace(self._options, endpoint=self._endpoints[shard], learner_id=info.learner_id, counters_path=None, leases=None)
        until_s = time.monotonic() + max(SILENT_S, SILENT_HEARTBEATS * options.config.heartbeat_s) + MARGIN_S
        while True:
            layout = self._parts_of_layout[shard]
            part = LearnerClient(self._module, options, context=self._context, layout=layout, nonce=self._lead.nonce)
            try:
                part.join(self._heed_lead)
            except LearnerIdInUseError:
                if time.monotonic() >= until_s:
                    raise
                self._heed_lead()
                give_sign()
                time.sleep(AGAIN_S)
            else:
                return part

    def _heed_lead(self) -> None:
        """What the lead says while another shard is joined: there may be nothing to wait for any more.

        Raises:
            FencedError: another process has this id, or the lead has closed the session.
            JoinRefusedError: the job ends for all.
        """
        if self._lead.fenced is not None:
            raise self._lead.fenced
        if self._lead.stop_reason is not None:
            leave_all(self._parts, "stopped", self._options.config.drain_timeout_s)
            raise JoinRefusedError(f"ended: This job ends ({self._lead.stop_reason}). Start a new syncer for a new job.")

    # ---- training -----------------------------------------------------------------------------------------------------------

    def boundary(self, *, tokens: int) -> None:
        """An inner step has ended. Never waits; the lead comes last, because its stall is that of all."""
        begun_s = time.monotonic()
        if any(part.is_heal_due for part in self._parts):
            self._heal_left = HEAL_BOUNDARIES
        heals, self._heal_left = self._heal_left > 0, max(0, self._heal_left - 1)
        for part in self._parts[1:]:
            part.boundary(tokens=tokens, heals=heals, wakes=False)
        self._lead.boundary(tokens=tokens, begun_s=begun_s, heals=heals, wakes=False)
        for part in self._parts:
            part.wake()

    @property
    def on_heal(self) -> Callable[[list[nn.Parameter]], None] | None:
        """Called on the training thread with the parameters of what was healed."""
        return self._lead.on_heal

    @on_heal.setter
    def on_heal(self, value: Callable[[list[nn.Parameter]], None] | None) -> None:
        for part in self._parts:
            part.on_heal = value

    def set_paused(self, is_paused: bool) -> None:
        """No inner steps for a while, or on again."""
        for part in self._parts:
            part.set_paused(is_paused)

    def batch_chosen(self, **chosen: Any) -> None:
        """The batches have another size from now on; for the records of all."""
        for part in self._parts:
            part.batch_chosen(**chosen)

    @property
    def target_step_s(self) -> float:
        """Seconds that a step is to take where batch sizes are found automatically."""
        return self._lead.target_step_s

    def request_stop(self, reason: str) -> None:
        """This learner's `should_stop`; the lead decides."""
        self._lead.request_stop(reason)

    # ---- the end ------------------------------------------------------------------------------------------------------------

    def leave(self, reason: Literal["limit", "signal", "stopped"], told_s: float | None = None) -> None:
        """Push the last contributions to all shards at once; waits at most `drain_timeout_s`, counted from `told_s` (see `leave_all`)."""
        leave_all(self._parts, reason, self._options.config.drain_timeout_s, told_s)

    def close(self) -> None:
        """Stop all background threads; idempotent, never raises."""
        for part in self._parts:
            part.close()

    # ---- what can be read ---------------------------------------------------------------------------------------------------

    @property
    def stop_reason(self) -> str | None:
        """Why the job ends for all (the lead says so), or for this learner (a shard was silent for too long), or None."""
        alone = (part.stop_reason for part in self._parts if part.is_offline)
        return self._lead.stop_reason or next(alone, None)

    @property
    def is_offline(self) -> bool:
        """Whether this learner ends because a shard is not there."""
        return any(part.is_offline for part in self._parts)

    def version(self, fragment_id: int) -> Version:
        """The newest version of a fragment that has been received."""
        count = len(self._parts)
        return self._parts[fragment_id % count].version(fragment_id // count)

    @property
    def fenced(self) -> FencedError | None:
        """Set when this process must end."""
        return next((part.fenced for part in self._parts if part.fenced is not None), None)

    @property
    def lost_syncer(self) -> bool:
        """Whether nothing was heard from a shard for a while."""
        return any(part.lost_syncer for part in self._parts)

    @property
    def figures(self) -> Figures:
        """Running figures of this learner, over all parts."""
        of_parts = [part.figures for part in self._parts]
        merges = sum(f.merges for f in of_parts)
        with_us = sum(round(f.participation * f.merges) for f in of_parts if f.participation is not None)
        return replace(
            of_parts[0],
            merges=merges,
            participation=with_us / merges if merges else None,
            staleness_versions=sum(f.staleness_versions for f in of_parts) / len(of_parts),
            bytes_up=sum(f.bytes_up for f in of_parts),
            bytes_down=sum(f.bytes_down for f in of_parts),
        )


AnyClient = LearnerClient | ShardedClient


class ShardedWeights:
    """`Weights` of all parts as those of the whole.

    Args:
        parts: of the shards, by number.
    """

    def __init__(self, parts: Sequence[Weights]) -> None:
        self._parts = parts

    def swap_in_global(self) -> None:
        """Put the last published fragments into the parameters, until `swap_out_global`; calls nest."""
        for part in self._parts:
            part.swap_in_global()

    def swap_out_global(self) -> None:
        """Put the local parameters back, bit for bit."""
        for part in self._parts:
            part.swap_out_global()

    def load_global(self) -> GlobalState:
        """Put the last published fragments into the parameters, for good; returns what was put there."""
        return self._together([part.load_global() for part in self._parts])

    def global_state(self) -> GlobalState:
        """As `Weights.global_state`, in the order of the whole layout."""
        return self._together([part.global_state() for part in self._parts])

    def _together(self, states: Sequence[GlobalState]) -> GlobalState:
        return GlobalState(
            published=_interleaved([state.published for state in states]),
            momentum=_interleaved([state.momentum for state in states]),
            versions=_interleaved([state.versions for state in states]),
        )

    def local_tensors(self) -> dict[str, Tensor]:
        """Copies of this learner's own parameters by name."""
        return {name: tensor for part in self._parts for name, tensor in part.local_tensors().items()}

    def set_local(self, tensors: Mapping[str, Tensor]) -> None:
        """Put earlier `local_tensors` into the parameters."""
        for part in self._parts:
            part.set_local(tensors)

    def parameters_of(self, fragment_id: int) -> list[tuple[str, Tensor]]:
        """Names and live tensors of one fragment."""
        return self._parts[fragment_id % len(self._parts)].parameters_of(fragment_id // len(self._parts))

    def unmerged_parameters(self) -> list[str]:
        """Names of parameters that are trainable now and in no fragment of any shard."""
        others = [set(part.unmerged_parameters()) for part in self._parts[1:]]
        return [name for name in self._parts[0].unmerged_parameters() if all(name in names for names in others)]


class ShardedPeers:
    """`PeerStates` of all parts as those of the whole; each shard passes on what belongs to its own fragments.

    Args:
        parts: of the shards, by number.
    """

    def __init__(self, parts: Sequence[PeerStates]) -> None:
        self._parts = parts
        self._turn = 0
        self._shown: PeerStates | None = None
        """Whose state `arrived` has answered: before `took` another part's may arrive, on its own thread."""

    @property
    def can_give(self) -> bool:
        """Whether somebody looks at `next_wanted` at every boundary."""
        return self._parts[0].can_give

    @can_give.setter
    def can_give(self, value: bool) -> None:
        for part in self._parts:
            part.can_give = value

    @property
    def is_asking(self) -> bool:
        """Whether anything is still asked for."""
        return any(part.is_asking for part in self._parts)

    @property
    def arrived(self) -> InnerState | None:
        """A fragment's state that can be put in place; then `took` is to be called."""
        self._shown = next((part for part in self._parts if part.arrived is not None), None)
        return None if self._shown is None else self._shown.arrived

    @property
    def num_taken(self) -> int:
        """States that were put in place."""
        return sum(part.num_taken for part in self._parts)

    def ask(self, newest: Mapping[int, Version | None], *, lineage: str, optimizers: tuple[str, ...]) -> None:
        """Begin to ask for these fragments, each at its shard."""
        count = len(self._parts)
        for shard, part in enumerate(self._parts):
            if wanted := {p: version for p, version in newest.items() if p % count == shard}:
                part.ask(wanted, lineage=lineage, optimizers=optimizers)

    def took(self, *, is_useful: bool) -> None:
        """What `arrived` has answered last is in place, or is of no use."""
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.took(is_useful=is_useful)

    def stop(self) -> None:
        """Ask for nothing any more."""
        for part in self._parts:
            part.stop()

    def next_wanted(self) -> PeerStateWanted | None:
        """What is to be copied aside at this boundary, and then given; the shards take turns."""
        self._turn += 1
        return self._parts[self._turn % len(self._parts)].next_wanted()

    def give(self, wanted: PeerStateWanted, packed: Tensor | None) -> None:
        """Answer with a packed state, or with None; from any thread."""
        self._parts[wanted.fragment_id % len(self._parts)].give(wanted, packed)


def _interleaved(parts: Sequence[tuple[_T, ...]]) -> tuple[_T, ...]:
    """What the parts have of each fragment, in the order of the whole."""
    count = len(parts)
    found = {global_id(i, shard, count): value for shard, part in enumerate(parts) for i, value in enumerate(part)}
    return tuple(found[p] for p in sorted(found))
