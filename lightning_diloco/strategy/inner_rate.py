"""The inner learning rate, multiplied where the batch is another one than the user's (see `strategy.batch_options`).

The factor is in the optimizers' groups only while a step is done: schedules, monitors and checkpoints see the user's own rate, and a
schedule
that goes on from the present rate does not multiply the factor up.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["InnerRate"]


class InnerRate:
    """Multiplies the learning rates of some optimizers for the time of each step."""

    def __init__(self) -> None:
        self.factor = 1.0
        """From the next step on."""
        self._handles: list[RemovableHandle] = []
        self._own: dict[int, list[Any]] = {}

    def attach(self, optimizers: list[Optimizer]) -> None:
        """Multiply the rates of these from now on."""
        self.detach()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def detach(self) -> None:
        """Take the hooks off; idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.factor == 1.0:
            return
        self._own[id(optimizer)] = own = []
        for group in optimizer.param_groups:
            rate = group["lr"]
            own.append(rate.clone() if isinstance(rate, Tensor) else rate)
            if isinstance(rate, Tensor):
                # In place: a compiled or captured step holds on to the tensor.
                rate.mul_(self.factor)
            else:
                group["lr"] = rate * self.factor

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        own = self._own.pop(id(optimizer), None)
        for group, rate in zip(optimizer.param_groups, own or (), strict=False):
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
