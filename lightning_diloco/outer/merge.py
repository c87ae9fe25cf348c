r"""The merge: weighted contributions to one fragment, folded in one at a time as they arrive.

M contributions d_m with weights w_m, W = sum w_m; per tensor, by its rule in the layout:

    mean:  sum w d / W
    rda:   (sum w ||d|| / W) phi(sum w phi(d) / W)          phi(x) = x / ||x||,  phi(0) = 0

Learners' contributions are nearly orthogonal: the mean of M of them is shorter than they are by 1 / sqrt(M); radial-directional
averaging (RDA) averages length and direction apart and keeps the length. It is invariant under permutation (up to rounding), equal
inputs give themselves, equal norms R give norm R.

**One accumulator** of N elements holds A = sum (w / 2^e) d (mean) or sum (w / 2^e) phi(d) (rda) with 2^e in (W, 2 W]: the exponent grows
with the sum of the weights, by exact multiplications with powers of two, so neither huge weights (tokens squared) nor tiny norms leave
float32's range. The first contribution is kept as it is until a second one comes, because the formula would not return it bit for bit.

**Waiting payloads.** A pass over the accumulator costs as much as decoding a payload and adding it, so payloads wait until they have as
many bytes as the accumulator, 4 N in all, and are then added together, block by block, in the order in which they came. An element sees
the same products and sums in the same order as if each had been added at once: when that is done changes no bit.

**Cancellation.** Where the directions cancel exactly, rounding leaves about 2^-24 of a unit vector per fold, and phi would blow that
up to full length. Below (M + 1) 2^-22 the sum is noise, and the result is 0.

**Replay.** Reductions differ in the last bit between CPUs and thread counts, so norms and scales are recorded as float64 and can be
given instead of computed. Everything else is elementwise, a product and a sum as two kernels (no fused multiply-add): the same
records give the same bits on every machine.

References:
    Decoupled DiLoCo, arXiv 2604.21428: RDA, weights. Granularity (per tensor) and the noise floor are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.outer._checks import require_flat
from lightning_diloco.outer.encoded import Encoded
from lightning_diloco.outer.memory import BLOCK_ELEMENTS, blocks, flat
from lightning_diloco.outer.norms import Meter, Piece, cut, measure
from lightning_diloco.outer.spec import Fragment

__all__ = ["FoldRecord", "MergeAccumulator", "MergeRecord", "Merged"]

_NOISE = 2.0**-22
_SAFE = 2.0**100
"""Factors within [1 / _SAFE, _SAFE] are normal float32 numbers with room; others are applied in two parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldRecord:
    """What has to be recorded of a fold."""

    weight: float
    """The contribution's weight, float64."""
    norms: tuple[float, ...]
    """For each slice the norm of its whole tensor's contribution, float64."""

    @property
    def is_counted(self) -> bool:
        """Whether it takes part: a weight of 0 does not."""
        return self.weight > 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRecord:
    """What has to be recorded of a merge's end."""

    scales: tuple[float, ...]
    """For each slice the factor, float64, from the accumulator to the result; 1.0 when one contribution is returned as it is."""
    count: int
    """Contributions merged, those of weight 0 left out."""
    total_weight: float
    """Sum of their weights."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A contribution that was folded in and is not in the accumulator yet."""

    contribution: Encoded
    factors: tuple[float | None, ...]
    """By slice; None: all of it is zero."""
    shrink: float
    """What the accumulator is multiplied by before, a power of two."""


class Merged:
    """The result of a merge, whose blocks are computed when they are asked for, so that the outer step finds them in the cache.

    Args:
        values: the accumulator, or the only contribution.
        scales: for each slice the factor to the result; None: there is nothing to multiply.
        pieces: of the fragment.
        allocate: where memory comes from, float32 of so many elements.
    """

    def __init__(
        self, values: Encoded, scales: tuple[float, ...] | None, pieces: list[list[Piece]], allocate: Callable[[int], Tensor]
    ) -> None:
        self._values, self._scales, self._pieces, self._allocate = values, scales, pieces, allocate
        self.num_elements = values.num_elements
        """N."""

    @classmethod
    def plain(cls, values: Tensor) -> Merged:
        """A merged pseudo-gradient that is there already, flat float32 [N], kept, not copied."""
        return cls(Encoded.plain(values), None, [], flat)

    def part(self, part: slice, scratch: Tensor) -> Tensor:
        """The values of one of the fragment's `blocks`, only to be read: in the scratch, or where they lie.

        Args:
            part: which.
            scratch: float32, at least as large as the block.
        """
        values = self._values.part(part, scratch)
        if self._scales is None:
            return values
        for piece in self._pieces[part.start // BLOCK_ELEMENTS]:
            _multiply(values[piece.where], self._scales[piece.slice_index], scratch[piece.where])
        return scratch[: values.numel()]

    def whole(self) -> Tensor:
        """All of it, float32 [N]: the very tensor that was folded in if it was the only one, and else memory of its own."""
        if self._scales is None and self._values.is_plain:
            return self._values.payload.view(torch.float32)
        merged = self._allocate(self.num_elements)
        for part in blocks(self.num_elements):
            self.part(part, merged[part])
        return merged


class MergeAccumulator:
    """The open merge of one fragment: `fold` contributions in the recorded order, then `close` or `result` once.

    Args:
        fragment: sizes, tensors and merge rules.
        allocate: where the memory of accumulator and scratch comes from, float32 of so many elements.
    """

    def __init__(self, fragment: Fragment, *, allocate: Callable[[int], Tensor] = flat) -> None:
        self._fragment = fragment
        self._allocate = allocate
        self._size = fragment.num_params
        self._pieces = cut(fragment)
        self._count = 0
        self._total_weight = 0.0
        self._exponent = 0
        self._mean_norms = [0.0] * len(fragment.slices)
        self._first: tuple[Encoded, FoldRecord] | None = None
        self._waiting: list[_Waiting] = []
        self._accumulator: Tensor | None = None
        self._is_closed = False

    @property
    def count(self) -> int:
        """Contributions folded in with a weight above 0."""
        return self._count

    @property
    def total_weight(self) -> float:
        """Sum of their weights."""
        return self._total_weight

    def fold(self, d: Tensor | Encoded, weight: float, *, norms: Sequence[float] | None = None) -> FoldRecord:
        """Fold one contribution in.

        Args:
            d: the contribution, encoded, or flat float32 [N] in host memory. It is not written to, and may be kept without a copy:
                leave an encoded one as it is until the merge is closed, and of the others the first.
            weight: at least 0, finite. A contribution of weight 0 does not count and changes nothing.
            norms: its norms by slice, as `measure` found them or as they were recorded; None computes them.

        Returns:
            Weight and norms, to be recorded.

        Raises:
            LocalProtocolError: sizes do not fit; the weight is negative or not finite; the contribution is not finite (to be refused
                before it comes here); the merge is closed.
        """
        self._require_open()
        if isinstance(d, Tensor):
            require_flat(d, self._size, "contribution")
            d = Encoded.plain(d)
        elif d.num_elements != self._size:
            raise LocalProtocolError(f"A contribution of {d.num_elements} elements: this fragment has {self._size}.")
        total = self._total_weight + weight
        if not (weight >= 0.0 and math.isfinite(total)):
            raise LocalProtocolError(f"weight={weight!r}: must be at least 0, with a finite sum over all contributions.")
        record = FoldRecord(weight=weight, norms=self._checked(norms, "norms") or self._norms(d))
        if not all(math.isfinite(norm) for norm in record.norms):
            raise LocalProtocolError("A contribution that is not finite must be refused before it is folded in.")
        if record.is_counted:
            self._take(d, record, total)
        return record

    def close(self, *, scales: Sequence[float] | None = None) -> tuple[Merged, MergeRecord]:
        """Close the merge.

        Args:
            scales: recorded scales, for a replay; None computes them.

        Returns:
            The merged pseudo-gradient, and what has to be recorded.

        Raises:
            LocalProtocolError: the total weight is 0 (the round is to be cancelled), or the merge is closed already.
        """
        self._require_open()
        given = self._checked(scales, "scales")
        if self._first is not None:
            used = (1.0,) * len(self._fragment.slices)
            merged = Merged(self._first[0], None, self._pieces, self._allocate)
        elif self._count:
            meter = Meter(self._fragment, self._pieces) if given is None and self._has_rda() else None
            accumulator = self._add_waiting(meter)
            used = given or self._scales(meter)
            merged = Merged(Encoded.plain(accumulator), used, self._pieces, lambda size: accumulator)
        else:
            raise LocalProtocolError("A merge of total weight 0 has no result: cancel the round.")
        self._is_closed, self._first, self._accumulator = True, None, None
        return merged, MergeRecord(scales=used, count=self._count, total_weight=self._total_weight)

    def result(self, *, scales: Sequence[float] | None = None) -> tuple[Tensor, MergeRecord]:
        """Close the merge and compute all of the result.

        Returns:
            The merged pseudo-gradient, flat float32 [N] (the very tensor that was folded in, if it was the only one), and what has to
            be recorded. Arguments and errors as in `close`.
        """
        merged, record = self.close(scales=scales)
        return merged.whole(), record

    def _require_open(self) -> None:
        if self._is_closed:
            raise LocalProtocolError("This merge is closed: open a new accumulator for the next one.")

    def _checked(self, values: Sequence[float] | None, what: str) -> tuple[float, ...] | None:
        if values is not None and len(values) != len(self._fragment.slices):
            raise LocalProtocolError(f"{len(values)} recorded {what}: this fragment has {len(self._fragment.slices)} slices.")
        return None if values is None else tuple(values)

    def _norms(self, d: Encoded) -> tuple[float, ...]:
        return measure(self._fragment, d, allocate=self._allocate, pieces=self._pieces).of_slices

    def _take(self, d: Encoded, record: FoldRecord, total: float) -> None:
        self._count += 1
        self._total_weight = total
        for i, norm in enumerate(record.norms):
            # A running mean: the products of large weights and norms would leave float64's range.
            self._mean_norms[i] += (norm - self._mean_norms[i]) * (record.weight / total)
        if self._count == 1:
            self._first = (d, record)
            return
        if self._first is not None:
            self._exponent = math.frexp(total)[1]
            self._wait(*self._first, 0)
            self._first = None
        grown = math.frexp(total)[1] - self._exponent
        self._exponent += grown
        self._wait(d, record, grown)
        if sum(waiting.contribution.payload.numel() for waiting in self._waiting) >= 4 * self._size:
            self._add_waiting()

    def _wait(self, d: Encoded, record: FoldRecord, grown: int) -> None:
        share = math.ldexp(record.weight, -self._exponent)
        factors = (
            None if norm == 0.0 else share if part.merge == "mean" else share / norm
            for part, norm in zip(self._fragment.slices, record.norms, strict=True)
        )
        self._waiting.append(_Waiting(d, tuple(factors), 2.0**-grown))

    def _add_waiting(self, meter: Meter | None = None) -> Tensor:
        """Bring the accumulator up to date, and measure it if a meter is given; returns it."""
        is_new = self._accumulator is None
        accumulator = self._allocate(self._size) if self._accumulator is None else self._accumulator
        if self._waiting or meter is not None:
            scratch = self._allocate(min(self._size, BLOCK_ELEMENTS))
            for part, pieces in zip(blocks(self._size), self._pieces, strict=True):
                target = accumulator[part]
                if is_new:
                    target.zero_()
                for waiting in self._waiting:
                    _add(target, part, pieces, waiting, scratch)
                if meter is not None:
                    meter.add(target)
        self._accumulator, self._waiting = accumulator, []
        return accumulator

    def _has_rda(self) -> bool:
        return any(part.merge != "mean" for part in self._fragment.slices)

    def _scales(self, meter: Meter | None) -> tuple[float, ...]:
        """From the accumulator, as it was measured; None: there is no tensor that asks for it."""
        to_mean = 1.0 / math.ldexp(self._total_weight, -self._exponent)
        if meter is None:
            return (to_mean,) * len(self._fragment.slices)
        floor = (self._count + 1) * _NOISE
        scales: list[float] = []
        for part, norm, mean_norm in zip(self._fragment.slices, meter.norms().of_slices, self._mean_norms, strict=True):
            if part.merge == "mean":
                scales.append(to_mean)
            else:
                scales.append(mean_norm / norm if norm * to_mean > floor else 0.0)
        return tuple(scales)


def _add(target: Tensor, part: slice, pieces: list[Piece], waiting: _Waiting, scratch: Tensor) -> None:
    """Add a block of a contribution to that of the accumulator, each product rounded to float32 before its sum."""
    if waiting.shrink != 1.0:
        _multiply(target, waiting.shrink, target)
    values = waiting.contribution.part(part, scratch)
    for piece in pieces:
        factor = waiting.factors[piece.slice_index]
        if factor is not None:
            product = scratch[piece.where]
            _multiply(values[piece.where], factor, product)
            target[piece.where].add_(product)


def _factors(factor: float) -> tuple[float, ...]:
    """One or two factors with the same product, each inside float32's normal range."""
    if factor > _SAFE:
        return (_SAFE, factor / _SAFE)
    if 0.0 < factor < 1.0 / _SAFE:
        return (1.0 / _SAFE, factor * _SAFE)
    return (factor,)


def _multiply(values: Tensor, factor: float, out: Tensor) -> None:
    """Put factor * values into `out`, which may be the same memory."""
    first, *rest = _factors(factor)
    torch.mul(values, first, out=out)
    for f in rest:
        out.mul_(f)
