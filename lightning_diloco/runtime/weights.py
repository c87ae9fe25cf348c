"""The global model in the user's parameters: for a validation and back again, for a checkpoint, for good. Training thread only."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_diloco.runtime.global_state import GlobalState
from lightning_diloco.runtime.healing import tensors_of
from lightning_diloco.runtime.learner_store import LearnerStore

__all__ = ["Weights"]


class Weights:
    """What stands in the parameters of one learner.

    Args:
        module: the user's.
        store: the host copies.
        lock: under which references of the store are read.
    """

    def __init__(self, module: nn.Module, store: LearnerStore, lock: threading.Lock) -> None:
        self._module, self._store, self._lock = module, store, lock
        self._stash: list[list[Tensor]] | None = None
        self._residuals: list[Tensor | None] = []
        self._swap_depth = 0
        self._swapped: GlobalState | None = None

    def swap_in_global(self) -> None:
        """Put the last published fragments into the parameters, until `swap_out_global`; calls nest."""
        self._swap_depth += 1
        if self._swap_depth > 1:
            return
        with torch.no_grad():
            self._stash = [[t.detach().clone() for t in self._tensors(i)] for i in range(len(self._store.views))]
        self._residuals = [view.residual() for view in self._store.views]
        self._swapped = self.load_global()

    def swap_out_global(self) -> None:
        """Put the local parameters back, bit for bit."""
        if self._swap_depth == 0:
            return
        self._swap_depth -= 1
        if self._swap_depth > 0 or self._stash is None:
            return
        with torch.no_grad():
            for fragment_id, saved in enumerate(self._stash):
                for tensor, value in zip(self._tensors(fragment_id), saved, strict=True):
                    tensor.copy_(value)
                if self._residuals[fragment_id] is not None:
                    self._store.views[fragment_id].load_residual(self._residuals[fragment_id])
        self._stash, self._residuals, self._swapped = None, [], None

    def load_global(self) -> GlobalState:
        """Put the last published fragments into the parameters, for good; returns what was put there."""
        with self._lock:
            state = self._store.global_state()
        for view, published in zip(self._store.views, state.published, strict=True):
            view.copy_from(published)
        return state

    def global_state(self) -> GlobalState:
        """The global model that the parameters hold after `load_global` or inside a swap, with versions and momentum, by reference."""
        if self._swapped is not None:
            return self._swapped
        with self._lock:
            return self._store.global_state()

    def local_tensors(self) -> dict[str, Tensor]:
        """Copies of this learner's own parameters by name, whatever the module holds at the moment."""
        tensors: dict[str, Tensor] = {}
        for fragment_id, view in enumerate(self._store.views):
            values = self._tensors(fragment_id) if self._stash is None else self._stash[fragment_id]
            names = (part.name for part in view.fragment.slices)
            tensors.update((name, value.detach().clone()) for name, value in zip(names, values, strict=True))
        return tensors

    def set_local(self, tensors: Mapping[str, Tensor]) -> None:
        """Put earlier `local_tensors` into the parameters: what they differ from the global ones is work that was not merged yet."""
        with torch.no_grad():
            for fragment_id, view in enumerate(self._store.views):
                for part, parameter in zip(view.fragment.slices, self._tensors(fragment_id), strict=True):
                    if (value := tensors.get(part.name)) is not None and value.shape == parameter.shape:
                        parameter.copy_(value)

    def _tensors(self, fragment_id: int) -> list[Tensor]:
        return tensors_of(self._module, self._store.views[fragment_id])

    def parameters_of(self, fragment_id: int) -> list[tuple[str, Tensor]]:
        """Names and live tensors of one fragment."""
        return [(part.name, t) for part, t in zip(self._store.views[fragment_id].fragment.slices, self._tensors(fragment_id), strict=True)]

    def unmerged_parameters(self) -> list[str]:
        """Names of parameters that are trainable now and in no fragment: frozen, or not there, when the layout was planned."""
        merged = {id(p) for view in self._store.views for p in tensors_of(self._module, view)}
        return [n for n, p in self._module.named_parameters() if p.requires_grad and p.numel() and id(p) not in merged]
