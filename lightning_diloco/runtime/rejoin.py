"""Rejoin checkpoints: the inner optimizer state of a learner, on disk, so that a life that follows does not begin without any.

    RUN_DIR/rejoin/learner_1/fragment_0007.safetensors

One file holds the state of one fragment's parameters (of AdamW: both moments and the step count) as it was at one boundary. The
fragments are written in turn, one at a boundary, spread evenly over `rejoin_every_steps`: to copy all moments at once would cost a step a
copy of twice the model. Moments belong to their parameter alone, so fragments of different boundaries fit together.

**The training thread** copies one fragment's state aside into memory that is used again, and goes on; the rest is done on a thread of its
own. It never waits for the disk: while a file is being written no other one is begun, so on a slow disk the checkpoints are older.

**Which one is taken** (PROTOCOL.md section 9): of each fragment the one of the newest version, this learner's own where two are equally
new. Files of other learners count as well where they are in the same folder: while it was down, theirs went on. What no file has comes
from a healthy peer over the network, in the same format (`peer_state`). Only files of this job's lineage, of the same optimizers, and
whole ones count.

The files outlast the process, not the machine: they are renamed into place when they are whole, and not forced to the disk. Their checksum
finds what a machine's crash has left, and a file that is damaged counts as none. A file that has been replaced is kept, and the next one is
written over it (`tensor_file.write_file` says why). Who reads it at that moment gets bytes of two files, or the file of another fragment:
the checksum and the fragment's number find that, and under the name there is the next one by then. A machine that loses its power may lose
such a file although it had been written before.

References:
    Decoupled DiLoCo, arXiv 2604.21428, "Recovery". Taking the state by fragment, from files, is our choice.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import torch
from torch import Tensor

from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.outer.memory import raw
from lightning_diloco.protocol.identity import Version
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.complaints import printable
from lightning_diloco.runtime.tensor_file import parts_of, read_metadata, read_tensors, write_tensors
from lightning_diloco.runtime.threads import never_interrupt_others

__all__ = ["FOLDER", "InnerState", "RejoinFiles", "pack", "read_freshest", "unpack"]

_log = logging.getLogger(__name__)

FOLDER: Final = "rejoin"
_ENTRY: Final = "rejoin"
Numbers = dict[str, int | float | bool | None]
Fetch = Callable[[], dict[str, Tensor]]
_T = TypeVar("_T", "InnerState", "_Header")


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerState:
    """The inner optimizer state of one fragment's parameters."""

    lineage: str
    """Of the job."""
    optimizers: tuple[str, ...]
    """Class names: a state fits an optimizer of its own kind."""
    fragment_id: int
    version: Version
    """Of the fragment, at that boundary."""
    inner_step: int
    """The learner's, of this life."""
    numbers: Numbers = field(default_factory=dict)
    """State entries that are no tensors."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """State entries that are, in host memory; a name is OPTIMIZER/PARAMETER/ENTRY, which `numbers` have as well."""


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    lineage: str
    optimizers: tuple[str, ...]
    fragment_id: int
    version: Version
    inner_step: int
    numbers: Numbers
    crc: int


class RejoinFiles:
    """Writes the rejoin checkpoint of one learner, a fragment at a time, on a thread of its own.

    Args:
        folder: the run directory's folder of rejoin checkpoints; made if need be. None: there are none, states are only packed.
        learner_id: whose.
    """

    def __init__(self, folder: Path | None, learner_id: int) -> None:
        self._folder = None if folder is None else folder / f"learner_{learner_id}"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="diloco-rejoin", initializer=never_interrupt_others)
        self.is_busy = False
        """Whether the tensors given last are still being read; while they are, they must not change."""
        self.num_written = 0
        """Fragments that are on the disk, each time that one was written."""
        self._has_failed = False

    def write(self, state: InnerState, fetch: Fetch | None = None) -> None:
        """Begin to write one fragment; returns at once. Only while it is not busy.

        Args:
            state: its tensors are read until it is not busy any more.
            fetch: called on the thread for the tensors, which are then not in the state.
        """
        self.is_busy = True
        self._thread.submit(self._write, state, fetch)

    def pack(self, state: InnerState, then: Callable[[Tensor | None], None], fetch: Fetch | None = None) -> None:
        """Begin to pack one fragment's state; returns at once. Only while it is not busy.

        Args:
            state: as for `write`.
            then: called on the thread with what `pack` gives, or None if it cannot be packed.
            fetch: as for `write`.
        """
        self.is_busy = True
        self._thread.submit(self._pack, state, then, fetch)

    def close(self, *, removes: bool) -> None:
        """End the thread; `removes`: this learner is done, and will not come back."""
        self._thread.shutdown(wait=True)
        if removes and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _pack(self, state: InnerState, then: Callable[[Tensor | None], None], fetch: Fetch | None) -> None:
        packed = None
        try:
            if fetch is not None:
                state = replace(state, tensors=fetch())
            packed = pack(state)
        except Exception as error:  # whatever it is, somebody waits for an answer
            _log.warning("The inner optimizer state of fragment %d could not be packed for a peer: %s", state.fragment_id, error)
        finally:
            self.is_busy = False
            then(packed)

    def _write(self, state: InnerState, fetch: Fetch | None) -> None:
        assert self._folder is not None
        try:
            if fetch is not None:
                state = replace(state, tensors=fetch())
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"fragment_{state.fragment_id:04d}.safetensors"
            spare, before = self._folder / "spare.tmp", self._folder / "before.tmp"
            with suppress(FileNotFoundError):
                if spare.stat().st_nlink > 1:  # two processes of one learner, of which one ends: what is in use is not written over
                    spare.unlink()
            write_tensors(spare, state.tensors, {_ENTRY: _header_of(state)}, is_durable=False, is_over=True)
            # One that is there is the name that a life before this one gave to a file in use, or to a replaced one.
            before.unlink(missing_ok=True)
            with suppress(OSError):  # there is no file yet, or no second name for a file on this file system: then no spare
                before.hardlink_to(path)
            spare.replace(path)
            with suppress(FileNotFoundError):
                before.replace(spare)
            self.num_written += 1
            self._has_failed = False
        except Exception as error:  # whatever it is, it must not end the training
            if not self._has_failed:
                _log.error(
                    "The rejoin checkpoint could not be written to %s: %s. Training goes on; if this learner is killed, it comes back with "
                    "an older inner optimizer state, or none.",
                    self._folder,
                    error,
                )
            self._has_failed = True
        finally:
            self.is_busy = False


def pack(state: InnerState) -> Tensor:
    """The bytes of a rejoin checkpoint of one fragment, for the network: uint8, a copy.

    Raises:
        KeyError: a tensor's dtype has no name in the format.
    """
    parts = parts_of(state.tensors, {_ENTRY: _header_of(state)})
    packed, at = raw(sum(len(part) for part in parts)), 0
    for part in parts:
        if len(part):
            # Copied by torch, which leaves the interpreter's lock alone meanwhile.
            packed[at : at + len(part)].copy_(torch.frombuffer(bytearray(part) if isinstance(part, bytes) else part, dtype=torch.uint8))
        at += len(part)
    return packed


def unpack(data: memoryview) -> InnerState:
    """What somebody has packed.

    Args:
        data: writable bytes; the tensors of the state lie in them.

    Raises:
        RemoteProtocolError: the bytes are no such state.
    """
    try:
        tensors, metadata = read_tensors(data)
        header = msgspec.json.decode(metadata.get(_ENTRY, ""), type=_Header)
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise RemoteProtocolError("wrong_layout", f"not an inner optimizer state: {error}") from error
    if _checksum(header, tensors) != header.crc:
        raise RemoteProtocolError("bad_checksum", "an inner optimizer state does not have its checksum")
    return _state(header, tensors)


def _header_of(state: InnerState) -> str:
    # A number that is not finite has no place in JSON, and is none that an optimizer goes on from.
    numbers = {k: v for k, v in state.numbers.items() if v is None or math.isfinite(v)}
    fields = {name: getattr(state, name) for name in InnerState.__slots__ if name != "tensors"} | {"numbers": numbers}
    header = _Header(**fields, crc=0)
    return msgspec.json.encode(msgspec.structs.replace(header, crc=_checksum(header, state.tensors))).decode()


def _state(header: _Header, tensors: Mapping[str, Tensor]) -> InnerState:
    fields: dict[str, Any] = {name: getattr(header, name) for name in InnerState.__slots__ if name != "tensors"}
    return InnerState(**fields, tensors=tensors)


def read_freshest(
    folder: Path, learner_id: int, *, lineage: str, optimizers: tuple[str, ...], num_fragments: int
) -> list[tuple[int, InnerState]]:
    """Read of each fragment the newest inner state that any learner has left.

    Args:
        folder: as for `RejoinFiles`.
        learner_id: who asks; of equally new ones its own is taken.
        lineage: of the job.
        optimizers: class names of the learner's optimizers.
        num_fragments: P.

    Returns:
        Learner and state, by fragment; fragments of which there is none are left out.
    """
    found = []
    for fragment_id in range(num_fragments):
        paths = folder.glob(f"learner_*/fragment_{fragment_id:04d}.safetensors")
        headers = [
            (path, owner, header) for path in paths if (owner := _owner(path)) is not None and (header := _read_header(path, fragment_id))
        ]
        fits = [x for x in headers if (x[2].lineage, x[2].optimizers) == (lineage, optimizers)]
        for path, owner, _ in sorted(fits, key=lambda x: (x[2].version, x[1] == learner_id, -x[1]), reverse=True):
            state = _read(path, fragment_id)
            if state is not None:
                found.append((owner, state))
                break
    return found


def _owner(path: Path) -> int | None:
    _, _, number = path.parent.name.partition("_")
    return int(number) if number.isdecimal() else None


def _read_header(path: Path, fragment_id: int) -> _Header | None:
    return _read_twice(path, fragment_id, lambda: msgspec.json.decode(read_metadata(path).get(_ENTRY, ""), type=_Header))


def _read(path: Path, fragment_id: int) -> InnerState | None:
    """One whole file; a learner that lives may replace it between two looks, so header and tensors are read together."""
    # Not mapped: it may be written over, and cut off, while it is read.
    return _read_twice(path, fragment_id, lambda: unpack(memoryview(bytearray(path.read_bytes()))))


def _read_twice(path: Path, fragment_id: int, read: Callable[[], _T]) -> _T | None:
    """None if it cannot be read; one that was being written over has been replaced by the second time."""
    for is_last in (False, True):
        try:
            found = read()
            if found.fragment_id != fragment_id:
                raise ValueError(f"it is the state of fragment {found.fragment_id}")
            return found
        except (OSError, ValueError, msgspec.DecodeError, RemoteProtocolError) as error:
            if is_last:
                _log.warning("%s is not used: %s", path, printable(str(error)))
    return None


def _checksum(header: _Header, tensors: Mapping[str, Tensor]) -> int:
    crc = crc32(msgspec.json.encode(msgspec.structs.replace(header, crc=0)))
    for name in sorted(tensors):
        crc = crc32(name.encode(), crc)
        crc = crc32(tensors[name].contiguous(), crc)
    return crc


def staging(tensors: list[Tensor], memory: Tensor) -> tuple[list[Tensor], Tensor]:
    """Places for copies of these tensors in one block of host memory, which is made anew only if it is too small.

    Args:
        tensors: what will be copied, on any device.
        memory: uint8, what was returned last time.

    Returns:
        Contiguous host tensors of the same shapes and dtypes, and the block.
    """
    ends, at = list[int](), 0
    for tensor in tensors:
        at += -(-tensor.numel() * tensor.element_size() // 8) * 8
        ends.append(at)
    if memory.numel() < at:
        memory = raw(at)
    starts = [0, *ends[:-1]]
    places = [
        memory[start : start + t.numel() * t.element_size()].view(t.dtype).view(t.shape) for start, t in zip(starts, tensors, strict=True)
    ]
    return places, memory
