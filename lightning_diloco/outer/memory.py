"""Where a result lies that nobody gave memory for, and in what pieces it is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["BLOCK_ELEMENTS", "blocks", "flat", "raw"]

BLOCK_ELEMENTS = 1 << 18
"""What is done with 1 MiB of float32 finds it in the cache, and Python's share is small; smaller blocks were slower.

A whole number of the sections of an int4 payload, so that a block can be decoded by itself."""


def blocks(num_elements: int) -> Iterator[slice]:
    """The parts of a flat fragment that are computed one after the other.

    Args:
        num_elements: N, at least 0.
    """
    for start in range(0, num_elements, BLOCK_ELEMENTS):
        yield slice(start, min(start + BLOCK_ELEMENTS, num_elements))


def flat(num_elements: int) -> Tensor:
    """A tensor of its own, whose values are not set.

    Its dtype and device are said, because torch's defaults are not ours: that of the dtype is the whole process's, and Lightning's
    `bf16-true` changes it for the time of every forward pass, on another thread.

    Args:
        num_elements: N.

    Returns:
        float32 [N] in host memory.
    """
    return torch.empty(num_elements, dtype=torch.float32, device="cpu")


def raw(num_bytes: int) -> Tensor:
    """Bytes of their own, not set: uint8 [num_bytes] in host memory, aligned for every dtype."""
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
