"""The inner optimizer state of a learner: copied aside while it trains, put back when a later life of it joins.

An optimizer's state is found by parameter, as torch keeps it: tensors (moments, step counts, factors of any shape) and plain numbers. An
optimizer that keeps anything else (LBFGS keeps lists) cannot be saved in parts. One that is not torch's, nor made from one of torch's, may
keep copies of the parameters, or what belongs to them in its groups (schedule-free ones do both): beside published parameters its old
state could undo what others have done. Learners with such optimizers come back with fresh ones, and a log line says so at the beginning.

What comes back is the state, and not the learner's own parameters: those are the published ones (docs/protocol.md, "A learner's return").

Of what the run directory does not have, or has of long ago, a healthy peer is asked over the network (`strategy.peer_state`). A learner
that is asked copies the fragment aside at its next boundary, as for its own rejoin checkpoint, and one at a boundary for both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_diloco.outer.memory import raw
from lightning_diloco.runtime.device_copies import fetch_later
from lightning_diloco.runtime.rejoin import Fetch, InnerState, Numbers, RejoinFiles, read_freshest, staging
from lightning_diloco.strategy.healing import reset_nonfinite_moments
from lightning_diloco.strategy.peer_state import PeerStateTaker, missing_states

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_diloco.config import SyncConfig
    from lightning_diloco.protocol.identity import Version
    from lightning_diloco.protocol.messages import PeerStateWanted
    from lightning_diloco.runtime.client import JoinInfo
    from lightning_diloco.runtime.sharded_client import AnyClient

__all__ = ["InnerStateSaver", "keep_inner_state", "restore_inner_state"]

_log = logging.getLogger(__name__)

_FRESH = " If this learner is killed, it comes back with a fresh inner optimizer."


class InnerStateSaver:
    """Saves one fragment's inner state at a boundary, in turn; `boundary` belongs to the training thread and never waits.

    Args:
        client: of this learner, joined.
        optimizers: as the Trainer has them.
        folder: the run directory's folder of rejoin checkpoints; None: nothing is saved, peers are given what they ask for.
        info: what the syncer said at the join.
        every_steps: inner steps in which each fragment is saved once (with more fragments than steps: one in each step).
    """

    def __init__(
        self, client: AnyClient, optimizers: Sequence[Optimizer], folder: Path | None, info: JoinInfo, *, every_steps: int
    ) -> None:
        self._client, self._optimizers, self._lineage = client, list(optimizers), info.lineage
        self._kinds = kinds(optimizers)
        self._files = RejoinFiles(folder, info.learner_id)
        self._ids = [f.fragment_id for f in client.layout.fragments if not f.holds_values]
        self._period = max(every_steps, len(self._ids))
        self._due = {i * self._period // len(self._ids) for i in range(len(self._ids))} if folder is not None else set()
        self._steps = self._turn = 0
        self._memory = raw(0)
        self._is_off = not all(_is_torchs(optimizer) for optimizer in optimizers)
        self._has_given = False
        client.peers.can_give = not self._is_off
        if self._is_off and folder is not None:
            _log.warning("%s: rejoin checkpoints hold the state of torch's optimizers only.%s", ", ".join(self._kinds), _FRESH)

    def boundary(self) -> None:
        """An inner step has ended: if a fragment is due, or a peer wants one, copy its state aside."""
        self._steps += 1
        if self._is_off or self._files.is_busy:
            return
        is_due = self._steps % self._period in self._due
        # In turn, where one is due at every step.
        wanted = None if is_due and self._has_given else self._client.peers.next_wanted()
        self._has_given = wanted is not None
        if wanted is not None:
            self._give(wanted)
        elif is_due:
            self._save()

    def _save(self) -> None:
        copied = self._copy_aside(self._ids[self._turn % len(self._ids)])
        if self._is_off:
            return
        self._turn += 1
        if copied is not None:
            self._files.write(*copied)

    def _give(self, wanted: PeerStateWanted) -> None:
        peers = self._client.peers
        copied = self._copy_aside(wanted.fragment_id) if wanted.optimizers == self._kinds else None
        if copied is None:
            peers.give(wanted, None)
        else:
            state, fetch = copied
            self._files.pack(state, lambda packed: peers.give(wanted, packed), fetch)

    def _copy_aside(self, fragment_id: int) -> tuple[InnerState, Fetch | None] | None:
        """The state of a fragment, in memory that is used again; of one on a GPU what fetches its tensors. None if there is none."""
        tensors, numbers = dict[str, Tensor](), Numbers()
        for name, value in self._entries(fragment_id):
            if isinstance(value, Tensor):
                tensors[name] = value
            elif value is None or isinstance(value, (bool, int, float)):
                numbers[name] = value
            else:
                self._is_off, self._client.peers.can_give = True, False
                _log.warning("%s is of type %s, which rejoin checkpoints do not hold.%s", name, type(value).__name__, _FRESH)
                return None
        if not tensors and not numbers:
            return None
        fetch = fetch_later(tensors)
        state = InnerState(
            lineage=self._lineage,
            optimizers=self._kinds,
            fragment_id=fragment_id,
            version=self._client.version(fragment_id),
            inner_step=self._steps,
            numbers=numbers,
            tensors=self._staged(tensors) if fetch is None else {},
        )
        return state, fetch

    def _staged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        places, self._memory = staging(list(tensors.values()), self._memory)
        with torch.no_grad():
            for place, value in zip(places, tensors.values(), strict=True):
                place.copy_(value)
        return dict(zip(tensors, places, strict=True))

    def close(self, *, is_done: bool) -> None:
        """Stop; `is_done`: this learner has left for good, and its files go."""
        self._client.peers.can_give = False
        self._files.close(removes=is_done)

    def _entries(self, fragment_id: int) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._client.weights.parameters_of(fragment_id):
            for i, optimizer in enumerate(self._optimizers):
                for key, value in optimizer.state.get(parameter, {}).items():
                    yield f"{i}/{name}/{key}", value


def keep_inner_state(
    client: AnyClient, optimizers: Sequence[Optimizer], folder: Path | None, info: JoinInfo, config: SyncConfig
) -> InnerStateSaver:
    """After a join: put the freshest inner state in place, ask peers for what is missing, and save and give this learner's from now on.

    Args:
        client: of this learner, joined; its `on_boundary` is set.
        optimizers: as the Trainer has them.
        folder: the run directory's folder of rejoin checkpoints; None: there is none.
        info: what the syncer said at the join.
        config: of the job.

    Returns:
        What saves and gives; to be closed.
    """
    every_steps, are_torchs = config.rejoin_every_steps, all(_is_torchs(optimizer) for optimizer in optimizers)
    restored = restore_inner_state(client, optimizers, folder, info) if folder is not None and info.role == "joiner" else {}
    missing = missing_states(client, info, restored, every_steps=every_steps, sync_interval_steps=config.sync_interval_steps)
    taker = PeerStateTaker(client, optimizers, kinds(optimizers), info, missing if are_torchs else {})
    saver = InnerStateSaver(client, optimizers, folder, info, every_steps=every_steps)

    def boundary() -> None:
        """What is taken is put in place before anything is copied aside."""
        taker.boundary()
        saver.boundary()

    client.on_boundary = boundary
    return saver


def restore_inner_state(client: AnyClient, optimizers: Sequence[Optimizer], folder: Path, info: JoinInfo) -> dict[int, Version]:
    """Put the freshest inner state that the run directory has into the optimizers.

    Args:
        client: of this learner, joined.
        optimizers: as the Trainer has them.
        folder: the run directory's folder of rejoin checkpoints.
        info: what the syncer said at the join.

    Returns:
        Fragments whose state was restored, with its version.
    """
    learner_id, num_fragments = info.learner_id, len(client.layout.fragments)
    found = read_freshest(folder, learner_id, lineage=info.lineage, optimizers=kinds(optimizers), num_fragments=num_fragments)
    groups = [{id(p): group for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    for _, state in found:
        parameters = dict(client.weights.parameters_of(state.fragment_id))
        for name, value in [*state.numbers.items(), *state.tensors.items()]:
            number, _, rest = name.partition("/")
            parameter_name, _, key = rest.rpartition("/")
            parameter = parameters.get(parameter_name)
            if parameter is not None and (group := groups[int(number)].get(id(parameter))) is not None:
                optimizers[int(number)].state[parameter][key] = _placed(key, value, parameter, group)
        # What was saved between a NaN and its heal must not come back.
        reset_nonfinite_moments(optimizers, parameters.values())
    if found:
        own = sum(owner == learner_id for owner, _ in found)
        _log.info(
            "learner %d goes on with the inner optimizer state of %d fragments: %d from its own rejoin checkpoint, %d from other learners'",
            learner_id,
            len(found),
            own,
            len(found) - own,
        )
    return {state.fragment_id: state.version for _, state in found}


def kinds(optimizers: Sequence[Optimizer]) -> tuple[str, ...]:
    """Class names of optimizers, in order."""
    return tuple(type(optimizer).__qualname__ for optimizer in optimizers)


def _is_torchs(optimizer: Optimizer) -> bool:
    """Whether it is one of torch's, or made from one: their state is moments and counts, and all of it is found by parameter."""
    return any(cls.__module__.startswith("torch.optim") and cls is not Optimizer for cls in type(optimizer).__mro__)


def _placed(key: str, value: Any, parameter: Tensor, group: dict[str, Any]) -> Any:
    """A state entry where its optimizer looks for it, by torch's own rule: step counts stay in host memory unless its kernels read them."""
    if not isinstance(value, Tensor) or (key == "step" and not (group.get("capturable") or group.get("fused"))):
        return value
    return value.to(parameter.device)
