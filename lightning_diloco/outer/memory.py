"""Memory of large flat tensors, used again as soon as nobody holds them.

The operating system gives a block of megabytes back when it is freed, and clears its pages one by one when it is asked for again. That
costs more than what is computed in it: 3.5 us for a page of 4 KiB on a virtual machine, 14 ms for 16 MiB that are added up in 4 ms.
Fragments come and go all the time and are about equally large, so a `Pool` keeps a few blocks of the largest size.

A tensor of a pool is like any other: it may be kept, sliced and handed to other threads. Its block goes back when the last tensor (or
view of bytes) on it is gone, never before; so a tensor that somebody still reads is never written to, and nobody has to say that he has
done with one. Blocks beyond `keep` are freed.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

__all__ = ["Pool"]


class Pool:
    """Blocks of one size; may be used from any thread.

    Args:
        num_bytes: size of a block.
        keep: blocks that are kept when nobody uses them.
    """

    def __init__(self, num_bytes: int, *, keep: int) -> None:
        self._num_bytes = num_bytes
        self._keep = keep
        self._free: list[Tensor] = []

    @property
    def num_free(self) -> int:
        """Blocks that are kept at the moment and used by nobody."""
        return len(self._free)

    def flat(self, num_elements: int) -> Tensor:
        """A tensor whose values are not set.

        Args:
            num_elements: N.

        Returns:
            float32 [N] in host memory. One that does not fit into a block has memory of its own.
        """
        return self.raw(4 * num_elements).view(torch.float32)

    def raw(self, num_bytes: int) -> Tensor:
        """Bytes that are not set.

        Args:
            num_bytes: B.

        Returns:
            uint8 [B] in host memory, aligned for every dtype; as `flat`.
        """
        if not 0 < num_bytes <= self._num_bytes:
            return torch.empty(num_bytes, dtype=torch.uint8)
        try:
            block = self._free.pop()
        except IndexError:
            block = torch.empty(self._num_bytes, dtype=torch.uint8)
        lease = (ctypes.c_ubyte * num_bytes).from_address(block.data_ptr())
        # The tensor's memory holds the lease, and the finalizer holds the block until the lease is gone.
        weakref.finalize(lease, self._take_back, block).atexit = False
        return torch.frombuffer(lease, dtype=torch.uint8)

    def _take_back(self, block: Tensor) -> None:
        if len(self._free) < self._keep:
            self._free.append(block)
