"""Flat fragments as bytes: contributions, publications, full transfers. Bytes are little endian.

``fp32`` is exact. ``bf16`` rounds to nearest, ties to even; with y the decoded value of a finite x:

    |y - x| <= 2^-8 |x|     for 2^-126 <= |x| <= M, M = (2 - 2^-7) 2^127 about 3.39e38, bf16's largest finite value
    |y - x| <= 2^-134       for |x| < 2^-126 (subnormal: half of the spacing 2^-133)
    y = M with x's sign     for |x| > M: finite values saturate, they never become infinite

Infinities stay infinities and NaN stays NaN (its payload bits are not specified), so that the check for non-finite contributions
sees them after decoding too.

**Publications.** ``fp32`` publishes theta. ``bf16`` publishes the rounded difference to the shadow, which is what every learner holds:

    y = decode(encode(theta - shadow))        shadow' = shadow + y

The syncer and every learner add the same y to the same shadow, so they hold the same bits for ever; the rounding error stays in
theta - shadow' and is part of the next difference: it is sent later, it does not add up. Full transfers are float32 values of the
shadow. Widening bf16 is exact and the sum rounds once, so every CPU gets the same bits.

References:
    Decoupled DiLoCo, arXiv 2604.21428: compressed outer gradients. Publishing differences against a shadow is our choice.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

from lightning_diloco.errors import ConfigurationError, LocalProtocolError, RemoteProtocolError
from lightning_diloco.outer._checks import require_flat
from lightning_diloco.outer.memory import BLOCK_ELEMENTS
from lightning_diloco.outer.memory import flat as flat_memory

__all__ = [
    "decode",
    "decode_full",
    "decode_publication",
    "encode",
    "encode_full",
    "encode_in_place",
    "encode_publication",
    "payload_bytes",
    "payload_values",
]

Buffer = bytes | bytearray | memoryview

_WIRE = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BF16_MAX = float(torch.finfo(torch.bfloat16).max)
if sys.byteorder != "little":  # pragma: no cover
    raise ConfigurationError(f"This machine is {sys.byteorder} endian: the wire is little endian and views of memory are sent as they are.")

# torch warns once per process that a bytes object is not writable. We only ever read from it, so the one warning is spent here.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def payload_bytes(num_elements: int, wire_dtype: str) -> int:
    """Bytes of an encoded fragment.

    Args:
        num_elements: N, at least 0.
        wire_dtype: "fp32" or "bf16".

    Raises:
        ConfigurationError: the wire dtype is unknown or is not there yet.
    """
    return num_elements * _torch_dtype(wire_dtype).itemsize


def encode(flat: Tensor, wire_dtype: str) -> Tensor:
    """Encode a flat fragment; the bounds of the rounding error are in the module's docstring.

    Args:
        flat: float32 [N] in host memory.
        wire_dtype: "fp32" or "bf16".

    Returns:
        uint8 [payload_bytes(N, wire_dtype)], contiguous, with memory of its own.

    Raises:
        ConfigurationError: the wire dtype is unknown or is not there yet.
        LocalProtocolError: `flat` is not flat contiguous float32.
    """
    dtype = _torch_dtype(wire_dtype)
    require_flat(flat, None, "fragment")
    if dtype == torch.float32:
        return flat.clone().view(torch.uint8)
    return _saturated(flat).to(dtype).view(torch.uint8)


def encode_in_place(flat: Tensor, wire_dtype: str) -> Tensor:
    """`encode` into the fragment's own memory, which then holds the payload.

    Args:
        flat: float32 [N] in host memory; its values are gone afterwards.
        wire_dtype: "fp32" or "bf16".

    Returns:
        As `encode`, a view of the first bytes of `flat`.

    Raises:
        ConfigurationError: the wire dtype is unknown or is not there yet.
        LocalProtocolError: `flat` is not flat contiguous float32.
    """
    dtype = _torch_dtype(wire_dtype)
    require_flat(flat, None, "fragment")
    raw = flat.view(torch.uint8)[: payload_bytes(flat.numel(), wire_dtype)]
    if dtype != torch.float32:
        payload = raw.view(dtype)
        for start in range(0, flat.numel(), BLOCK_ELEMENTS):
            values = _saturated(flat[start : start + BLOCK_ELEMENTS])
            # What is written of a block lies before all that is still to be read, but for the first one, which lies on itself.
            payload[start : start + BLOCK_ELEMENTS].copy_(values if start else values.to(dtype))
    return raw


def payload_values(buffer: Buffer | Tensor, num_elements: int, wire_dtype: str) -> Tensor:
    """The values of a payload of exactly the right length, as they are on the wire.

    Args:
        buffer: the payload, bytes-like or a flat contiguous uint8 tensor.
        num_elements: N of the fragment.
        wire_dtype: "fp32" or "bf16".

    Returns:
        [N] in the wire's dtype, not to be written to: it shares the payload's memory, unless that does not begin where such a value may.

    Raises:
        ConfigurationError: the wire dtype is unknown or is not there yet.
        RemoteProtocolError: `oversized` for too many bytes, `wrong_layout` for too few.
    """
    dtype = _torch_dtype(wire_dtype)
    raw = _as_uint8(buffer)
    expected = payload_bytes(num_elements, wire_dtype)
    if raw.numel() != expected:
        reason = "oversized" if raw.numel() > expected else "wrong_layout"
        raise RemoteProtocolError(reason, f"A payload of {raw.numel()} bytes: {num_elements} elements in {wire_dtype} are {expected}.")
    is_aligned = raw.data_ptr() % dtype.itemsize == 0 and raw.storage_offset() % dtype.itemsize == 0
    return (raw if is_aligned else raw.clone()).view(dtype)


def decode(buffer: Buffer | Tensor, num_elements: int, wire_dtype: str, *, out: Tensor | None = None) -> Tensor:
    """Decode a payload of exactly the right length.

    Args:
        buffer: the payload, bytes-like or a flat contiguous uint8 tensor; it is not kept.
        num_elements: N of the fragment.
        wire_dtype: "fp32" or "bf16".
        out: where to put the result; None allocates.

    Returns:
        float32 [N] with memory of its own. Values may be non-finite: that is for `contribution_norm` to find.

    Raises:
        ConfigurationError: the wire dtype is unknown or is not there yet.
        RemoteProtocolError: `oversized` for too many bytes, `wrong_layout` for too few.
    """
    values = payload_values(buffer, num_elements, wire_dtype)
    return (flat_memory(num_elements) if out is None else out).copy_(values)


def encode_publication(
    theta_new: Tensor, shadow: Tensor, wire_dtype: str, *, out: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor]:
    """Encode a merged fragment for every learner that holds the shadow.

    Args:
        theta_new: the global parameters after the outer step, float32 [N].
        shadow: what learners hold, float32 [N].
        wire_dtype: "fp32" or "bf16".
        out: memory for the payload, uint8, and for the new shadow, float32 [N] (not used with ``fp32``); None allocates.

    Returns:
        The payload, uint8, and the new shadow, float32 [N]: what `decode_publication` returns, bit for bit. With ``fp32`` it is
        `theta_new` itself, not a copy.
    """
    require_flat(theta_new, None, "theta_new")
    require_flat(shadow, theta_new.numel(), "shadow")
    size = shadow.numel()
    payload, new_shadow = (torch.empty(payload_bytes(size, wire_dtype), dtype=torch.uint8, device="cpu"), None) if out is None else out
    values = payload.view(_torch_dtype(wire_dtype))
    require_flat(values, size, "payload", other=values.dtype)
    if wire_dtype == "fp32":
        values.copy_(theta_new)
        return payload, theta_new
    new_shadow = torch.empty_like(shadow) if new_shadow is None else new_shadow
    require_flat(new_shadow, size, "new_shadow")
    scratch = flat_memory(min(size, BLOCK_ELEMENTS))
    for start in range(0, size, BLOCK_ELEMENTS):
        part = slice(start, start + BLOCK_ELEMENTS)
        difference = torch.sub(theta_new[part], shadow[part], out=scratch[: shadow[part].numel()])
        torch.add(shadow[part], values[part].copy_(_saturated(difference)), out=new_shadow[part])
    return payload, new_shadow


def decode_publication(
    payload: Buffer | Tensor, shadow: Tensor, num_elements: int, wire_dtype: str, *, out: Tensor | None = None
) -> Tensor:
    """Decode a publication whose parent is held.

    Args:
        payload: what `encode_publication` made, bytes-like or uint8.
        shadow: the parent version as held here, float32 [N]; stays as it is.
        num_elements: N.
        wire_dtype: "fp32" or "bf16".
        out: where to put the result; None allocates.

    Returns:
        The new shadow, float32 [N].

    Raises:
        RemoteProtocolError: the payload has another length.
        LocalProtocolError: the shadow has another size.
    """
    require_flat(shadow, num_elements, "shadow")
    new = torch.empty_like(shadow) if out is None else out
    values = payload_values(payload, num_elements, wire_dtype)
    return new.copy_(values) if wire_dtype == "fp32" else torch.add(shadow, values, out=new)


def encode_full(shadow: Tensor) -> Tensor:
    """Encode a full transfer: always the float32 values of the shadow, whatever the wire dtype is."""
    return encode(shadow, "fp32")


def decode_full(payload: Buffer | Tensor, num_elements: int, *, out: Tensor | None = None) -> Tensor:
    """Decode a full transfer into float32 [N]; arguments and errors as in `decode`."""
    return decode(payload, num_elements, "fp32", out=out)


def _torch_dtype(wire_dtype: str) -> torch.dtype:
    if wire_dtype not in _WIRE:
        raise ConfigurationError(f"wire_dtype={wire_dtype!r}: must be one of {', '.join(_WIRE)}.")
    return _WIRE[wire_dtype]


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
