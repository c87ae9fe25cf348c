"""An order of the samples that every learner computes for itself: position in an epoch -> index in the data set.

It is a bijection of [0, N) by a keyed network of Feistel: the position's bits are two halves, and in each round one half is changed by a
mix of the other one, which can be undone whatever the mix is. The halves hold the next even number of bits, so up to four times N numbers;
a result that is not below N goes through the network again until it is (so again a bijection, of [0, N)).

Why not `torch.randperm`: its order is not promised to stay over releases, and learners of one job may have different ones; a sample that
two of them see at different positions is trained twice, and another never. It is also made as a whole, 8 bytes per sample, while a
training thread waits. Here any range costs its own length, in integers, with the same result on every machine.

References:
    M. Luby, C. Rackoff, How to construct pseudorandom permutations from pseudorandom functions, 1988.
    J. Black, P. Rogaway, Ciphers with arbitrary finite domains, 2002.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EpochOrder"]

_ROUNDS = 8
_BLOCK = 4096
_MIX = (0x45D9F3B, 0x27D4EB2F, 0x165667B1)
"""Odd multipliers below 2^31: a product with 32 bits stays below 2^63, so nothing overflows."""


class EpochOrder:
    """The order of each epoch's samples.

    Args:
        num_samples: N.
        is_shuffled: False: the samples' own order.
        seed: of the job.
    """

    def __init__(self, num_samples: int, *, is_shuffled: bool, seed: int) -> None:
        self._num_samples, self._is_shuffled, self._seed = num_samples, is_shuffled, seed
        self._half = max(1, ((num_samples - 1).bit_length() + 1) // 2)
        self._cached: tuple[int, int, list[int]] = (-1, 0, [])

    def indices(self, epoch: int, start: int, stop: int) -> list[int]:
        """Indices of the samples at these positions.

        Args:
            epoch: whose order.
            start: first position.
            stop: first position after them, at most N.
        """
        if not self._is_shuffled:
            return list(range(start, stop))
        known_epoch, first, block = self._cached
        if known_epoch != epoch or not first <= start <= stop <= first + len(block):
            # A block at a time: the cost of a call is that of a few dozen small operations, however many positions it has.
            block = self._shuffle(epoch, torch.arange(start, min(max(stop, start + _BLOCK), self._num_samples), device="cpu")).tolist()
            self._cached = known_epoch, first, block = epoch, start, block
        return block[start - first : stop - first]

    def _shuffle(self, epoch: int, positions: Tensor) -> Tensor:
        keys = [_mix_key(self._seed, epoch, turn) for turn in range(_ROUNDS)]
        values = self._network(positions, keys)
        while True:
            outside = values >= self._num_samples
            if not bool(outside.any()):
                return values
            values[outside] = self._network(values[outside], keys)

    def _network(self, values: Tensor, keys: list[int]) -> Tensor:
        half, mask = self._half, (1 << self._half) - 1
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        return (left << half) | right


def _mix(values: Tensor, key: int) -> Tensor:
    """A function of 32 bits, not invertible and not meant to be; all numbers stay between 0 and 2^63."""
    values = (values ^ key) & 0xFFFFFFFF
    for factor in _MIX:
        values = (values * factor) & 0xFFFFFFFF
        values = values ^ (values >> 15)
    return values


def _mix_key(seed: int, epoch: int, turn: int) -> int:
    """A key of 32 bits for one round, from Python's unbounded integers (splitmix64)."""
    state = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + turn * 0x94D049BB133111EB + 0x2545F4914F6CDD1D) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = ((state ^ (state >> shift)) * factor) & (2**64 - 1)
    return (state ^ (state >> 31)) & 0xFFFFFFFF
