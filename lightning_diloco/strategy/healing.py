"""Inner optimizer state after a refused contribution.

A fragment whose contribution was not finite goes back to the published parameters (PROTOCOL.md section 7). Its moments may hold the same
infinities, and would spread them again in the next step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["reset_nonfinite_moments"]


def reset_nonfinite_moments(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> None:
    """Zero every state tensor of these parameters that holds a value that is not finite.

    Args:
        optimizers: the learner's optimizers.
        parameters: of the fragment that was healed.
    """
    with torch.no_grad():
        for parameter in parameters:
            for optimizer in optimizers:
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and torch.is_floating_point(value) and not bool(torch.isfinite(value).all()):
                        value.zero_()
