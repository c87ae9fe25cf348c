"""AdamW with another second moment: is a learner's batch what keeps it behind data parallel training?

Not a benchmark itself: `emulate.py` uses it. With M learners, g a learner's gradient, G the mean of all, m and v the usual moments:

    shared      v follows G^2 instead of g^2: the denominator that data parallel training has; all learners step together.
                Merged after every step it is data parallel training, but for the clipping, which stays each learner's own
    estimate    v / M + (1 - 1/M) s, with s = (m^2 - c v) / (1 - c), at least 0: what v of G should be if g is a signal and noise of M times
                the variance; c = (1 - beta1) / (1 + beta1) is what m keeps of the noise
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["OtherAdamW", "step_together"]

BETA1 = 0.9
NOISE = (1 - BETA1) / (1 + BETA1)
EPS = 1e-8


class OtherAdamW(torch.optim.Optimizer):
    """AdamW; `step` estimates, `step_with` takes the mean gradients.

    Args:
        groups: parameter groups with their `weight_decay`.
        lr: learning rate.
        beta2: decay rate of the second moment.
        learners: M.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, *, beta2: float, learners: int) -> None:
        super().__init__(groups, {"lr": lr})
        self._beta2, self._learners, self._steps = beta2, learners, 0

    @property
    def parameters(self) -> list[Tensor]:
        """Of all groups, in order."""
        return [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step with the estimated second moment."""
        self.step_with([None] * len(self.parameters))

    @torch.no_grad()
    def step_with(self, means: Sequence[Tensor | None]) -> None:
        """One step; where a mean gradient is given, the second moment follows it."""
        self._steps += 1
        decays = [group["weight_decay"] for group in self.param_groups for _ in group["params"]]
        lr = self.param_groups[0]["lr"]
        for p, decay, mean_gradient in zip(self.parameters, decays, means, strict=True):
            state = self.state[p]
            if not state:
                state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
            gradient = p.grad
            assert gradient is not None
            state["m"].lerp_(gradient, 1 - BETA1)
            state["v"].lerp_((gradient if mean_gradient is None else mean_gradient).square(), 1 - self._beta2)
            first, second = state["m"] / (1 - BETA1**self._steps), state["v"] / (1 - self._beta2**self._steps)
            if mean_gradient is None:
                signal = ((first.square() - NOISE * second) / (1 - NOISE)).clamp_min_(0.0)
                second = second / self._learners + (1 - 1 / self._learners) * torch.minimum(signal, second)
            p.mul_(1 - lr * decay)
            p.addcdiv_(first, second.sqrt() + EPS, value=-lr)


def step_together(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """A step of all learners, each with its own gradient and the second moment of the mean of all."""
    ours = [optimizer for optimizer in optimizers if isinstance(optimizer, OtherAdamW)]
    same = zip(*(optimizer.parameters for optimizer in ours), strict=True)
    means = [torch.stack([p.grad for p in parameters if p.grad is not None]).mean(0) for parameters in same]
    for optimizer in ours:
        optimizer.step_with(means)
