"""Memory of large flat tensors, used again as soon as nobody holds them.

A tensor of a `Pool` is like any other: it may be kept, sliced and handed to other threads. Whose a block is, how large, and how many are
kept stands in `runtime/blocks.py`, which the transport uses too, without torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_diloco.runtime.blocks import Blocks

__all__ = ["Pool"]


class Pool(Blocks):
    """Blocks as tensors.

    Args:
        max_free_bytes: see `Blocks`.
    """

    def flat(self, num_elements: int) -> Tensor:
        """A tensor whose values are not set.

        Args:
            num_elements: N.

        Returns:
            float32 [N] in host memory.
        """
        return self.raw(4 * num_elements).view(torch.float32)

    def raw(self, num_bytes: int) -> Tensor:
        """Bytes that are not set.

        Args:
            num_bytes: B.

        Returns:
            uint8 [B] in host memory, aligned for every dtype.

        Raises:
            MemoryError: there is not so much.
        """
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(self._lend(num_bytes), dtype=torch.uint8)
