"""The global model as one learner sees it, to be written to a checkpoint, and to found the next job from.

A checkpoint needs what only the syncer has: the outer momentum. It would be as large as the model, so it is not sent: `MomentumTracker`
recovers it from the versions that arrive anyway (`lightning_diloco.outer.recovered_momentum`). Everything is kept by parameter name, so
that the next job may cut its fragments differently.

Memory: 4 bytes per merged parameter, in a learner that writes checkpoints; none without outer momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import Fragment, Layout, momentum_at, recovered_momentum

__all__ = ["OUTER_NAME", "FoundingState", "GlobalState", "MomentumTracker", "by_name"]

OUTER_NAME = "outer_momentum.safetensors"
MAX_MISSED = 1000
"""What a syncer leaves in the run directory beside the global model: its momentum, and the versions in the metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalState:
    """One moment of the published fragments; the tensors are never changed in place.

    Args:
        published: per fragment, flat float32.
        momentum: per fragment, flat float32; empty if it is not tracked.
        versions: n per fragment.
    """

    published: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundingState:
    """What a job that goes on from a checkpoint begins with, beside the parameters.

    Args:
        versions: n by parameter name; 0 where it is not named.
        momentum: the outer momentum by parameter name, float32 of any shape; zero where it is not named or has another size.
    """

    versions: Mapping[str, int] = field(default_factory=dict)
    momentum: Mapping[str, Tensor] = field(default_factory=dict)

    def numbers(self, layout: Layout) -> tuple[int, ...]:
        """The version that each fragment of this layout begins with: the newest of its tensors."""
        return tuple(max(self.versions.get(part.name, 0) for part in fragment.slices) for fragment in layout.fragments)

    def buffers(self, layout: Layout) -> tuple[Tensor, ...]:
        """The momentum of each fragment of this layout, flat float32; empty if there is none at all."""
        if not self.momentum:
            return ()
        return tuple(self._buffer(fragment) for fragment in layout.fragments)

    def _buffer(self, fragment: Fragment) -> Tensor:
        flat = torch.zeros(fragment.num_params, dtype=torch.float32, device="cpu")
        for part, view in zip(fragment.slices, flat.split_with_sizes([s.length for s in fragment.slices]), strict=True):
            known = self.momentum.get(part.name)
            if known is not None and known.numel() >= part.offset + part.length:
                view.copy_(known.reshape(-1)[part.offset : part.offset + part.length])
        return flat


class MomentumTracker:
    """Follows the syncer's momentum through the versions that this learner receives; lives on the background thread.

    Args:
        layout: of the job.
        config: of the job.
        is_on: whether anybody will ask for it; without outer momentum it is off.
    """

    def __init__(self, layout: Layout, config: SyncConfig, *, is_on: bool) -> None:
        self._layout, self._config = layout, config
        self.is_on = is_on and config.outer_momentum > 0
        self._is_frozen = False
        self._buffers = [torch.zeros(f.num_params, dtype=torch.float32, device="cpu") for f in layout.fragments] if self.is_on else []

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Of every fragment, flat float32; empty if it is off."""
        return tuple(self._buffers)

    def found(self, buffers: tuple[Tensor, ...]) -> None:
        """Begin with these."""
        if self.is_on and buffers:
            self._buffers = list(buffers)

    def freeze(self) -> None:
        """This learner leaves: last merges leave the syncer's momentum as it is, and which ones are last is not known here.

        If others stay, their merges change it; a checkpoint that is written after the leave then has the momentum of its beginning.
        """
        self._is_frozen = True

    def momenta(self, fragment_id: int, old: int, new: int) -> list[float]:
        """The momentum of each merge from version `old`, the last one seen, to version `new`; none if nothing is to be followed.

        Above `MAX_MISSED` merges nothing can be recovered from one difference, and a number that a header claims must cost no memory.
        """
        if not self.is_on or self._is_frozen or self._layout.fragments[fragment_id].holds_values or new - old > MAX_MISSED:
            return []
        config = self._config
        return [momentum_at(n, config.outer_momentum, config.outer_momentum_warmup) for n in range(old + 1, new + 1)]

    def follow(self, fragment_id: int, part: slice, before: Tensor, after: Tensor, momenta: list[float], *, out: Tensor) -> None:
        """Put a part of the buffer that goes with the new version into `out`.

        Args:
            fragment_id: of which fragment.
            part: of it.
            before: this part of the last version seen, flat float32.
            after: this part of the new version, flat float32.
            momenta: see above; at least one.
            out: flat float32 of the same size, other memory than the buffer.
        """
        recovered_momentum(self._buffers[fragment_id][part], before, after, lr=self._config.outer_lr, momenta=momenta, out=out)

    def set(self, fragment_id: int, buffer: Tensor | None) -> None:
        """Under the lock: put it beside its version."""
        if buffer is not None:
            self._buffers[fragment_id] = buffer


def by_name(layout: Layout, flats: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Flat fragments as tensors of their own, by parameter name and in its shape."""
    tensors: dict[str, Tensor] = {}
    for fragment, flat in zip(layout.fragments, flats, strict=True):
        for part, values in zip(fragment.slices, flat.split_with_sizes([s.length for s in fragment.slices]), strict=True):
            tensor = tensors.setdefault(part.name, torch.empty(part.global_shape, dtype=torch.float32, device="cpu"))
            tensor.view(-1)[part.offset : part.offset + part.length] = values
    return tensors
