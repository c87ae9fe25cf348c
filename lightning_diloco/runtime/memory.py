"""Memory of large flat tensors, used again as soon as nobody holds them.

The operating system gives a block of megabytes back when it is freed, and clears its pages one by one when it is asked for again. That
costs more than what is computed in it: 3.5 us for a page of 4 KiB on a virtual machine, 14 ms for 16 MiB that are added up in 4 ms.
Fragments come and go all the time and are about equally large, so a `Pool` keeps a few of their blocks.

A tensor of a pool is like any other: it may be kept, sliced and handed to other threads. Its block goes back when the last tensor (or
view of bytes) on it is gone, never before; so a tensor that somebody still reads is never written to, and nobody has to say that he has
done with one. Nobody waits either: who finds the pool busy gets fresh memory.

**Sizes.** A block is as large as the tensor that it was made for, and serves any tensor that fills four fifths of it. Blocks of one
size for all fragments would be as large as the largest, and everything that lies in them as well: with one tensor of a third of the
model, eight times what is needed.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

__all__ = ["Pool"]


class Pool:
    """Blocks that are used again; may be called from any thread, and never waits.

    Args:
        max_free_bytes: what is kept while nobody uses it; the blocks that were not used for the longest time are freed first.
        is_page_locked: whether a GPU is to reach the blocks by itself.
    """

    def __init__(self, max_free_bytes: int, *, is_page_locked: bool = False) -> None:
        self._max_free_bytes, self._is_page_locked = max_free_bytes, is_page_locked
        self._lock = threading.Lock()
        self._free: list[Tensor] = []
        self._lent: dict[int, int] = {}
        # A finalizer runs at any moment, also in a thread that holds the lock: it leaves the block here for whoever gets the lock next.
        self._returned: deque[Tensor] = deque()

    @property
    def free_bytes(self) -> int:
        """Bytes of the blocks that are kept at the moment and used by nobody."""
        return sum(block.numel() for block in [*self._free, *self._returned])

    @property
    def used_bytes(self) -> int:
        """Bytes of the tensors that somebody holds."""
        return sum(list(self._lent.values()))

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
        """
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        block = self._take(num_bytes)
        if block is None:
            block = torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._is_page_locked)
        lease = (ctypes.c_ubyte * num_bytes).from_address(block.data_ptr())
        self._lent[id(lease)] = num_bytes
        # The tensor's memory holds the lease, and the finalizer holds the block until the lease is gone.
        weakref.finalize(lease, self._give_back, id(lease), block).atexit = False
        return torch.frombuffer(lease, dtype=torch.uint8)

    def _take(self, num_bytes: int) -> Tensor | None:
        """The smallest block that will do; None if there is none, or the pool is busy."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            surplus = self._sort_in()
            fitting = [(block.numel(), i) for i, block in enumerate(self._free) if 0 <= block.numel() - num_bytes <= num_bytes // 4]
            block = self._free.pop(min(fitting)[1]) if fitting else None
        finally:
            self._lock.release()
        surplus.clear()  # outside of the lock: the operating system takes its time
        return block

    def _give_back(self, key: int, block: Tensor) -> None:
        del self._lent[key]
        self._returned.append(block)
        if self._lock.acquire(blocking=False):
            try:
                surplus = self._sort_in()
            finally:
                self._lock.release()
            surplus.clear()

    def _sort_in(self) -> list[Tensor]:
        """Under the lock: keep what came back; returns what is too much."""
        surplus: list[Tensor] = []
        while self._returned:
            self._free.append(self._returned.popleft())
        while sum(block.numel() for block in self._free) > self._max_free_bytes:
            surplus.append(self._free.pop(0))
        return surplus
