"""Where the shards of a syncer are: their folders in a run directory, and their ports.

`RUN_DIR/shards.json` says that the job has shards, and how many: it is written before any of them starts, so a job never goes on with
another number. Shard k keeps what a syncer keeps (tape, snapshots, payloads, its own summary) in `RUN_DIR/shards/k`.

There is a job once a shard has been founded, not before: what a start leaves that did not succeed is used by the next one.

With a port in the address shard k listens at the 2 k-th port after it, and takes payloads at the one after that: whoever opens a firewall
knows all of them beforehand, and a syncer that starts again has the same ones. With port 0 all are free ones.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.addresses import MAX_PORT, split

__all__ = [
    "SHARDS_NAME",
    "endpoints_of",
    "is_founded",
    "num_shards_of",
    "refuse_lost_folders",
    "shard_dir",
    "shard_dirs",
    "write_num_shards",
]

SHARDS_NAME: Final = "shards.json"
_FOLDER: Final = "shards"


def shard_dir(run_dir: Path, shard: int) -> Path:
    """The folder of one shard."""
    return run_dir / _FOLDER / str(shard)


def shard_dirs(run_dir: Path) -> list[Path]:
    """The folders of all shards of a job, by number; the run directory itself if it has none.

    Raises:
        ConfigurationError: `shards.json` cannot be read.
    """
    count = num_shards_of(run_dir)
    return [run_dir] if count == 1 else [shard_dir(run_dir, shard) for shard in range(count)]


def num_shards_of(run_dir: Path) -> int:
    """How many shards the job in this folder has; 1 for one without, and for a folder without a job.

    Raises:
        ConfigurationError: `shards.json` is there and does not say it, or is not there beside folders of shards.
    """
    path = run_dir / SHARDS_NAME
    try:
        count = json.loads(path.read_bytes())["num_shards"]
    except (FileNotFoundError, NotADirectoryError):
        found = [folder.parent.name for folder in (run_dir / _FOLDER).glob("*/snapshots")]
        if not found:
            return 1
        raise ConfigurationError(
            f"{path}: is not there, and {run_dir / _FOLDER} has folders of shards ({', '.join(sorted(found))}). "
            'Put it back: {"num_shards": S}, with the number that the job has.'
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(f'{path}: cannot be read ({error!r}). Put it back: {{"num_shards": S}}.') from error
    if type(count) is not int or count < 2:
        raise ConfigurationError(f"{path}: num_shards={count!r} must be a whole number of at least 2. Put it back as it was.")
    return count


def write_num_shards(run_dir: Path, num_shards: int) -> None:
    """Say that a job has shards, in one step.

    Raises:
        OSError: the disk failed.
    """
    temporary = run_dir / f".{SHARDS_NAME}.{os.getpid()}"
    temporary.write_text(json.dumps({"num_shards": num_shards}) + "\n")
    temporary.replace(run_dir / SHARDS_NAME)


def is_founded(run_dir: Path) -> bool:
    """Whether there is a job with shards in this folder: a part of one at least.

    Raises:
        ConfigurationError: `shards.json` cannot be read.
    """
    return num_shards_of(run_dir) > 1 and any((folder / "snapshots" / "founding.json").exists() for folder in shard_dirs(run_dir))


def refuse_lost_folders(run_dir: Path) -> None:
    """Nothing may begin anew in one shard's folder while the others hold a job: its learners would be refused as those of another one.

    Raises:
        ConfigurationError: a shard's folder is lost.
    """
    lost = [folder for folder in shard_dirs(run_dir) if not (folder / "snapshots" / "identity.json").exists()]
    if lost and is_founded(run_dir):
        raise ConfigurationError(
            f"{lost[0]}: this shard's part of the job is lost, and the other shards have theirs. Put the folder back, or start a new job "
            "from a checkpoint: fit(ckpt_path=...)."
        )


def endpoints_of(bind: str, shard: int, num_shards: int) -> tuple[str, str]:
    """Where a shard listens: control, and payloads ("": any free port).

    Args:
        bind: the address that the syncer was given.
        shard: number of the shard.
        num_shards: S.

    Raises:
        ConfigurationError: there are not enough ports after it.
    """
    found = split(bind)
    port = 0 if found is None else found[1]
    if not port:
        return bind, ""
    if port + 2 * num_shards - 1 > MAX_PORT:
        raise ConfigurationError(
            f"--bind {bind} --shards {num_shards}: {2 * num_shards} ports from this one on are taken, and there are not so many. "
            f"Give a port of at most {MAX_PORT - 2 * num_shards + 1}."
        )
    host = bind.rpartition(":")[0]
    return f"{host}:{port + 2 * shard}", f"{host}:{port + 2 * shard + 1}"
