"""CRC-32 of what goes over the wire: against damage, not malice (keys and encryption are the transport's task).

It is the checksum of `zlib`, computed by `isal`: at 8 GB/s it costs as much as reading the memory, where `zlib` costs four times that, and
every payload and every version is checked. Neither holds the interpreter lock above 5 KiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isal import isal_zlib

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["crc32"]


def crc32(data: Tensor | bytes | bytearray | memoryview, before: int = 0) -> int:
    """CRC-32 of bytes, or of a tensor's memory.

    Args:
        data: bytes-like, or a contiguous host tensor (float32 and uint8 are what the wire has).
        before: checksum of the bytes that stand before these.

    Returns:
        An unsigned 32-bit integer.

    Raises:
        LocalProtocolError: the tensor is on another device or not contiguous.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        # Imported late: an observer has no tensors, and torch takes longer to import than a syncer to answer.
        from lightning_diloco.outer import buffer_of

        data = buffer_of(data)
    checksum: int = isal_zlib.crc32(data, before)
    return checksum
