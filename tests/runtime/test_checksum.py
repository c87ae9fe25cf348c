"""The checksum of the wire is zlib's CRC-32, of bytes and of tensors, in one piece or in several."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.runtime.checksum import crc32

DATA = bytes(range(256)) * 9


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda b: torch.tensor(list(b), dtype=torch.uint8)])
def test_it_is_that_of_the_bytes(kind):
    assert crc32(kind(DATA)) == zlib.crc32(DATA)
    assert crc32(kind(b"")) == 0


def test_that_of_a_tensor_is_that_of_its_memory():
    assert crc32(torch.tensor([[1.0, -2.0]])) == zlib.crc32(struct.pack("<2f", 1.0, -2.0))
    with pytest.raises(LocalProtocolError, match="only contiguous host memory"):
        crc32(torch.zeros(4)[::2])


@pytest.mark.parametrize("cut", [0, 1, 1000, len(DATA)])
def test_pieces_add_up(cut):
    assert crc32(DATA[cut:], crc32(DATA[:cut])) == zlib.crc32(DATA)
