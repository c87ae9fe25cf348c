"""A tensor's memory as bytes, without copying, and SHA-256, which names a set of weights."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_diloco.errors import LocalProtocolError

__all__ = ["buffer_of", "sha256_of"]


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
