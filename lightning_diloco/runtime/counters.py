"""Totals of a learner that survive its death: a small memory-mapped file.

A learner that is killed cannot report its last steps. Its totals therefore also live in a mapped file of the run directory: stores into
the mapping belong to the kernel's page cache and outlast the process (not the machine; a machine that is lost takes its learners along).

Layout, little endian: magic (8 bytes), version, incarnation (all ones: not known yet), then two slots of (begin, inner_steps, tokens,
samples, end), each field 8 bytes. Samples are those trained under data leases (0 without them). An update writes the slot that does not
hold the newest totals: begin = k, the totals, end = k, where k counts updates. A slot counts if begin == end; the valid slot with the
larger k is the truth. A process killed between two stores leaves the other slot untouched, so one step at most is missing and a torn
pair is never read. The file's name is its process's nonce, and whoever knows that can speak in its name: folder and files are for their
owner alone.

An update is five 8-byte stores on the training thread: no system call, no allocation that grows, no lock.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lightning_diloco.errors import DiLoCoError
from lightning_diloco.protocol.events import CountersRead
from lightning_diloco.protocol.members import Member
from lightning_diloco.runtime.disk import unlink_quietly

__all__ = ["CounterFile", "CounterFileError", "Counters", "counters_folder", "open_counters", "read_counters", "read_totals"]

_MAGIC: Final = b"LDLCNT\r\n"
_VERSION: Final = 2
_NUM_WORDS: Final = 13
_SIZE: Final = _NUM_WORDS * 8
_VERSION_AT, _INCARNATION_AT, _SLOTS_AT, _SLOT_WORDS = 1, 2, 3, 5
_UNKNOWN: Final = 2**64 - 1
_LAYOUT: Final = struct.Struct("<8s12Q")

_log = logging.getLogger(__name__)


class CounterFileError(DiLoCoError):
    """A file is not a readable counter file."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals of one incarnation; `incarnation` is None if it died before it was told."""

    incarnation: int | None
    inner_steps: int
    tokens: int
    samples: int = 0


def counters_folder(run_dir: Path) -> Path:
    """The folder of a run directory's counter files, created if it is missing, its parents too.

    Raises:
        OSError: it cannot be created.
    """
    folder = run_dir / "counters"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


class CounterFile:
    """The writing side; one process, one thread.

    Args:
        path: the file, created or overwritten; its folder must exist.

    Raises:
        OSError: the file cannot be created, or the disk is full.
        CounterFileError: this machine is big endian.
    """

    def __init__(self, path: Path) -> None:
        if sys.byteorder != "little":
            raise CounterFileError(f"{path}: counter files are little endian and this machine is not. Run without a run directory.")
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            # Real blocks now: a store into a hole of a full disk would end the process with SIGBUS.
            os.posix_fallocate(fd, 0, _SIZE)
            self._map = mmap.mmap(fd, _SIZE)
        except OSError:
            unlink_quietly(path)
            raise
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")
        self._words[_VERSION_AT] = _VERSION
        self._words[_INCARNATION_AT] = _UNKNOWN
        self._updates = 0
        self._map[: len(_MAGIC)] = _MAGIC  # last: a file with the magic is complete

    def set_incarnation(self, incarnation: int) -> None:
        """Note whose totals these are."""
        self._words[_INCARNATION_AT] = incarnation

    def update(self, inner_steps: int, tokens: int, samples: int = 0) -> None:
        """Note the totals since the start of this incarnation; once per inner step, never blocks."""
        self._updates = updates = self._updates + 1
        at, words = _SLOTS_AT + _SLOT_WORDS * (updates & 1), self._words
        words[at] = updates
        words[at + 1] = inner_steps
        words[at + 2] = tokens
        words[at + 3] = samples
        words[at + 4] = updates

    def close(self) -> None:
        """Unmap; the file stays. Idempotent."""
        self._words.release()
        self._map.close()


def open_counters(path: Path) -> CounterFile | None:
    """The writing side for a learner that trains without it if the disk does not take it, and says so.

    Args:
        path: see `CounterFile`.

    Raises:
        CounterFileError: this machine is big endian.
    """
    try:
        return CounterFile(path)
    except OSError as error:
        _log.error(
            "The totals of this learner cannot be kept in a file: %s. Training goes on; if this process is killed, its steps since its "
            "last report are in no account.",
            error,
        )
        return None


def read_counters(path: Path) -> Counters:
    """The totals in a counter file, of a process that is alive or dead.

    Raises:
        CounterFileError: the file is missing, cut, of another kind or version, or damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CounterFileError(f"{path}: cannot be read ({error}). The totals of this learner are those of its last report.") from error
    if len(data) != _SIZE:
        raise CounterFileError(f"{path}: {len(data)} bytes and should be {_SIZE}. The file is cut or of another kind.")
    magic, version, incarnation, *words = _LAYOUT.unpack(data)
    if magic != _MAGIC:
        raise CounterFileError(f"{path}: starts with {magic!r} and should start with {_MAGIC!r}. The file is not a counter file.")
    if version != _VERSION:
        raise CounterFileError(f"{path}: version {version}, and this program reads version {_VERSION}. Use the program that wrote it.")
    slots = [words[i : i + _SLOT_WORDS] for i in (0, _SLOT_WORDS)]
    whole = [slot for slot in slots if slot[0] == slot[-1]]
    if not whole:
        raise CounterFileError(f"{path}: both slots are half-written. A single writer cannot do that; the file is damaged.")
    _, inner_steps, tokens, samples, _ = max(whole)
    return Counters(None if incarnation == _UNKNOWN else incarnation, inner_steps, tokens, samples)


def read_totals(folder: Path, member: Member) -> CountersRead | None:
    """What the counter file of a member's process says, as an event for the rules; None if there is none that can be read.

    Args:
        folder: where the files of a run directory are.
        member: whose process.
    """
    try:
        counters = read_counters(folder / f"{member.session}.bin")
    except CounterFileError:
        return None
    totals = {"inner_steps": counters.inner_steps, "tokens": counters.tokens, "samples": counters.samples}
    return CountersRead(learner_id=member.learner_id, incarnation=member.incarnation, **totals)
