"""The payloads of a run, for `lightning-diloco replay`: one append-only file beside the tape (`tape_payloads=True`).

**Where they lie.** `payloads.bin` is a chain of entries, each a header of 56 bytes and a payload as it came over the wire, without gaps:

    4s magic   u32 kind   u64 fragment   u64 learner   u64 incarnation   u64 seq   u64 bytes   u32 CRC-32 of the payload
    u32 CRC-32 of the header before it          little endian

    kind            what                                                     named by
    1 layout        the layout's canonical bytes                             `payload_at` of the tape's `job` record
    2 values        float32 values of one fragment at the founding           follows the layout, one per fragment
    3 momentum      its outer momentum, if the founder brought one           follows the fragment's values
    4 contribution  a contribution, whatever became of it                    `payload_at` of its `contribution` record

One file, because a record that names an offset finds its payload in one read, and an append is the one write that a crash can only leave
unfinished at the end. Not inside the tape: that is text, read whole by a syncer that starts again. Static state is not here: nothing of
a replay depends on it (`snapshots/static.bin` has it). Refused contributions are: whether one is accepted is decided after it was written.

**Before its record.** A contribution goes to the disk thread when it has arrived and is written while the numerics thread decodes it; the
rules hear of it when both are done. So the record, which tells what the rules decided, is never in the file before the payload is, and
nothing of either leaves the syncer earlier. A killed process loses nothing that was written; the half-written last entry is cut off by
the next writer, as the half-written last line of the tape is. Neither file is synced to the disk before the end: a machine that loses
its power may lose the last seconds of both.

**Cost.** The write is kept off both threads of the syncer: through the page cache it takes about twice as long as decoding. A disk that
stands still delays the acceptance of contributions; merges, publications and control messages go on. Memory: the payloads that wait, which
the limit on undecoded ones bounds.

**Disk errors never end a run.** The error is logged once, the record has no `payload_at`, and the next payload is tried again. A replay
says what is missing.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

from lightning_diloco.errors import DiLoCoError
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.threads import never_interrupt_others

__all__ = [
    "PAYLOADS_NAME",
    "PayloadError",
    "PayloadFile",
    "PayloadKeeper",
    "PayloadKey",
    "PayloadWriter",
    "pack_header",
]

_log = logging.getLogger(__name__)

PAYLOADS_NAME: Final = "payloads.bin"
"""Name of the file inside a run directory."""
_MAGIC: Final = b"LDP1"
_HEADER: Final = struct.Struct("<4sI5QI")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CRC.size
_KINDS: Final = ("layout", "values", "momentum", "contribution")


class PayloadError(DiLoCoError):
    """A payload is damaged, or is another one than the tape names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadKey:
    """What an entry is."""

    kind: Literal["layout", "values", "momentum", "contribution"]
    fragment_id: int = 0
    learner_id: int = 0
    incarnation: int = 0
    seq: int = 0

    def __str__(self) -> str:
        """In words."""
        if self.kind == "contribution":
            return f"contribution {self.seq} of learner {self.learner_id} to fragment {self.fragment_id}"
        return "the layout" if self.kind == "layout" else f"the founding's {self.kind} of fragment {self.fragment_id}"


def pack_header(key: PayloadKey, num_bytes: int, crc: int) -> bytes:
    """The header of an entry.

    Args:
        key: what it is.
        num_bytes: length of the payload.
        crc: CRC-32 of the payload.
    """
    kind = 1 + _KINDS.index(key.kind)
    head = _HEADER.pack(_MAGIC, kind, key.fragment_id, key.learner_id, key.incarnation, key.seq, num_bytes, crc)
    return head + _CRC.pack(crc32(head))


def _unpack_header(head: bytes) -> tuple[PayloadKey, int, int] | None:
    """(key, length, crc) of a header; None if it is none."""
    if len(head) != HEADER_BYTES or _CRC.unpack(head[_HEADER.size :])[0] != crc32(head[: _HEADER.size]):
        return None
    magic, kind, fragment_id, learner_id, incarnation, seq, num_bytes, crc = _HEADER.unpack(head[: _HEADER.size])
    if magic != _MAGIC or not 1 <= kind <= len(_KINDS):
        return None
    key = PayloadKey(kind=_KINDS[kind - 1], fragment_id=fragment_id, learner_id=learner_id, incarnation=incarnation, seq=seq)
    return key, num_bytes, crc


class PayloadWriter:
    """Appends entries; a file that exists is continued. One thread at a time.

    Args:
        path: the file; its folder must exist.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._end = self._cut_half_entry()
        except OSError:
            os.close(self._fd)
            raise

    def append(self, key: PayloadKey, payload: memoryview | bytes) -> int:
        """Hand one entry to the kernel.

        Returns:
            Its offset.

        Raises:
            OSError: the disk failed; the file ends where it ended before.
        """
        at, view = self._end, memoryview(payload).cast("B")
        end = at
        parts = [memoryview(pack_header(key, len(view), crc32(view))), view]
        try:
            while parts:
                end += _drop(parts, os.pwritev(self._fd, parts, end))
        except OSError:
            # What is left of it is overwritten by the next one, should the disk refuse this too.
            with suppress(OSError):
                os.ftruncate(self._fd, at)
            raise
        self._end = end
        return at

    def close(self) -> None:
        """Make the file durable and close it.

        Raises:
            OSError: the disk failed.
        """
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)

    def _cut_half_entry(self) -> int:
        size, at = os.fstat(self._fd).st_size, 0
        while at < size:
            head = os.pread(self._fd, HEADER_BYTES, at)
            found = _unpack_header(head)
            if found is None and len(head) == HEADER_BYTES:
                # Offsets are named by the tape, so what comes after the damage can be used all the same.
                _log.error("%s: damaged at byte %d. The run goes on; a replay of it will not get past that.", self.path, at)
                return size
            if found is None or at + HEADER_BYTES + found[1] > size:
                os.ftruncate(self._fd, at)
                return at
            at += HEADER_BYTES + found[1]
        return at


def _drop(parts: list[memoryview], num_bytes: int) -> int:
    """Take what was written off the front; returns how much that was."""
    left = num_bytes
    while parts and left >= len(parts[0]):
        left -= len(parts.pop(0))
    if left:
        parts[0] = parts[0][left:]
    return num_bytes


class PayloadKeeper:
    """The writer on a thread of its own, for a syncer; off until `begin`.

    Args:
        run_dir: of the job.
        on_loop: runs a function on the loop thread, soon.
    """

    def __init__(self, run_dir: Path, *, on_loop: Callable[[Callable[[], None]], None]) -> None:
        self._path, self._on_loop = run_dir / PAYLOADS_NAME, on_loop
        self._thread: ThreadPoolExecutor | None = None
        self._writer: PayloadWriter | None = None
        self.num_missing = 0
        """Payloads that the disk refused."""

    def begin(self, is_wanted: bool) -> None:
        """The job's options are known: whether its payloads are kept."""
        if is_wanted and self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="diloco-payloads", initializer=never_interrupt_others)

    def put(self, key: PayloadKey, payload: memoryview) -> Future[int | None] | None:
        """Have a payload written, behind those that wait; its memory must stay as it is until then.

        Returns:
            The offset to come (None in it: the disk refused it); None if payloads are not kept.
        """
        return None if self._thread is None else self._thread.submit(self._append, [(key, payload)])

    def put_founding(self, entries: Iterable[tuple[PayloadKey, memoryview | bytes]]) -> int | None:
        """Write the founding's entries without anything between them, and wait for it; returns the offset of the first one."""
        return None if self._thread is None else self._thread.submit(self._append, entries).result()

    def when_written(self, written: Future[int | None] | None, then: Callable[[int | None], None]) -> None:
        """Call `then(offset)` on the loop thread when it is known. Calls come in the order of `put`, if this is called in it."""
        if written is None:
            then(None)
        else:
            # Through the queue even if it is known: another one, written before, may wait there.
            written.add_done_callback(lambda future: self._on_loop(partial(then, future.result())))

    def close(self) -> None:
        """Write what waits, and end the thread."""
        if self._thread is None:
            return
        self._thread.submit(self._close)
        self._thread.shutdown(wait=True)
        if self.num_missing:
            _log.error("%s lacks %d payloads: a replay of this run will not get past the first of them.", self._path, self.num_missing)

    def _append(self, entries: Iterable[tuple[PayloadKey, memoryview | bytes]]) -> int | None:
        """On the thread: never raises, whatever it is, because it must not end the run."""
        try:
            if self._writer is None:
                self._writer = PayloadWriter(self._path)
            offsets = [self._writer.append(key, payload) for key, payload in entries]
        except Exception as error:
            if not self.num_missing:
                _log.error("%s could not be written: %s. The run goes on, but it cannot be replayed; free the disk.", self._path, error)
            self.num_missing += 1
            return None
        return offsets[0]

    def _close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            _log.error("%s could not be made durable: %s", self._path, error)


class PayloadFile:
    """Reads entries where the tape says that they are; what is there is not trusted.

    Args:
        path: of the file.

    Raises:
        PayloadError: there is no such file, or it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PayloadError(f"{path}: cannot be opened ({error.strerror}). It must lie beside the tape that names it.") from error

    def read(self, at: int, key: PayloadKey, num_bytes: int) -> tuple[bytearray, int]:
        """Read one entry.

        Args:
            at: its offset.
            key: what must be there.
            num_bytes: how long it must be; for a layout, how long it may be.

        Returns:
            The payload, and the offset of the entry after it.

        Raises:
            PayloadError: something else is there, or it is damaged; the sentence names the place.
        """
        place = f"{self.path}, byte {at} ({key})"
        try:
            found = _unpack_header(os.pread(self._fd, HEADER_BYTES, at))
            if found is None:
                raise PayloadError(f"{place}: no payload begins here. The file is damaged, or is that of another run.")
            if found[0] != key:
                raise PayloadError(f"{place}: {found[0]} is here. The file is that of another run, or the tape was edited.")
            if found[1] > num_bytes or (found[1] < num_bytes and key.kind != "layout"):
                raise PayloadError(f"{place}: has {found[1]} bytes and should have {num_bytes}. The file is damaged.")
            if at + HEADER_BYTES + found[1] > os.fstat(self._fd).st_size:
                raise PayloadError(f"{place}: the file ends inside of it. It was cut off.")
            payload = bytearray(found[1])
            self._fill(payload, at + HEADER_BYTES)
        except OSError as error:
            raise PayloadError(f"{place}: cannot be read ({error.strerror}).") from error
        if crc32(payload) != found[2]:
            raise PayloadError(f"{place}: does not have its checksum. The file is damaged.")
        return payload, at + HEADER_BYTES + len(payload)

    def peek(self, at: int) -> PayloadKey | None:
        """What is there; None if nothing that can be read is."""
        with suppress(OSError):
            found = _unpack_header(os.pread(self._fd, HEADER_BYTES, at))
            return None if found is None else found[0]
        return None

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _fill(self, payload: bytearray, at: int) -> None:
        view = memoryview(payload)
        while view and (num_read := os.preadv(self._fd, [view], at)):
            view, at = view[num_read:], at + num_read
