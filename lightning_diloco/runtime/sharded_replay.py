"""Replay of a run directory, with shards or without: each shard by itself, and then the whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_diloco.outer import global_id, sha256_of
from lightning_diloco.runtime.replay import Replayed, expected_sha256, replay_part
from lightning_diloco.runtime.shards import shard_dirs
from lightning_diloco.runtime.summary import SUMMARY_NAME

__all__ = ["replay_job"]


def replay_job(run_dir: Path) -> Replayed:
    """Execute the merges of a run and compare: every merge and end of every shard, and the SHA-256 of the whole with `summary.json`.

    Args:
        run_dir: of a job that ran with ``tape_payloads=True``.

    Returns:
        One verdict; fragments have the numbers of the whole.

    Raises:
        DiLoCoError: as `replay_part`, for the first shard that cannot be replayed.
    """
    folders = shard_dirs(run_dir)
    found = [replay_part(folder) for folder in folders]
    if len(found) == 1:
        return found[0][0]
    parts, count = [part for part, _ in found], len(found)
    values = {global_id(i, shard, count): value for shard, (_, published) in enumerate(found) for i, value in enumerate(published)}
    sha256, expected = sha256_of(values[p] for p in sorted(values)), expected_sha256(run_dir)
    differs = expected is not None and expected != sha256
    first = next((part.first_difference for part in parts if part.first_difference is not None), None)
    if differs and first is None:
        first = f"{run_dir / SUMMARY_NAME}: global_sha256 is {sha256}, and {expected} in the run"
    fragments = [replace(f, fragment_id=global_id(f.fragment_id, shard, count)) for shard, part in enumerate(parts) for f in part.fragments]
    return Replayed(
        job_id=parts[0].job_id,
        is_equal=not differs and all(part.is_equal for part in parts),
        global_sha256=sha256,
        expected_sha256=expected,
        expected_from=None if expected is None else SUMMARY_NAME,
        merges=sum(part.merges for part in parts),
        contributions=sum(part.contributions for part in parts),
        restarts=sum(part.restarts for part in parts),
        differences=sum(part.differences for part in parts) + differs,
        first_difference=first,
        fragments=tuple(sorted(fragments, key=lambda f: f.fragment_id)),
    )
