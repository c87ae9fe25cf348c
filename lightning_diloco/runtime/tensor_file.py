"""Files of tensors in safetensors' format, written from the tensors' own memory.

The library's writer copies what it writes and holds the interpreter's lock for as long as that takes, and the thread that trains or
publishes would wait. Here a block goes from the tensor to the kernel, which needs neither. Others read such files with the library.

The format: 8 bytes with the header's length, the header as JSON (names, dtypes, shapes, places, and a mapping of texts), then the bytes.
What comes over the network in this format, or may be written over while it is read, is read here: in place, and only if all of it is as
it is written here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from lightning_diloco.outer import buffer_of
from lightning_diloco.runtime.checksum import crc32

__all__ = ["DTYPES", "parts_of", "read_metadata", "read_tensors", "write_file", "write_tensors"]

_Size = Annotated[int, Meta(ge=0, le=2**53)]
_MAX_ELEMENTS: Final = 2**53
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


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, is_durable: bool, is_over: bool = False
) -> tuple[int, int]:
    """Write a file; it is not whole before this returns.

    Args:
        path: of the file.
        tensors: contiguous, in host memory, of a dtype of `DTYPES`.
        metadata: texts that belong to them.
        is_durable: wait until the disk has it, so that it outlasts the machine and not only the process.
        is_over: see `write_file`.

    Returns:
        Its size in bytes, and its CRC-32.

    Raises:
        OSError: the disk failed.
        KeyError: a dtype has no name in the format.
    """
    return write_file(path, parts_of(tensors, metadata), is_durable=is_durable, is_over=is_over)


def parts_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """The bytes of such a file, one part behind the other, in the tensors' own memory.

    Args:
        tensors: contiguous, in host memory, of a dtype of `DTYPES`.
        metadata: texts that belong to them.

    Raises:
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
    return [len(text).to_bytes(8, "little"), text, *parts]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Size, ...], Meta(max_length=16)]
    data_offsets: tuple[_Size, _Size]


def read_metadata(path: Path) -> dict[str, str]:
    """The texts of such a file on disk; its tensors are not read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= os.fstat(file.fileno()).st_size - 8:
            raise ValueError(f"a header of {length} bytes")
        return _entries_of(file.read(length))[1]


def read_tensors(data: memoryview) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of the bytes of such a file.

    Args:
        data: writable bytes; the tensors lie in them.

    Raises:
        ValueError: it is not such a file, to the last byte.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    if not 8 < start <= len(data) or start % 8:
        raise ValueError(f"a header that ends at byte {start} of {len(data)}")
    entries, metadata = _entries_of(data[8:start])
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    tensors, at = dict[str, Tensor](), 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        dtype, count = dtypes.get(entry.dtype), math.prod(entry.shape)
        # One behind the other and without gaps, the widest first: as they are written. torch multiplies sizes beside a 0 as well.
        if (
            math.prod(max(n, 1) for n in entry.shape) > _MAX_ELEMENTS
            or dtype is None
            or begin != at
            or end - begin != count * dtype.itemsize
            or begin % dtype.itemsize
            or start + end > len(data)
        ):
            raise ValueError(f"{name!r:.100} has dtype {entry.dtype!r:.20}, shape {entry.shape} and place {entry.data_offsets}")
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin) if count else torch.empty(0, dtype=dtype)
        tensors[name], at = flat.view(entry.shape), end
    if start + at != len(data):
        raise ValueError(f"{len(data) - start - at} bytes too many")
    return tensors, metadata


def _entries_of(text: bytes | memoryview) -> tuple[dict[str, _Entry], dict[str, str]]:
    try:
        header = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__", b"{}"), type=dict[str, str])
        return {name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()}, metadata
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"the header is none: {error}") from error


def write_file(path: Path, parts: Iterable[bytes | memoryview], *, is_durable: bool, is_over: bool = False) -> tuple[int, int]:
    """Write bytes, one part behind the other; returns size and CRC-32.

    Args:
        path: of the file.
        parts: bytes.
        is_durable: wait until the disk has it.
        is_over: write over what is there, in the memory that the operating system holds it in, and cut it off at the end. New memory for a
            file costs more than its bytes: of 34 MB it took 13 to 85 ms, over another one 5 ms.

    Raises:
        OSError: the disk failed.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if is_over else os.O_TRUNC), 0o644)
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
        if is_over:
            os.ftruncate(fd, size)
        if is_durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    return size, crc
