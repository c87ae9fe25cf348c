"""What a syncer starts from: a fresh run directory, or a job that it goes on with (PROTOCOL.md sections 5 and 8).

A job is new only in a directory without tape and snapshots. Going on with one needs its identity and its tape; the tensors come from the
newest snapshot that is whole, and from learners that hold later versions. Every start raises the epoch, and writes that down before it
says anything to anybody.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_diloco.errors import ConfigurationError, LocalProtocolError
from lightning_diloco.protocol.history import History
from lightning_diloco.protocol.publisher import Current
from lightning_diloco.protocol.recovery import Resumption
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.snapshot import Founding, FragmentSnapshot, Identity, SnapshotError, SnapshotStore
from lightning_diloco.runtime.tape import TAPE_NAME, TapeError, read_tape

__all__ = ["Opening", "open_job"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Where a syncer begins."""

    identity: Identity
    elapsed_s: float
    """Seconds since the tape's second 0."""
    founding: Founding | None = None
    """None: the job is empty."""
    fragments: tuple[FragmentSnapshot | None, ...] = ()
    resumption: Resumption | None = None


def open_job(run_dir: Path, snapshots: SnapshotStore, *, resume: bool, part: tuple[int, int] = (0, 1)) -> Opening:
    """Find out what the directory holds, and write down that a syncer was started in it.

    Args:
        run_dir: locked by the caller.
        snapshots: of this directory.
        resume: whether the job in it goes on.
        part: number of the shard that is to serve it, and of how many.

    Raises:
        ConfigurationError: the directory holds a job and `resume` was not said, or the other way round, or the job cannot be read,
            or it is another part of one.
        OSError: the disk failed.
    """
    try:
        opening = _go_on(run_dir, snapshots, part) if resume else _begin(run_dir, snapshots)
    except (SnapshotError, TapeError, LocalProtocolError) as error:
        raise ConfigurationError(f"The job in {run_dir} cannot be gone on with: {error}") from error
    snapshots.write_identity(opening.identity)
    return opening


def _begin(run_dir: Path, snapshots: SnapshotStore) -> Opening:
    tape = run_dir / TAPE_NAME
    if (tape.exists() and tape.stat().st_size) or snapshots.read_identity() is not None:
        raise ConfigurationError(f"{run_dir}: holds an earlier job. Give a new directory, or go on with that job by --resume {run_dir}.")
    identity = Identity(job_id=secrets.token_hex(8), lineage=secrets.token_hex(8), epoch=0, started_unix_s=time.time())
    return Opening(identity=identity, elapsed_s=0.0)


def _go_on(run_dir: Path, snapshots: SnapshotStore, part: tuple[int, int]) -> Opening:
    identity = snapshots.read_identity()
    if identity is None:
        raise ConfigurationError(f"--resume: {run_dir} holds no job. Give the run directory of an earlier syncer, or leave --resume out.")
    since_s = time.time() - identity.started_unix_s
    tape, founding = run_dir / TAPE_NAME, snapshots.read_founding()
    if founding is not None:
        _refuse_another_part(run_dir, founding, part)
    fragments = tuple(snapshots.read(founding.layout.fragment_sizes)) if founding is not None else ()
    history, last_s = _fold(tape, fragments)
    # The wall clock counts the time in between; should it have been set back, the tape's own last second is the least.
    elapsed_s = max(since_s, last_s)
    job = history.job
    if job is not None and (founding is None or len(job.fragments) != len(founding.layout.fragments)):
        raise SnapshotError(f"{tape} tells of a founding that {snapshots.folder} does not hold. Start a new job in a new directory.")
    if job is None and any(f is not None for f in fragments):
        raise SnapshotError(f"{snapshots.folder} holds a job, but {tape}, which tells its accounts, is gone or empty. Put the tape back.")
    epoch = 1 + max(identity.epoch, history.epoch)
    identity = replace(identity, epoch=epoch)
    if founding is None or job is None:
        return Opening(identity=identity, elapsed_s=elapsed_s)
    resumption = Resumption(
        history=history,
        config=founding.config,
        fingerprint=founding.fingerprint,
        static_crc=crc32(founding.static),
        static_bytes=founding.static.numel(),
        currents=tuple(
            None if f is None else Current.alone(info, founding.config.wire_dtype, f.version, f.crc, f.merged_through)
            for f, info in zip(fragments, history.fragments, strict=True)
        ),
        # A snapshot of an epoch that the tape does not tell of: its syncer ended before it could write the restart down.
        origins=tuple(f.origin if f is not None and f.version.epoch > history.epoch else None for f in fragments),
    )
    return Opening(identity=identity, elapsed_s=elapsed_s, founding=founding, fragments=fragments, resumption=resumption)


def _refuse_another_part(run_dir: Path, founding: Founding, part: tuple[int, int]) -> None:
    """A shard's folder by itself is no job, and another shard's is not this one's."""
    held = (founding.layout.shard, founding.layout.num_shards)
    if held != part:
        wanted = "a syncer without shards" if part == (0, 1) else f"shard {part[0]} of {part[1]}"
        holds = "a whole model" if held == (0, 1) else f"the part of shard {held[0]} of {held[1]}"
        raise ConfigurationError(
            f"{run_dir}: holds {holds}, and {wanted} was to go on with it. Leave the folders of shards where their syncer has made them, "
            f"and resume its run directory{'' if held == (0, 1) else f': --resume {run_dir.parent.parent}'}."
        )


def _fold(tape: Path, fragments: tuple[FragmentSnapshot | None, ...]) -> tuple[History, float]:
    """What the tape tells, and the second of its last line; line by line, for a tape grows as long as its job runs."""
    history, last_s = History(tuple(None if f is None else f.version for f in fragments)), 0.0
    for line in read_tape(tape) if tape.exists() else ():
        history.feed(line.record)
        last_s = line.t_s
    return history, last_s
