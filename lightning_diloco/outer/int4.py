"""The format ``int4``: whole numbers from -8 to 7 in four bits, and for every group of 64 of them a scale in bf16.

Let a group's values reach from -a to b, and m be the larger of the two. The scale has a sign, so that the longer side gets the eight
negative numbers; with s the scale and y = q s the decoded value of a finite x:

    |s| = bf16(min(max(a / 8, b / 7.4), max(a / 7.4, b / 8))), negative if the second one is smaller; 0 if that is below 2^-126
    q = x / s, rounded to nearest, ties to even
    |y - x| <= (1 + 2^-20) |s| / 2       |s| is between (1 - 2^-8) m / 8 and (1 + 2^-8) m / 7.4: half a level is m / 16 to m / 14.7
    y = 0   where s = 0                  m is below 2^-123 there

7.4 and not 7, because a value at 7.4 is still within half a level of 7, and levels are closer for all others; with 7.5, the rounding of the
scale could make it 8. Above 7.4 S, S = (2 - 2^-7) 2^124, finite values saturate at 7 S or 8 S, which are finite.

The decoder only multiplies. The product of a number of four bits and one of eight is exact in float32, so every CPU gets the same bits;
there is no subnormal number in it, so a thread that flushes those gets them too.

One value that is not finite makes all of its group NaN, so that the check for non-finite contributions finds it after decoding.

**Layout.** The elements are cut into sections of 2^18, the last one shorter. Of n elements in a section there are

    ceil(n / 64) scales, bf16, little endian, and then h = ceil(n / 2) bytes: byte i is 16 q_(h + i) + 8 + q_i as a signed number, so its
    lower half is 8 + q_i and its upper half is q_(h + i) in two's complement; if n is odd, the last upper half is 0, and is not looked at

The two halves of a section are computed as runs of memory, which pairs of neighbours are not, and torch is quicker with signed bytes. A
section can be decoded without the others, and the payload of the first k sections has the length that k sections have, so what is written
never overtakes what is still to be read.

References:
    Decoupled DiLoCo, arXiv 2604.21428, has int4 contributions and does not publish the format. Groups, scales and layout are our choice,
    with what was measured in docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_diloco.config import INT4_GROUP, payload_bytes

__all__ = ["SECTION_ELEMENTS", "decode_into", "encode_into"]

SECTION_ELEMENTS = 1 << 18
_LONG, _SHORT = 1.0 / 8.0, 1.0 / 7.4
_MIN_SCALE, _MAX_SCALE = 2.0**-126, (2 - 2.0**-7) * 2.0**124
"""The second is the largest bf16 number whose product with 8 is finite."""


def encode_into(payload: Tensor, values: Tensor) -> None:
    """Encode a flat fragment.

    Args:
        payload: where to, uint8 [payload_bytes(N)]; it may be the first bytes of the values' memory.
        values: float32 [N]; they are gone afterwards.
    """
    for part, where in _sections(values.numel()):
        _encode_section(payload[where], values[part])


def decode_into(values: Tensor, payload: Tensor) -> None:
    """Decode a payload.

    Args:
        values: where to, float32 [N].
        payload: uint8 [payload_bytes(N)], at any address.
    """
    codes = torch.empty(min(math.ceil(values.numel() / 2), SECTION_ELEMENTS // 2), dtype=torch.int8, device="cpu")
    for part, where in _sections(values.numel()):
        _decode_section(values[part], payload[where], codes)


def _sections(num_elements: int) -> Iterator[tuple[slice, slice]]:
    """Elements and bytes of every section."""
    for start in range(0, num_elements, SECTION_ELEMENTS):
        stop = min(start + SECTION_ELEMENTS, num_elements)
        yield slice(start, stop), slice(payload_bytes(start, "int4"), payload_bytes(stop, "int4"))


def _groups(section: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """A section's groups as rows of a matrix, with the numbers of their scales: the whole ones, and the last one if it is shorter."""
    size = section.numel()
    whole = size // INT4_GROUP
    if whole:
        yield section[: whole * INT4_GROUP].view(whole, INT4_GROUP), slice(0, whole)
    if size % INT4_GROUP:
        yield section[whole * INT4_GROUP :].view(1, -1), slice(whole, whole + 1)


def _encode_section(payload: Tensor, x: Tensor) -> None:
    half, count = math.ceil(x.numel() / 2), math.ceil(x.numel() / INT4_GROUP)
    ends = torch.empty(2, count, dtype=torch.float32, device="cpu")
    for rows, which in _groups(x):
        torch.amax(rows, 1, out=ends[0, which])
        torch.amin(rows, 1, out=ends[1, which])
    scales, is_usual = _scales(ends[1].neg_(), ends[0])
    divisors = scales.to(torch.float32)
    if not is_usual:
        divisors.masked_fill_(divisors == 0.0, 1.0)  # a quotient below 2^-123 is rounded to 0 as well
    for rows, which in _groups(x):
        rows.div_(divisors[which].unsqueeze(1))
    x.round_()
    if not is_usual:
        x.nan_to_num_(0.0).clamp_(-8.0, 7.0)  # NaN becomes another byte on every CPU
    lower, upper = x[:half], x[half:]
    lower.add_(8.0)[: upper.numel()].add_(upper.mul_(16.0))  # small whole numbers: every one of these is exact
    codes = lower.to(torch.int8)  # the payload may lie on what it is made of
    payload[: 2 * count].view(torch.bfloat16).copy_(scales)
    payload[2 * count :].view(torch.int8).copy_(codes)


def _scales(a: Tensor, b: Tensor) -> tuple[Tensor, bool]:
    """The scale of each group, bf16, from the ends of its values, and whether none of them is 0, NaN, or has values that saturate."""
    upright = torch.maximum(a * _LONG, b * _SHORT)
    flipped = torch.maximum(a * _SHORT, b * _LONG)
    sizes = torch.minimum(upright, flipped)
    least, most = torch.aminmax(sizes)
    is_usual = _MIN_SCALE <= float(least) and float(most) <= _MAX_SCALE
    if not is_usual:
        unknown = ~torch.isfinite(sizes)
        sizes.clamp_(max=_MAX_SCALE).masked_fill_(sizes < _MIN_SCALE, 0.0).masked_fill_(unknown, math.nan)
    return torch.where(flipped < upright, -sizes, sizes).to(torch.bfloat16), is_usual


def _decode_section(y: Tensor, payload: Tensor, codes: Tensor) -> None:
    half, count = math.ceil(y.numel() / 2), math.ceil(y.numel() / INT4_GROUP)
    raw, packed, codes = payload[: 2 * count], payload[2 * count :].view(torch.int8), codes[:half]
    is_aligned = raw.data_ptr() % 2 == 0 and raw.storage_offset() % 2 == 0
    scales = (raw if is_aligned else raw.clone()).view(torch.bfloat16).to(torch.float32)
    y[:half].copy_(torch.bitwise_and(packed, 15, out=codes)).sub_(8.0)
    y[half:].copy_(torch.bitwise_right_shift(packed, 4, out=codes)[: y.numel() - half])
    for rows, which in _groups(y):
        rows.mul_(scales[which].unsqueeze(1))
