"""The inner learning rate, multiplied where the batch is another one than the user's (see `strategy.batch_options`).

The factor is in the optimizers' groups only while a step is done: schedules, monitors and checkpoints see the user's own rate, and a
schedule
that goes on from the present rate does not multiply the factor up.
"""

from __future__ import annotations

from typing import Any

import torch
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
        self._own: dict[int, list[tuple[dict[str, Any], Any, Any]]] = {}

    def attach(self, optimizers: list[Optimizer]) -> None:
        """Multiply the rates of these from now on."""
        self.detach()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def detach(self) -> None:
        """Take the hooks off; idempotent. A step that an exception has ended gets its own rates back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for saved in self._own.values():
            _restore(saved)
        self._own.clear()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.factor == 1.0:
            return
        saved: list[tuple[dict[str, Any], Any, Any]] = []
        self._own[id(optimizer)] = saved
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, Tensor):
                own = rate.clone()
                # In place: a compiled or captured step holds on to the tensor.
                rate.mul_(self.factor)
                saved.append((group, own, rate.clone()))
            elif isinstance(rate, int | float):
                group["lr"] = rate * self.factor
                saved.append((group, rate, group["lr"]))

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _restore(self._own.pop(id(optimizer), []))


def _restore(saved: list[tuple[dict[str, Any], Any, Any]]) -> None:
    """Put back the rates that are still what they were made; what the user has set within the step stays."""
    for group, own, multiplied in saved:
        rate = group.get("lr")
        if isinstance(rate, Tensor) and isinstance(multiplied, Tensor):
            if torch.equal(rate, multiplied):
                rate.copy_(own)
        elif not isinstance(multiplied, Tensor) and rate == multiplied:
            group["lr"] = own
