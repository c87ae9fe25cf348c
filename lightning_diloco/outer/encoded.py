"""A contribution as it came over the wire, decoded block by block where it is needed.

Decoded, a contribution is two to eight times as large as its payload. Whoever goes through it block by block finds each block in the cache
right after it was decoded, so decoding a second time costs less than reading what was decoded before from memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.outer._checks import require_flat
from lightning_diloco.outer.codec import Buffer, bytes_of, check_payload, decode
from lightning_diloco.outer.memory import BLOCK_ELEMENTS

__all__ = ["Encoded"]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A payload of exactly the right length; made by `of` or `plain`. Its memory is shared, never written to, and stays as it is."""

    payload: Tensor
    """uint8 [payload_bytes(N, wire_dtype)]."""
    num_elements: int
    """N."""
    wire_dtype: str
    """"fp32", "bf16" or "int4"."""

    @classmethod
    def of(cls, buffer: Buffer | Tensor, num_elements: int, wire_dtype: str) -> Encoded:
        """A payload, checked for its length.

        Args:
            buffer: bytes-like or a flat contiguous uint8 tensor; it is kept, not copied.
            num_elements: N of the fragment.
            wire_dtype: "fp32", "bf16" or "int4".

        Raises:
            ConfigurationError: the wire dtype is unknown.
            RemoteProtocolError: `oversized` for too many bytes, `wrong_layout` for too few.
        """
        return cls(check_payload(buffer, num_elements, wire_dtype), num_elements, wire_dtype)

    @classmethod
    def plain(cls, values: Tensor) -> Encoded:
        """A contribution that needs no decoding: flat float32 [N], kept, not copied.

        Raises:
            LocalProtocolError: it is not flat contiguous float32.
        """
        require_flat(values, None, "contribution")
        return cls(values.view(torch.uint8), values.numel(), "fp32")

    @property
    def is_plain(self) -> bool:
        """Whether the payload can be read as float32 where it lies."""
        return self.wire_dtype == "fp32" and self.payload.data_ptr() % 4 == 0 and self.payload.storage_offset() % 4 == 0

    def bytes_of(self, part: slice) -> slice:
        """Where the payload of one of the fragment's `blocks` stands in the whole one."""
        return bytes_of(part, self.wire_dtype)

    def part(self, part: slice, scratch: Tensor) -> Tensor:
        """The values of one of the fragment's `blocks`, only to be read.

        Args:
            part: which.
            scratch: float32, at least as large as the block, where they are decoded to if they must be.

        Returns:
            float32 [size of the block]: the first elements of the scratch, or the payload's own memory.

        Raises:
            LocalProtocolError: the part begins inside a block.
        """
        payload, size = self.payload[self.bytes_of(part)], part.stop - part.start
        if self.is_plain:
            return payload.view(torch.float32)
        if scratch.numel() < size:
            raise LocalProtocolError(f"Scratch of {scratch.numel()} elements for {size}: give it {BLOCK_ELEMENTS}.")
        return decode(payload, size, self.wire_dtype, out=scratch[:size])
