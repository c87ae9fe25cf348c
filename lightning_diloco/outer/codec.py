"""Flat fragments as bytes: contributions, publications, full transfers. Bytes are little endian.

``fp32`` is exact. ``bf16`` rounds to nearest, ties to even; with y the decoded value of a finite x:

    |y - x| <= 2^-8 |x|     for 2^-126 <= |x| <= M, M = (2 - 2^-7) 2^127 about 3.39e38, bf16's largest finite value
    |y - x| <= 2^-134       for |x| < 2^-126 (subnormal: half of the spacing 2^-133)
    y = M with x's sign     for |x| > M: finite values saturate, they never become infinite

Infinities stay infinities and NaN stays NaN (its payload bits are not specified), so that the check for non-finite contributions
sees them after decoding too. ``int4`` has four bits for every element and a scale for every 64: bounds and layout are in `outer.int4`.

**Publications.** ``fp32`` publishes theta. The other two publish the rounded difference to the shadow, which is what every learner holds:

    y = decode(encode(theta - shadow))        shadow' = shadow + y

The syncer and every learner add the same y to the same shadow, so they hold the same bits for ever; the rounding error stays in
theta - shadow' and is part of the next difference: it is sent later, it does not add up. Full transfers are float32 values of the
shadow. Decoding is exact and the sum, a kernel of its own, rounds once, so every CPU gets the same bits.

**Blocks.** Everything is done block by block (`memory.blocks`): scratch memory is one block at most. The payload of a block is a piece of
the fragment's payload (`bytes_of`), and is decoded like a fragment.

References:
    Decoupled DiLoCo, arXiv 2604.21428: compressed outer gradients. Publishing differences against a shadow is our choice.
"""

from __future__ import annotations

import math
import sys
import warnings

import torch
from torch import Tensor

from lightning_diloco.config import payload_bytes
from lightning_diloco.errors import ConfigurationError, LocalProtocolError, RemoteProtocolError
from lightning_diloco.outer import int4
from lightning_diloco.outer._checks import require_flat
from lightning_diloco.outer.memory import BLOCK_ELEMENTS, blocks
from lightning_diloco.outer.memory import flat as flat_memory
from lightning_diloco.outer.memory import raw as raw_memory

__all__ = [
    "bytes_of",
    "check_payload",
    "decode",
    "decode_full",
    "decode_publication",
    "encode",
    "encode_full",
    "encode_in_place",
    "encode_publication",
    "payload_bytes",
    "publish_block",
]

Buffer = bytes | bytearray | memoryview

_BF16_MAX = float(torch.finfo(torch.bfloat16).max)
if sys.byteorder != "little":  # pragma: no cover
    raise ConfigurationError(f"This machine is {sys.byteorder} endian: the wire is little endian and views of memory are sent as they are.")

# torch warns once per process that a bytes object is not writable. We only ever read from it, so the one warning is spent here.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def bytes_of(part: slice, wire_dtype: str) -> slice:
    """Where the payload of a part stands in the fragment's.

    Args:
        part: elements that begin where a block begins.
        wire_dtype: "fp32", "bf16" or "int4".

    Raises:
        ConfigurationError: the wire dtype is unknown.
        LocalProtocolError: the part begins inside a block.
    """
    if part.start % BLOCK_ELEMENTS:
        raise LocalProtocolError(f"A part that begins at element {part.start}: it must begin at a multiple of {BLOCK_ELEMENTS}.")
    return slice(payload_bytes(part.start, wire_dtype), payload_bytes(part.stop, wire_dtype))


def encode(flat: Tensor, wire_dtype: str) -> Tensor:
    """Encode a flat fragment; the bounds of the rounding error are in the module's docstring.

    Args:
        flat: float32 [N] in host memory.
        wire_dtype: "fp32", "bf16" or "int4".

    Returns:
        uint8 [payload_bytes(N, wire_dtype)], contiguous, with memory of its own.

    Raises:
        ConfigurationError: the wire dtype is unknown.
        LocalProtocolError: `flat` is not flat contiguous float32.
    """
    require_flat(flat, None, "fragment")
    payload = raw_memory(payload_bytes(flat.numel(), wire_dtype))
    for part in blocks(flat.numel()):
        _put(payload[bytes_of(part, wire_dtype)], flat[part].clone(), wire_dtype)
    return payload


def encode_in_place(flat: Tensor, wire_dtype: str) -> Tensor:
    """`encode` into the fragment's own memory, which then holds the payload.

    Args:
        flat: float32 [N] in host memory; its values are gone afterwards.
        wire_dtype: "fp32", "bf16" or "int4".

    Returns:
        As `encode`, a view of the first bytes of `flat`.

    Raises:
        ConfigurationError: the wire dtype is unknown.
        LocalProtocolError: `flat` is not flat contiguous float32.
    """
    require_flat(flat, None, "fragment")
    payload = flat.view(torch.uint8)[: payload_bytes(flat.numel(), wire_dtype)]
    if wire_dtype != "fp32":
        for part in blocks(flat.numel()):
            # What is written of a block lies before all that is still to be read, but for the first one, which lies on itself.
            _put(payload[bytes_of(part, wire_dtype)], flat[part], wire_dtype)
    return payload


def check_payload(buffer: Buffer | Tensor, num_elements: int, wire_dtype: str) -> Tensor:
    """A payload as bytes, if it has exactly the right length.

    Args:
        buffer: the payload, bytes-like or a flat contiguous uint8 tensor.
        num_elements: N of the fragment.
        wire_dtype: "fp32", "bf16" or "int4".

    Returns:
        uint8 [payload_bytes(N, wire_dtype)], not to be written to: it shares the payload's memory.

    Raises:
        ConfigurationError: the wire dtype is unknown.
        RemoteProtocolError: `oversized` for too many bytes, `wrong_layout` for too few.
    """
    expected, raw = payload_bytes(num_elements, wire_dtype), _as_uint8(buffer)
    if raw.numel() != expected:
        reason = "oversized" if raw.numel() > expected else "wrong_layout"
        raise RemoteProtocolError(reason, f"A payload of {raw.numel()} bytes: {num_elements} elements in {wire_dtype} are {expected}.")
    return raw


def decode(buffer: Buffer | Tensor, num_elements: int, wire_dtype: str, *, out: Tensor | None = None) -> Tensor:
    """Decode a payload of exactly the right length.

    Args:
        buffer: the payload, bytes-like or a flat contiguous uint8 tensor; it is not kept.
        num_elements: N of the fragment.
        wire_dtype: "fp32", "bf16" or "int4".
        out: where to put the result; None allocates.

    Returns:
        float32 [N] with memory of its own. Values may be non-finite: that is for `measure` to find.

    Raises:
        ConfigurationError: the wire dtype is unknown.
        RemoteProtocolError: `oversized` for too many bytes, `wrong_layout` for too few.
    """
    payload = check_payload(buffer, num_elements, wire_dtype)
    values = flat_memory(num_elements) if out is None else out
    _get(values, payload, wire_dtype)
    return values


def encode_publication(
    theta_new: Tensor, shadow: Tensor, wire_dtype: str, *, out: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor]:
    """Encode a merged fragment for every learner that holds the shadow.

    Args:
        theta_new: the global parameters after the outer step, float32 [N].
        shadow: what learners hold, float32 [N].
        wire_dtype: "fp32", "bf16" or "int4".
        out: memory for the payload, uint8, and for the new shadow, float32 [N] (not used with ``fp32``); None allocates.

    Returns:
        The payload, uint8, and the new shadow, float32 [N]: what `decode_publication` returns, bit for bit. With ``fp32`` it is
        `theta_new` itself, not a copy.

    Raises:
        ConfigurationError: the wire dtype is unknown.
        LocalProtocolError: sizes do not fit.
    """
    require_flat(theta_new, None, "theta_new")
    require_flat(shadow, theta_new.numel(), "shadow")
    size = shadow.numel()
    expected = payload_bytes(size, wire_dtype)
    payload, new_shadow = (raw_memory(expected), None) if out is None else out
    if _as_uint8(payload).numel() != expected:
        raise LocalProtocolError(f"Memory of {payload.numel()} bytes for a payload: {size} elements in {wire_dtype} are {expected}.")
    if wire_dtype == "fp32":
        new_shadow = theta_new
    elif new_shadow is None:
        new_shadow = torch.empty_like(shadow)
    require_flat(new_shadow, size, "new_shadow")
    for part in blocks(size):
        publish_block(theta_new, shadow, payload, new_shadow, part, wire_dtype)
    return payload, new_shadow


def publish_block(theta_new: Tensor, shadow: Tensor, payload: Tensor, new_shadow: Tensor, part: slice, wire_dtype: str) -> bool:
    """One block of a publication.

    Args:
        theta_new: the global parameters after the outer step, float32 [N].
        shadow: what learners hold, float32 [N].
        payload: where the publication is to be, uint8 [payload_bytes(N, wire_dtype)].
        new_shadow: where the new shadow is to be, float32 [N]; with ``fp32`` it is `theta_new` itself and is not written to.
        part: one of the fragment's `blocks`.
        wire_dtype: "fp32", "bf16" or "int4".

    Returns:
        Whether the block of the new shadow is finite.
    """
    raw, theta, block = payload[bytes_of(part, wire_dtype)], theta_new[part], new_shadow[part]
    if wire_dtype == "fp32":
        raw.view(torch.float32).copy_(theta)
        return is_finite(theta)
    # Hardly any difference saturates, and one that does would leave infinity in the shadow: it is looked for once, there.
    for may_saturate in (False, True):
        # The difference lies where the new shadow is to be: its values are gone when they are encoded.
        _put(raw, torch.sub(theta, shadow[part], out=block), wire_dtype, may_saturate=may_saturate)
        _get(block, raw, wire_dtype)
        if is_finite(block.add_(shadow[part])):
            return True
    return False


def decode_publication(
    payload: Buffer | Tensor, shadow: Tensor, num_elements: int, wire_dtype: str, *, out: Tensor | None = None
) -> Tensor:
    """Decode a publication whose parent is held.

    Args:
        payload: what `encode_publication` made, bytes-like or uint8.
        shadow: the parent version as held here, float32 [N]; stays as it is.
        num_elements: N.
        wire_dtype: "fp32", "bf16" or "int4".
        out: where to put the result, other memory than the shadow's; None allocates.

    Returns:
        The new shadow, float32 [N].

    Raises:
        RemoteProtocolError: the payload has another length.
        LocalProtocolError: the shadow has another size.
    """
    require_flat(shadow, num_elements, "shadow")
    raw = check_payload(payload, num_elements, wire_dtype)
    new = torch.empty_like(shadow) if out is None else out
    for part in blocks(num_elements):
        _get(new[part], raw[bytes_of(part, wire_dtype)], wire_dtype)
        if wire_dtype != "fp32":
            new[part].add_(shadow[part])
    return new


def encode_full(shadow: Tensor) -> Tensor:
    """Encode a full transfer: always the float32 values of the shadow, whatever the wire dtype is."""
    return encode(shadow, "fp32")


def decode_full(payload: Buffer | Tensor, num_elements: int, *, out: Tensor | None = None) -> Tensor:
    """Decode a full transfer into float32 [N]; arguments and errors as in `decode`."""
    return decode(payload, num_elements, "fp32", out=out)


def is_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN; exact, whatever the number of threads.

    Args:
        values: float32 of any shape.
    """
    # A sum is cheaper than the two ends; it is finite only if all values are, and may overflow although they are.
    if math.isfinite(values.sum().item()) or values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _put(payload: Tensor, values: Tensor, wire_dtype: str, *, may_saturate: bool = True) -> None:
    """Encode one block, whose values are gone afterwards; the payload may lie at the same address."""
    if wire_dtype == "int4":
        int4.encode_into(payload, values)
    elif wire_dtype == "bf16":
        rounded = _saturated(values) if may_saturate else values
        payload.view(torch.bfloat16).copy_(rounded.to(torch.bfloat16) if payload.data_ptr() == values.data_ptr() else rounded)
    else:
        payload.view(torch.float32).copy_(values)


def _get(values: Tensor, payload: Tensor, wire_dtype: str) -> None:
    """Decode a payload of the right length, which may lie at any address."""
    if wire_dtype == "int4":
        int4.decode_into(values, payload)
        return
    dtype = torch.bfloat16 if wire_dtype == "bf16" else torch.float32
    is_aligned = payload.data_ptr() % dtype.itemsize == 0 and payload.storage_offset() % dtype.itemsize == 0
    values.copy_((payload if is_aligned else payload.clone()).view(dtype))


def _saturated(flat: Tensor) -> Tensor:
    """The same values, finite ones clamped to bf16's range; the tensor itself when nothing is to be done."""
    if flat.numel() == 0:
        return flat
    low, high = torch.aminmax(flat)
    if -_BF16_MAX <= float(low) and float(high) <= _BF16_MAX:
        return flat
    return torch.where(torch.isfinite(flat), flat.clamp(-_BF16_MAX, _BF16_MAX), flat)


def _as_uint8(buffer: Buffer | Tensor) -> Tensor:
    if isinstance(buffer, Tensor):
        if buffer.dtype != torch.uint8 or buffer.dim() != 1:
            raise LocalProtocolError(f"A payload is a flat uint8 tensor, not {buffer.dtype} of shape {tuple(buffer.shape)}.")
        return buffer
    if memoryview(buffer).nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(buffer, dtype=torch.uint8)
