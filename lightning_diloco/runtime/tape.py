"""The tape on disk: append-only lines, one writer, any number of readers.

**Writing.** Lines are buffered and handed to the kernel at most every `FLUSH_PERIOD_S`, when the caller's loop asks (`flush_if_due`), and
on `flush` and `close`. Each flush is one write at the end of the file, so a crash leaves at most one half-written last line; a later
writer cuts it off before it goes on. Lines since the last flush are lost with a killed process (SIGTERM: the caller closes).

**Disk errors never end a run.** The log says when the disk begins to refuse lines, when it has taken all that waited, and when lines are
lost; the first error is kept as `TapeWriter.error`. Lines that could not be written are kept and tried again at the next flush, from the
byte where the disk stopped, so a disk that recovers leaves no hole. When more than `MAX_PENDING_BYTES` wait, the writer gives up: the tape
ends there for good and stays readable. A later writer goes on with it.

**Who may read it.** Its owner (mode 0600): it names the sessions, and who knows one can take its connections (docs/transport.md).

**Reading.** A last line without its newline is not there yet. Any other line that is no record, or out of order, is an error with its
number: a tape is evidence and is not guessed at.

A writer belongs to one thread.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from lightning_diloco.errors import DiLoCoError
from lightning_diloco.protocol.records import Record, RunRecord, TapeLine, decode_line, encode_line
from lightning_diloco.runtime.complaints import COMPLAIN_S

__all__ = [
    "FLUSH_PERIOD_S",
    "MAX_PENDING_BYTES",
    "TAPE_NAME",
    "TapeError",
    "TapeTail",
    "TapeWriter",
    "append_run_record",
    "read_tape",
    "walk_tape",
]

TAPE_NAME: Final = "tape.jsonl"
"""Name of the tape inside a run directory."""
FLUSH_PERIOD_S: Final = 0.5
"""Longest time that a written record stays in memory while the loop turns."""
MAX_PENDING_BYTES: Final = 16 << 20
"""Bytes that wait for a disk that fails, before the tape is given up."""
_END_BLOCK_BYTES: Final = 1 << 16
_PORTION_BYTES: Final = 1 << 20
"""A whole tape is read in portions: its records take several times the room of its bytes."""

_log = logging.getLogger(__name__)


class TapeError(DiLoCoError):
    """A file is not a readable tape."""


class TapeWriter:
    """Appends records to a tape; a tape that exists is continued.

    Args:
        path: the file; its folder must exist.
        now: monotonic clock in seconds.
        t0_s: the clock's value at the tape's second 0 (None: so that the tape goes on from its last line, or starts at 0 now).

    Raises:
        OSError: the file cannot be opened.
        TapeError: the file exists and its last line is no record.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic, t0_s: float | None = None) -> None:
        self.path = path
        self.error: OSError | None = None
        """The first disk error, or None."""
        self._now = now
        self._pending = bytearray()
        self._is_given_up = False
        self._is_told = False
        """Whether the log has said that the disk refuses lines, and not yet that it takes them again."""
        self._tell_at_s = -math.inf
        # Unbuffered, so that a failed flush tells how many bytes reached the file.
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            last = _cut_half_line(self._fd, path)
        except TapeError:
            self._discard_fd()
            raise
        self._next_seq = last.seq + 1 if last else 0
        present_s = now()
        self._flushed_s = present_s
        self._t0_s = present_s - (last.t_s if last else 0.0) if t0_s is None else t0_s

    @property
    def num_lines(self) -> int:
        """Lines written so far, those of an earlier writer included."""
        return self._next_seq

    def clock_s(self) -> float:
        """The present moment on the tape's clock."""
        # Microseconds, as in the file, so that a fold over the lines of `write` equals one over the file's.
        return max(round(self._now() - self._t0_s, 6), 0.0)

    def write(self, record: Record) -> TapeLine:
        """Stamp a record and buffer it; never blocks on the disk and never raises for it.

        Returns:
            The line, for whoever folds it at once.
        """
        line = TapeLine(self._next_seq, self.clock_s(), record)
        self._next_seq += 1
        if self._fd is not None and not self._is_given_up:
            self._pending += encode_line(line)
        return line

    def flush_if_due(self, now_s: float) -> None:
        """Flush if the last flush is `FLUSH_PERIOD_S` ago (`now_s` of the same clock)."""
        if now_s - self._flushed_s >= FLUSH_PERIOD_S:
            self.flush()

    def flush(self) -> None:
        """Hand what is buffered to the kernel; a disk error is logged and kept as `error`."""
        self._flushed_s = self._now()
        if self._fd is None or self._is_given_up:
            return
        try:
            while self._pending:
                written = os.write(self._fd, self._pending)
                del self._pending[:written]
        except OSError as error:
            self._refused(error)
        else:
            if self._is_told:
                self._is_told = False
                _log.warning("%s: the disk takes the tape again. All lines that waited are written.", self.path)

    def _refused(self, error: OSError) -> None:
        self.error = self.error or error
        if len(self._pending) > MAX_PENDING_BYTES:
            self._is_given_up = True
            self._pending.clear()
            _log.error(
                "%s: more than %d bytes wait for the disk, which refuses them (%s). The tape ends here for good: the job goes on, and what "
                "it does from now on is in no account. Free the disk: a syncer that is started again goes on with the tape.",
                self.path,
                MAX_PENDING_BYTES,
                error,
            )
        elif not self._is_told and self._flushed_s >= self._tell_at_s:
            # A disk that takes a little now and then would fill the log; an outage that goes on is told at a later flush.
            self._is_told, self._tell_at_s = True, self._flushed_s + COMPLAIN_S
            _log.error(
                "%s: the tape cannot be written: %s. The job goes on, and lines wait in memory, up to %d bytes; then the tape ends for "
                "good. Free the disk.",
                self.path,
                error,
                MAX_PENDING_BYTES,
            )

    def close(self) -> None:
        """Flush, make the tape durable and close it; idempotent, never raises for the disk."""
        if self._fd is None:
            return
        self.flush()
        try:
            os.fsync(self._fd)
        except OSError as error:
            self.error = self.error or error
            _log.error("%s: the disk does not say that the tape is durable: %s.", self.path, error)
        if self._pending:
            _log.error("%s: the disk has not taken the last %d bytes of the tape. They are in no account.", self.path, len(self._pending))
        self._discard_fd()

    def _discard_fd(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class TapeTail:
    """Reads a tape that may still grow, from the beginning, in portions.

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_more = False
        """Whether the last call had to stop before the end of the file."""
        self._offset = 0
        self._next_seq = 0

    def read_new(self, max_bytes: int = -1) -> list[TapeLine]:
        """The complete lines that came since the last call.

        Args:
            max_bytes: about so many bytes of them at once, for a tape that may be long (-1: all).

        Raises:
            TapeError: a complete line is no record, or not the next one.
            OSError: the file exists and cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(max_bytes)
                while max_bytes > 0 and b"\n" not in data and (more := file.read(max_bytes)):
                    data += more
        except FileNotFoundError:
            return []
        lines: list[TapeLine] = []
        for raw in data.split(b"\n")[:-1]:
            try:
                lines.append(self._decode(raw))
            except TapeError:
                if lines:
                    break  # what is good is handed over first; the next call raises
                raise
            self._offset += len(raw) + 1
            self._next_seq += 1
        # A line that is longer and not complete is no reason to try again at once.
        self.has_more = bool(lines) and 0 < max_bytes <= len(data)
        return lines

    def _decode(self, raw: bytes) -> TapeLine:
        place = f"{self.path}, line {self._next_seq + 1}"
        try:
            line = decode_line(raw)
        except ValueError as error:
            raise TapeError(f"{place}: not a record ({error}). Was the file edited or the disk full?") from error
        if line.seq != self._next_seq:
            raise TapeError(f"{place}: seq is {line.seq} and should be {self._next_seq}. Lines are missing or were moved.")
        return line


def read_tape(path: Path) -> Iterator[TapeLine]:
    """All complete lines of a tape one after the other, in little memory; a half-written last line is left out.

    Raises:
        TapeError: the file is missing, or a line is no record or not the next one.
        OSError: the file cannot be read.
    """
    if not path.exists():
        raise TapeError(f"{path}: no tape here. Give the path of a run directory's {TAPE_NAME}.")
    tail = TapeTail(path)
    while lines := tail.read_new(_PORTION_BYTES):
        yield from lines


def walk_tape(path: Path) -> Iterator[TapeLine]:
    """The complete lines of a tape one after the other, in little memory, from a copy too in which lines were left out.

    Raises:
        TapeError: the file is missing or cannot be read; a line is no record or not in order.
    """
    last = -1
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    return  # half-written
                try:
                    line = decode_line(raw)
                except ValueError as error:
                    raise TapeError(f"{path}, line {number}: not a record ({error}). Was the file edited or the disk full?") from error
                if line.seq <= last:
                    raise TapeError(f"{path}, line {number}: seq is {line.seq}, after {last}. Lines were moved.")
                last = line.seq
                yield line
    except OSError as error:
        raise TapeError(f"{path}: cannot be read ({error.strerror}). Give a run directory with its {TAPE_NAME}.") from error


def append_run_record(path: Path, record: RunRecord) -> TapeLine:
    """Append the supervisor's last word to the tape of a syncer that has exited, and make it durable.

    Its time is that of the last line: the supervisor does not know the syncer's clock. JSON has no NaN: a validation metric that is not
    finite becomes None.

    Returns:
        The line as written.

    Raises:
        TapeError: the last line is no record.
        OSError: the disk failed.
    """
    if record.val is not None:
        finite = {name: value if value is not None and math.isfinite(value) else None for name, value in record.val.items()}
        record = msgspec.structs.replace(record, val=finite)
    writer = TapeWriter(path, now=lambda: 0.0)
    line = writer.write(record)
    writer.close()
    if writer.error is not None:
        raise writer.error
    return line


def _cut_half_line(fd: int, path: Path) -> TapeLine | None:
    """Cut what a crash left behind the last newline; return the last complete line (None: empty)."""
    size = os.fstat(fd).st_size
    start, tail = size, b""
    # Backwards in blocks: a tape can be long and only its last line matters.
    while start and tail.count(b"\n") < 2:
        block = min(_END_BLOCK_BYTES, start)
        start -= block
        tail = os.pread(fd, block, start) + tail
    end = tail.rfind(b"\n") + 1
    if end < len(tail):
        os.ftruncate(fd, start + end)
    if not end:
        return None
    last = tail[tail.rfind(b"\n", 0, end - 1) + 1 : end]
    try:
        return decode_line(last)
    except ValueError as error:
        raise TapeError(f"{path}: the last line is not a record ({error}). Use a new run directory.") from error
