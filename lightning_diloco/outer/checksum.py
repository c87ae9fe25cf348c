"""Checksums of tensors and bytes, without copying and without holding the interpreter lock.

CRC-32 guards a payload on its way (damage, not malice: keys and encryption are the transport's task). SHA-256 names a set of weights.
"""

from __future__ import annotations

import ctypes
import hashlib
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_diloco.errors import LocalProtocolError

__all__ = ["buffer_of", "crc32", "sha256_of"]


def buffer_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor as a view of bytes; the view keeps the tensor alive.

    Args:
        tensor: any dtype and shape, contiguous, in host memory.

    Returns:
        A writable view of its numel * itemsize bytes, not a copy.

    Raises:
        LocalProtocolError: the tensor is on another device or not contiguous.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise LocalProtocolError(f"A {tensor.device.type} tensor with strides {tensor.stride()}: only contiguous host memory has bytes.")
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    array = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    # The view holds the array, and the array holds the tensor: the memory cannot go away under a reader.
    array._tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def crc32(data: Tensor | bytes | bytearray | memoryview) -> int:
    """CRC-32 of bytes, or of a tensor's memory.

    Args:
        data: bytes-like, or a contiguous host tensor (float32 and uint8 are what the wire has).

    Returns:
        An unsigned 32-bit integer.

    Raises:
        LocalProtocolError: the tensor is on another device or not contiguous.
    """
    return zlib.crc32(buffer_of(data) if isinstance(data, Tensor) else data)


def sha256_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the float32 little-endian values of tensors, one after the other.

    Args:
        tensors: in the order that defines the digest; other dtypes and strides are converted.

    Returns:
        64 hex digits.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(buffer_of(tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()))
    return digest.hexdigest()
