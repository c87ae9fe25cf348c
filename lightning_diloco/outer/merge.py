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
from lightning_diloco.outer.memory import flat
from lightning_diloco.outer.pseudo_gradient import contribution_norm
from lightning_diloco.outer.spec import Fragment

__all__ = ["FoldRecord", "MergeAccumulator", "MergeRecord"]

_CHUNK_ELEMENTS = 1 << 18
"""Scratch of a fold: 1 MiB stays in the cache between the product and the sum."""
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


class MergeAccumulator:
    """The open merge of one fragment: `fold` contributions in the recorded order, then `result` once.

    Args:
        fragment: sizes, tensors and merge rules.
        allocate: where the accumulator's memory comes from, float32 of so many elements.
    """

    def __init__(self, fragment: Fragment, *, allocate: Callable[[int], Tensor] = flat) -> None:
        self._fragment = fragment
        self._allocate = allocate
        self._lengths = [part.length for part in fragment.slices]
        self._tensor_of = _tensor_indices(fragment)
        self._count = 0
        self._total_weight = 0.0
        self._exponent = 0
        self._mean_norms = [0.0] * len(self._lengths)
        self._first: tuple[Tensor, FoldRecord] | None = None
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

    def fold(self, d: Tensor, weight: float, *, norms: Sequence[float] | None = None) -> FoldRecord:
        """Fold one contribution in.

        Args:
            d: the decoded contribution, flat float32 [N] in host memory. It is not written to, but the first one is kept without a
                copy: leave it as it is until `result`.
            weight: at least 0, finite. A contribution of weight 0 does not count and changes nothing.
            norms: recorded norms, for a replay; None computes them.

        Returns:
            Weight and norms, to be recorded.

        Raises:
            LocalProtocolError: sizes do not fit; the weight is negative or not finite; the contribution is not finite (to be refused
                before it comes here); the merge is closed.
        """
        self._require_open()
        require_flat(d, self._fragment.num_params, "contribution")
        total = self._total_weight + weight
        if not (weight >= 0.0 and math.isfinite(total)):
            raise LocalProtocolError(f"weight={weight!r}: must be at least 0, with a finite sum over all contributions.")
        record = FoldRecord(weight=weight, norms=self._checked(norms, "norms") or self._norms(d))
        if not all(math.isfinite(norm) for norm in record.norms):
            raise LocalProtocolError("A contribution that is not finite must be refused before it is folded in.")
        if record.is_counted:
            self._take(d, record, total)
        return record

    def result(self, *, scales: Sequence[float] | None = None) -> tuple[Tensor, MergeRecord]:
        """Close the merge.

        Args:
            scales: recorded scales, for a replay; None computes them.

        Returns:
            The merged pseudo-gradient, flat float32 [N] (the very tensor that was folded in, if it was the only one), and what has to
            be recorded.

        Raises:
            LocalProtocolError: the total weight is 0 (the round is to be cancelled), or the merge is closed already.
        """
        self._require_open()
        given = self._checked(scales, "scales")
        if self._first is not None:
            merged, used = self._first[0], (1.0,) * len(self._lengths)
        elif self._accumulator is not None:
            merged = self._accumulator
            used = given or self._scales(merged)
            for part, scale in zip(merged.split_with_sizes(self._lengths), used, strict=True):
                _multiply(part, scale)
        else:
            raise LocalProtocolError("A merge of total weight 0 has no result: cancel the round.")
        self._is_closed, self._first, self._accumulator = True, None, None
        return merged, MergeRecord(scales=used, count=self._count, total_weight=self._total_weight)

    def _require_open(self) -> None:
        if self._is_closed:
            raise LocalProtocolError("This merge is closed: open a new accumulator for the next one.")

    def _checked(self, values: Sequence[float] | None, what: str) -> tuple[float, ...] | None:
        if values is not None and len(values) != len(self._lengths):
            raise LocalProtocolError(f"{len(values)} recorded {what}: this fragment has {len(self._lengths)} slices.")
        return None if values is None else tuple(values)

    def _take(self, d: Tensor, record: FoldRecord, total: float) -> None:
        self._count += 1
        self._total_weight = total
        for i, norm in enumerate(record.norms):
            # A running mean: the products of large weights and norms would leave float64's range.
            self._mean_norms[i] += (norm - self._mean_norms[i]) * (record.weight / total)
        if self._count == 1:
            self._first = (d, record)
            return
        if self._first is not None:
            first, first_record = self._first
            self._accumulator = self._allocate(first.numel()).zero_()
            self._exponent = math.frexp(total)[1]
            self._add(self._accumulator, first, first_record)
            self._first = None
        assert self._accumulator is not None
        grown = math.frexp(total)[1] - self._exponent
        if grown:
            _multiply(self._accumulator, 2.0**-grown)
            self._exponent += grown
        self._add(self._accumulator, d, record)

    def _add(self, accumulator: Tensor, d: Tensor, record: FoldRecord) -> None:
        share = math.ldexp(record.weight, -self._exponent)
        scratch = torch.empty(min(_CHUNK_ELEMENTS, d.numel()), dtype=torch.float32)
        parts = zip(
            self._fragment.slices, accumulator.split_with_sizes(self._lengths), d.split_with_sizes(self._lengths), record.norms, strict=True
        )
        for part, target, source, norm in parts:
            if norm > 0.0:
                _add_multiple(target, source, share if part.merge == "mean" else share / norm, scratch)

    def _norms(self, d: Tensor) -> tuple[float, ...]:
        """Norm of the whole tensor for each slice; a norm over parts is put together in float64."""
        parts = [contribution_norm(part) for part in d.split_with_sizes(self._lengths)]
        squares: dict[int, list[float]] = {}
        for tensor, norm in zip(self._tensor_of, parts, strict=True):
            squares.setdefault(tensor, []).append(norm)
        return tuple(math.hypot(*squares[tensor]) for tensor in self._tensor_of)

    def _scales(self, accumulator: Tensor) -> tuple[float, ...]:
        to_mean = 1.0 / math.ldexp(self._total_weight, -self._exponent)
        floor = (self._count + 1) * _NOISE
        scales: list[float] = []
        for part, norm, mean_norm in zip(self._fragment.slices, self._norms(accumulator), self._mean_norms, strict=True):
            if part.merge == "mean":
                scales.append(to_mean)
            else:
                scales.append(mean_norm / norm if norm * to_mean > floor else 0.0)
        return tuple(scales)


def _tensor_indices(fragment: Fragment) -> list[int]:
    """For each slice the number of its tensor: slices of one tensor follow each other."""
    indices: list[int] = []
    for part in fragment.slices:
        indices.append((indices[-1] if indices else -1) + (part.offset == 0))
    return indices


def _factors(factor: float) -> tuple[float, ...]:
    """One or two factors with the same product, each inside float32's normal range."""
    if factor > _SAFE:
        return (_SAFE, factor / _SAFE)
    if 0.0 < factor < 1.0 / _SAFE:
        return (1.0 / _SAFE, factor * _SAFE)
    return (factor,)


def _multiply(part: Tensor, factor: float) -> None:
    for f in _factors(factor):
        part.mul_(f)


def _add_multiple(target: Tensor, source: Tensor, factor: float, scratch: Tensor) -> None:
    """Add factor * source to target, the product rounded to float32 before the sum."""
    first, *rest = _factors(factor)
    for start in range(0, source.numel(), _CHUNK_ELEMENTS):
        values = source[start : start + _CHUNK_ELEMENTS]
        product = torch.mul(values, first, out=scratch[: values.numel()])
        for f in rest:
            product.mul_(f)
        target[start : start + _CHUNK_ELEMENTS].add_(product)
