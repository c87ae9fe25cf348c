"""A healthy peer's inner optimizer state, put in place one fragment at a boundary.

What arrived is put in place only where it is, entry by entry, of the name, shape and dtype of what the optimizer has made itself at its
first step: so nothing that a peer sends can make a later step fail, no memory is taken, and every entry lies on the device where its
optimizer looks for it. All of a fragment or nothing of it.

A state is put in place while the learner is young. After `YOUNG_STEPS` inner steps the moments are its own, and nothing more is asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning_diloco.protocol.identity import Version
    from lightning_diloco.runtime.client import JoinInfo
    from lightning_diloco.runtime.rejoin import InnerState
    from lightning_diloco.runtime.sharded_client import AnyClient

__all__ = ["PeerStateTaker", "missing_states"]

_log = logging.getLogger(__name__)

YOUNG_STEPS: Final = 500
"""Inner steps after the join, at least ten for each fragment, in which a peer's state is better than the learner's own."""
WAIT_STEPS: Final = 20
"""So many boundaries are waited for optimizers that have not stepped yet (several that take turns)."""


def missing_states(
    client: AnyClient, info: JoinInfo, restored: Mapping[int, Version], *, every_steps: int, sync_interval_steps: int
) -> dict[int, Version | None]:
    """Fragments for which a peer has a fresher state than the run directory had.

    Args:
        client: of this learner, joined.
        info: what the syncer said at the join.
        restored: what the run directory had, by fragment.
        every_steps: inner steps in which each learner saves every fragment once.
        sync_interval_steps: H.

    Returns:
        The version of the state that is held (None: there is none), by fragment. Nothing, if the job is so young that nobody has a state
        that is worth it.
    """
    if info.role != "joiner" or info.job_step < every_steps:
        return {}
    ids = [f.fragment_id for f in client.layout.fragments if not f.holds_values]
    # Files of a learner that lives are so many merges behind at most, and then a peer's state is no better.
    slack = 1 + math.ceil(max(every_steps, len(ids)) / sync_interval_steps)
    return {i: restored.get(i) for i in ids if i not in restored or restored[i].n + slack < client.version(i).n}


class PeerStateTaker:
    """Asks for what is missing, and puts it in place; `boundary` belongs to the training thread and never waits.

    Args:
        client: of this learner, joined.
        optimizers: as the Trainer has them.
        kinds: their class names.
        info: what the syncer said at the join.
        missing: see `missing_states`.
    """

    def __init__(
        self,
        client: AnyClient,
        optimizers: Sequence[Optimizer],
        kinds: tuple[str, ...],
        info: JoinInfo,
        missing: Mapping[int, Version | None],
    ) -> None:
        self._client, self._learner_id, self._num_missing = client, info.learner_id, len(missing)
        self._by_number = {str(i): optimizer for i, optimizer in enumerate(optimizers)}
        self._young_steps = max(YOUNG_STEPS, 10 * len(missing))
        self._steps = self._waited = 0
        self.is_done = not missing
        if missing:
            client.peers.ask(missing, lineage=info.lineage, optimizers=kinds)

    def boundary(self) -> None:
        """An inner step has ended: if a fragment's state is here, put it in place."""
        if self.is_done:
            return
        self._steps += 1
        peers = self._client.peers
        if self._steps > self._young_steps:
            peers.stop()
        elif (state := peers.arrived) is not None:
            self._put(state)
        if not peers.is_asking:
            self._end(peers.num_taken)

    def _put(self, state: InnerState) -> None:
        found = list(self._places(state))
        places = [(own, key, value) for own, key, value in found if own is not None]
        if len(places) < len(found) and self._waited < WAIT_STEPS:
            self._waited += 1
            return
        fits = bool(places) and all(_fits(own, key, value) for own, key, value in places) and _is_whole(places)
        if fits:
            with torch.no_grad():
                for own, key, value in places:
                    if isinstance(value, Tensor):
                        own[key].copy_(value)
                    else:
                        own[key] = value
        self._client.peers.took(is_useful=fits)

    def _places(self, state: InnerState) -> Iterator[tuple[dict[str, Any] | None, str, Any]]:
        """(Own state of the parameter, entry, value) of all that has arrived; None: its optimizer has made none yet."""
        parameters = dict(self._client.weights.parameters_of(state.fragment_id))
        for name, value in [*state.numbers.items(), *state.tensors.items()]:
            number, _, rest = name.partition("/")
            parameter_name, _, key = rest.rpartition("/")
            parameter = parameters.get(parameter_name)
            optimizer = self._by_number.get(number)
            if parameter is None or optimizer is None:
                yield {}, key, value  # in which nothing fits
            else:
                yield optimizer.state.get(parameter) or None, key, value

    def _end(self, num_taken: int) -> None:
        self.is_done = True
        if num_taken:
            _log.info(
                "learner %d goes on with a peer's inner optimizer state of %d of %d fragments",
                self._learner_id,
                num_taken,
                self._num_missing,
            )
        else:
            _log.info("learner %d goes on with a fresh inner optimizer: no peer has given a state that fits", self._learner_id)


def _is_whole(places: list[tuple[dict[str, Any], str, Any]]) -> bool:
    """Whether of every parameter all entries are there that its optimizer has."""
    keys: dict[int, set[str]] = {}
    for own, key, _ in places:
        keys.setdefault(id(own), set()).add(key)
    return all(keys[id(own)] == own.keys() for own, _, _ in places)


def _fits(own: dict[str, Any], key: str, value: Any) -> bool:
    mine = own.get(key, own)  # which is no tensor and no number
    if isinstance(value, Tensor):
        return isinstance(mine, Tensor) and (mine.shape, mine.dtype) == (value.shape, value.dtype)
    return type(mine) is type(value) or {type(mine), type(value)} == {int, float}
