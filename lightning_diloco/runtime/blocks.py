"""Memory that is used again as soon as nobody holds it.

The operating system gives a block of megabytes back when it is freed, and clears its pages one by one when it is asked for again. That
costs more than what is done with it: 3.5 us for a page of 4 KiB on a virtual machine, 14 ms for 16 MiB that are added up in 4 ms.
Fragments and payloads come and go all the time and are about equally large, so `Blocks` keeps a few of theirs.

**Who owns a block.** Whoever holds its view: the view, a slice of it, a tensor or array on it. It may be kept and handed to other
threads. The block goes back when the last of these is gone, never before: it is lent as an object of its own, which all of them refer to,
and the finalizer of that object gives the block back. So memory that somebody still reads is never written to, nobody has to say that he
has done with it, and nobody can forget to. Nobody waits either: who finds the pool busy gets fresh memory.

**Sizes.** A block is as large as what it was made for, and serves whatever fills four fifths of it. Blocks of one size for all would be
as large as the largest, and everything that lies in them as well: with one tensor of a third of the model, eight times what is needed.

**How much is kept** is either said, or follows what is used: then blocks in use and free ones are together no more than were in use at
once at some moment of the last `RECENT` loans. A founding, which is larger than all that follows, is forgotten soon after.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import deque
from typing import Final

__all__ = ["RECENT", "Block", "Blocks"]

RECENT: Final = 32
"""Loans whose highest use bounds what is kept."""
_MIN_MAPPED_BYTES: Final = 1 << 16
"""Below, clearing memory costs no more than asking the operating system for it."""

Block = bytearray | mmap.mmap | memoryview
"""Memory that can be written to; its length is its bytes."""


class Blocks:
    """Blocks that are used again; may be called from any thread, and never waits.

    Args:
        max_free_bytes: what is kept while nobody uses it; the blocks that were not used for the longest time are freed first. None: see
            the module's docstring.
    """

    def __init__(self, max_free_bytes: int | None = None) -> None:
        self._max_free_bytes = max_free_bytes
        self._lock = threading.Lock()
        self._free: list[Block] = []
        self._lent: dict[int, int] = {}
        self._recent: deque[int] = deque(maxlen=RECENT)
        # A finalizer runs at any moment, also in a thread that holds the lock: it leaves the block here for whoever gets the lock next.
        self._returned: deque[Block] = deque()

    @property
    def free_bytes(self) -> int:
        """Bytes of the blocks that are kept at the moment and used by nobody."""
        return sum(len(block) for block in [*self._free, *self._returned])

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that somebody holds."""
        return sum(list(self._lent.values()))

    def view(self, num_bytes: int) -> memoryview:
        """Bytes that are not set.

        Args:
            num_bytes: B.

        Returns:
            A writable view, format "B", of B bytes; aligned for every dtype.

        Raises:
            MemoryError: there is not so much.
        """
        return memoryview(self._lend(num_bytes)).cast("B") if num_bytes else memoryview(bytearray())

    def trim(self) -> None:
        """Free what nobody uses."""
        self._recent.clear()
        if self._lock.acquire(blocking=False):
            try:
                surplus, self._free = self._free, []
            finally:
                self._lock.release()
            surplus.clear()

    def _lend(self, num_bytes: int) -> ctypes.Array[ctypes.c_ubyte]:
        block = self._take(num_bytes)
        if block is None:
            block = self._fresh(num_bytes)
        lease = (ctypes.c_ubyte * num_bytes).from_buffer(block)
        self._lent[id(lease)] = len(block)
        # Whoever holds the memory holds the lease, and the finalizer holds the block until the lease is gone.
        weakref.finalize(lease, self._give_back, id(lease), block).atexit = False
        return lease

    def _fresh(self, num_bytes: int) -> Block:
        """A block of its own; the pages of a large one come one by one as they are written, so that nobody waits for all of them."""
        if num_bytes < _MIN_MAPPED_BYTES:
            return bytearray(num_bytes)
        try:
            return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(f"{num_bytes} bytes for a block: {error}. Free memory on this machine.") from None

    def _take(self, num_bytes: int) -> Block | None:
        """The smallest block that will do; None if there is none, or the pool is busy."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            self._sort_in()
            fitting = [(len(block), i) for i, block in enumerate(self._free) if 0 <= len(block) - num_bytes <= num_bytes // 4]
            block = self._free.pop(min(fitting)[1]) if fitting else None
            lent = num_bytes if block is None else len(block)
            self._recent.append(self.used_bytes + lent)
            surplus = self._surplus(lent)
        finally:
            self._lock.release()
        surplus.clear()  # outside of the lock: the operating system takes its time
        return block

    def _give_back(self, key: int, block: Block) -> None:
        del self._lent[key]
        self._returned.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
                surplus = self._surplus(0)
            finally:
                self._lock.release()
            surplus.clear()

    def _sort_in(self) -> None:
        """Under the lock: take what came back."""
        while self._returned:
            self._free.append(self._returned.popleft())

    def _surplus(self, lent: int) -> list[Block]:
        """Under the lock: what is too much, with `lent` bytes just taken."""
        limit = self._max_free_bytes
        if limit is None:
            limit = max(self._recent, default=0) - self.used_bytes - lent
        surplus: list[Block] = []
        while self._free and sum(len(block) for block in self._free) > limit:
            surplus.append(self._free.pop(0))
        return surplus
