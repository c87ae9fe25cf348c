"""What a learner does about values that the syncer refused, on the training thread at a boundary.

One refusal names one fragment. But one step after a parameter has become NaN every gradient is NaN, and so are all fragments: mended one by
one, each would be poisoned again by those that are not. So at the first refusal for values that are not finite every fragment is looked at:

- without an unresolved contribution, its parameters become the base at once, and the rules discard its work at the next boundary;
- with one that is finite, what was sent stays: parameters become base - d^, as they were when it was taken;
- with one that is not finite, parameters become the base; its own refusal is on its way, and discards its work.

It costs a few passes over the parameters, in a step that was lost anyway.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_diloco.outer import FragmentView, reference
from lightning_diloco.protocol.learner_state import FragmentState
from lightning_diloco.runtime.learner_store import LearnerStore

__all__ = ["Suspect", "mend", "parameters_of", "suspects"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Suspect:
    """A fragment that may be poisoned too: its host copies, exchanged under the client's lock."""

    state: FragmentState
    base: Tensor
    sent: Tensor | None


def suspects(store: LearnerStore, states: list[FragmentState], fragment_id: int) -> list[Suspect]:
    """Under the lock: all fragments but the refused one."""
    found = []
    for state in states:
        if state.fragment_id != fragment_id and state.heal is None:
            seq = state.unresolved.header.seq if state.unresolved is not None else 0
            found.append(Suspect(state, store.base(state.fragment_id), store.contribution(state.fragment_id, seq)))
    return found


def mend(view: FragmentView, suspect: Suspect) -> bool:
    """Put a poisoned fragment back to its last finite values.

    Returns:
        Whether it was poisoned and the rules must discard its work (its `heal` is to be set under the lock).
    """
    local = torch.empty(view.num_params)
    view.copy_to(local)
    if torch.isfinite(local).all():
        return False
    _log.warning("Fragment %d is not finite either: its parameters go back to their last finite values.", suspect.state.fragment_id)
    is_sent = suspect.sent is not None and bool(torch.isfinite(suspect.sent).all())
    view.copy_from(reference(suspect.base, suspect.sent if is_sent else None))
    return suspect.state.unresolved is None


def parameters_of(module: nn.Module, view: FragmentView) -> list[nn.Parameter]:
    """The parameters of a fragment."""
    return [module.get_parameter(part.name) for part in view.fragment.slices]
