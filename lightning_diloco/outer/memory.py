"""Where a result lies that nobody gave memory for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["flat"]


def flat(num_elements: int) -> Tensor:
    """A tensor of its own, whose values are not set.

    Its dtype is said, because torch's default is the whole process's: Lightning's `bf16-true` changes it for the time of every forward
    pass, on another thread.

    Args:
        num_elements: N.

    Returns:
        float32 [N] in host memory.
    """
    return torch.empty(num_elements, dtype=torch.float32)
