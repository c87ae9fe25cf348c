"""How long a contribution is, as a whole and tensor by tensor: one pass, block by block, while a block is in the cache.

All norms come from one set of sums of squares, S = sum x^2 per tensor: a tensor's norm is sqrt(S), and the whole contribution's is the root
of the sum of all S. They are what RDA divides by, what the norm gate looks at, and what tells that a value is not finite.

**Precision.** A piece (the part of a tensor in one block) is cut into rows of 256 elements; what is left over is a row as well. The squares
of a row are added in float32, those of the rows in float64. A float32 sum of n squares, in whatever order, is off by at most n 2^-24 of
itself (nothing cancels), and its root by half of that, so with the root's own rounding

    |norm - ||x||| <= 130 * 2^-24 ||x||          about 7.8e-6; of random numbers 1e-9 was measured

**Range.** float32 squares overflow from 2^64 on and are lost below 2^-75. A piece whose sum is not finite or is below 2^-80 is added up
again in float64, where no float32 value's square overflows or is lost. So a norm is finite exactly when every element is.

**Threads.** Each row is added up by one thread, and the rows of a piece (at most 1024) by one, so the sums do not depend on how many
there are. Other instruction sets add in another order: norms are recorded for a replay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.outer.encoded import Encoded
from lightning_diloco.outer.memory import BLOCK_ELEMENTS, blocks, flat
from lightning_diloco.outer.spec import Fragment

__all__ = ["Meter", "Norms", "Piece", "cut", "measure", "sum_of_squares"]

_ROW_ELEMENTS = 256
_LEAST_SUM = 2.0**-80
"""What float32 loses of 2^18 squares, 2^-126 each where subnormal numbers are flushed, is below 2^-28 of it."""


@dataclass(frozen=True, slots=True)
class Norms:
    """What `measure` finds."""

    whole: float
    """||d||; inf or nan when an element is not finite, and only then."""
    of_slices: tuple[float, ...]
    """For each slice the norm of its whole tensor."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a block has of a slice."""

    slice_index: int
    """Which slice of the fragment."""
    where: slice
    """Elements of the block."""


def cut(fragment: Fragment) -> list[list[Piece]]:
    """The pieces of every block of a fragment, in order, without gaps."""
    pieces: list[list[Piece]] = [[] for _ in blocks(fragment.num_params)]
    start = 0
    for index, part in enumerate(fragment.slices):
        stop = start + part.length
        while start < stop:
            block, first = divmod(start, BLOCK_ELEMENTS)
            last = min(stop - block * BLOCK_ELEMENTS, BLOCK_ELEMENTS)
            pieces[block].append(Piece(index, slice(first, last)))
            start += last - first
    return pieces


def sum_of_squares(values: Tensor) -> float:
    """Sum of the squares of a piece; precision and range are in the module's docstring.

    Args:
        values: float32 [n], n at most `BLOCK_ELEMENTS`, contiguous.

    Returns:
        The sum; inf or nan when a value is not finite, and only then.
    """
    total = _sum_of_rows(values)
    return total if _LEAST_SUM <= total < math.inf else _sum_of_rows(values.double())


def _sum_of_rows(values: Tensor) -> float:
    whole = values.numel() // _ROW_ELEMENTS * _ROW_ELEMENTS
    total = 0.0
    if whole:
        # A norm and its square again, because this is torch's only reduction of squares that does not write them down first.
        roots = torch.linalg.vector_norm(values[:whole].view(-1, _ROW_ELEMENTS), dim=1).double()
        total = torch.dot(roots, roots).item()
    if whole < values.numel():
        total += torch.linalg.vector_norm(values[whole:]).item() ** 2
    return total


class Meter:
    """Takes a contribution's blocks one after the other.

    Args:
        fragment: whose tensors.
        pieces: what `cut` made of it, if it is at hand.
    """

    def __init__(self, fragment: Fragment, pieces: list[list[Piece]] | None = None) -> None:
        self._pieces = cut(fragment) if pieces is None else pieces
        self._tensor_of = _tensor_indices(fragment)
        self._sums = [0.0] * (self._tensor_of[-1] + 1)
        self._next = 0

    def add(self, block: Tensor) -> None:
        """Take the next block, float32 of its size."""
        for piece in self._pieces[self._next]:
            self._sums[self._tensor_of[piece.slice_index]] += sum_of_squares(block[piece.where])
        self._next += 1

    def norms(self) -> Norms:
        """The norms, when all blocks were taken.

        Raises:
            LocalProtocolError: some were not.
        """
        if self._next != len(self._pieces):
            raise LocalProtocolError(f"{self._next} of {len(self._pieces)} blocks were measured: a norm is that of all of them.")
        roots = [math.sqrt(total) for total in self._sums]
        return Norms(math.sqrt(sum(self._sums)), tuple(roots[tensor] for tensor in self._tensor_of))


def measure(
    fragment: Fragment,
    contribution: Encoded,
    *,
    allocate: Callable[[int], Tensor] = flat,
    pieces: list[list[Piece]] | None = None,
    look: Callable[[slice], None] | None = None,
) -> Norms:
    """Go through a contribution once.

    Args:
        fragment: whose it is.
        contribution: of the fragment's size.
        allocate: where scratch memory comes from, float32 of so many elements.
        pieces: what `cut` made of the fragment, if it is at hand.
        look: called before each block is decoded with its bytes in the payload: whatever reads them brings them into the cache.

    Raises:
        LocalProtocolError: the contribution has another size.
    """
    size = fragment.num_params
    if contribution.num_elements != size:
        raise LocalProtocolError(f"A contribution of {contribution.num_elements} elements: fragment {fragment.fragment_id} has {size}.")
    scratch, meter = allocate(min(size, BLOCK_ELEMENTS)), Meter(fragment, pieces)
    for part in blocks(size):
        if look is not None:
            look(contribution.bytes_of(part))
        meter.add(contribution.part(part, scratch))
    return meter.norms()


def _tensor_indices(fragment: Fragment) -> Sequence[int]:
    """For each slice the number of its tensor: slices of one tensor follow each other."""
    indices: list[int] = []
    for part in fragment.slices:
        indices.append((indices[-1] if indices else -1) + (part.offset == 0))
    return indices
