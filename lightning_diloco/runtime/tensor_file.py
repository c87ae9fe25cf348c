"""Files of tensors in safetensors' format, written from the tensors' own memory.

The library's writer copies what it writes and holds the interpreter's lock for as long as that takes, and the thread that trains or
publishes would wait. Here a block goes from the tensor to the kernel, which needs neither. Readers use the library.

The format: 8 bytes with the header's length, the header as JSON (names, dtypes, shapes, places, and a mapping of texts), then the bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lightning_diloco.outer import buffer_of
from lightning_diloco.runtime.checksum import crc32

__all__ = ["DTYPES", "write_file", "write_tensors"]

_BLOCK_BYTES: Final = 4 << 20
DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What can be written, by the format's names."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, is_durable: bool) -> tuple[int, int]:
    """Write a file; it is not whole before this returns.

    Args:
        path: of the file.
        tensors: contiguous, in host memory, of a dtype of `DTYPES`.
        metadata: texts that belong to them.
        is_durable: wait until the disk has it, so that it outlasts the machine and not only the process.

    Returns:
        Its size in bytes, and its CRC-32.

    Raises:
        OSError: the disk failed.
        KeyError: a dtype has no name in the format.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at, parts = 0, list[bytes | memoryview]()
    # The widest first, so that every tensor stands at a multiple of its own width: readers view the bytes in place.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        part = buffer_of(tensor)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + part.nbytes]}
        at += part.nbytes
        parts.append(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write_file(path, [len(text).to_bytes(8, "little"), text, *parts], is_durable=is_durable)


def write_file(path: Path, parts: Iterable[bytes | memoryview], *, is_durable: bool) -> tuple[int, int]:
    """Write bytes, one part behind the other; returns size and CRC-32.

    Raises:
        OSError: the disk failed.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    size = crc = 0
    try:
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), _BLOCK_BYTES):
                block = view[start : start + _BLOCK_BYTES]
                crc = crc32(block, crc)
                size += len(block)
                while block:
                    block = block[os.write(fd, block) :]
        if is_durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    return size, crc
