"""Whether a batch really stepped an optimizer.

torch calls a post hook after every `Optimizer.step`. A GradScaler that finds infinities does not call `step`, except for optimizers that
take the scale themselves (``fused``): they skip inside the kernel and the hook fires all the same. Then the scale tells: it falls in
the scaler's update of a skipped step, and only there.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["StepWatch"]


class StepWatch:
    """Sees the optimizer steps between two batch boundaries."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._has_fired = False
        self._is_scale_aware = False
        self._scale: float | None = None

    def attach(self, optimizers: list[Optimizer]) -> None:
        """Watch these optimizers instead of earlier ones."""
        self.detach()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._on_step))
        self._is_scale_aware = any(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in optimizers)

    def detach(self) -> None:
        """Take the hooks off; idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_batch_start(self, scaler: Any) -> None:
        """Note the scale before the batch, where it will be needed.

        Args:
            scaler: the precision plugin's GradScaler, or None.
        """
        self._scale = float(scaler.get_scale()) if scaler is not None and self._is_scale_aware else None

    def has_stepped(self, scaler: Any) -> bool:
        """Whether an optimizer was stepped since the last call; clears the note."""
        fired, self._has_fired = self._has_fired, False
        if fired and self._scale is not None and scaler is not None:
            return float(scaler.get_scale()) >= self._scale
        return fired

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._has_fired = True
