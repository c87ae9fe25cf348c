"""`lightning-diloco syncer --shards S`: the process that looks after the shards, and what its command line may say."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from lightning_diloco.config import MAX_SHARDS
from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.disk import disk_errors
from lightning_diloco.runtime.shards import endpoints_of, is_founded, num_shards_of, refuse_lost_folders

if TYPE_CHECKING:
    from lightning_diloco.runtime.keys import SyncerKeys
    from lightning_diloco.runtime.sharded_syncer import ShardedSyncer

__all__ = ["refuse_shards", "run_shards"]


def refuse_shards(args: argparse.Namespace) -> int:
    """How many shards this command means: those that it says, or those of the job that it resumes.

    Args:
        args: of `syncer`; `run_dir` is set.

    Raises:
        ConfigurationError: the number is none, not that of the job, or does not go with another option.
    """
    said = _number(args.shards)
    there = num_shards_of(args.run_dir)
    if args.resume is None:
        _refuse_a_job_with_shards(args, there, said)
        count = 1 if said is None else said
    else:
        refuse_lost_folders(args.run_dir)
        if said is not None and said != there:
            raise ConfigurationError(
                f"--shards {said}: the job in {args.run_dir} has {there}, and its fragments stay where they are. Leave --shards out."
            )
        count = there
    if count > 1 and args.rebuild:
        raise ConfigurationError(
            f"--rebuild --shards {count}: a lost folder is rebuilt for a syncer without shards only; each shard would ask its learners by "
            "itself, and nobody could say whether all have. Start a new job from a checkpoint: fit(ckpt_path=...)."
        )
    if count > 1:
        endpoints_of(args.bind, 0, count)  # refuses an address that leaves no room for the ports of all
    return count


def _refuse_a_job_with_shards(args: argparse.Namespace, there: int, said: int | None) -> None:
    """A new job needs a folder without one. A start that failed, or was broken off, has left none: the same number may be said again."""
    if is_founded(args.run_dir):
        raise ConfigurationError(
            f"{args.run_dir}: holds an earlier job. Give a new directory, or go on with that job by --resume {args.run_dir}."
        )
    if there > 1 and said != there:
        raise ConfigurationError(
            f"{args.run_dir}: a syncer of {there} shards was started here, and no learner has founded a job. Say --shards {there}, or give "
            "a new directory."
        )


def _number(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_SHARDS):
        raise ConfigurationError(
            f"--shards {text}: must be a whole number from 1 to {MAX_SHARDS}, and at most the number of fragments. Say --shards 2."
        )
    return int(text)


def run_shards(args: argparse.Namespace, num_shards: int, keys: SyncerKeys | None, started_s: float) -> int:
    """Look after the shards of one job until it ends.

    Args:
        args: of `syncer`, checked.
        num_shards: at least 2.
        keys: of the syncer.
        started_s: monotonic time at which this process started.

    Returns:
        The exit code.
    """
    from lightning_diloco.runtime.rundir import link_latest, lock_run_dir
    from lightning_diloco.runtime.sharded_syncer import ShardedSyncer

    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(asctime)s syncer: %(message)s")
    _refuse_a_job_without_shards(args)
    arguments = [*(["--keys", str(args.keys)] if args.keys is not None else []), *(["--insecure"] if args.insecure else [])]
    arguments += ["--verbose"] if args.verbose else []
    with lock_run_dir(args.run_dir):
        syncer = ShardedSyncer(args.run_dir, num_shards, args.bind, arguments, started_s)
        metrics = None
        if args.metrics_port is not None:
            from lightning_diloco.runtime.alone import open_metrics

            metrics = open_metrics(args.metrics_port, syncer.live)

        def stop() -> None:
            """End the job or, if it has ended, the wait for the last scrape."""
            if not syncer.has_ended:
                syncer.stop()
            elif metrics is not None:
                metrics.hurry()

        try:
            syncer.start()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: threading.Thread(target=stop, daemon=True).start())
            with disk_errors(args.run_dir):
                _announce(args, syncer, keys, "" if metrics is None else metrics.url)
            link_latest(args.run_dir)
            return 1 if syncer.run() == "failed" else 0
        finally:
            if metrics is not None:
                metrics.close(linger=syncer.has_ended)


def _refuse_a_job_without_shards(args: argparse.Namespace) -> None:
    if args.resume is None and (args.run_dir / "snapshots" / "identity.json").exists():
        raise ConfigurationError(
            f"{args.run_dir}: holds an earlier job. Give a new directory, or go on with that job by --resume {args.run_dir}."
        )


def _announce(args: argparse.Namespace, syncer: ShardedSyncer, keys: SyncerKeys | None, metrics_url: str) -> None:
    from lightning_diloco.cli.inviting import invite

    (endpoint, bulk), *others = syncer.ports
    path = args.run_dir / "syncer.json"
    temporary = path.with_suffix(".tmp")
    said = {"endpoint": endpoint, "bulk": bulk, "pid": os.getpid(), "observer_token": "", "shards": syncer.ports}
    temporary.write_text(json.dumps(said))
    temporary.replace(path)
    sys.stdout.write(
        invite(endpoint, bulk, keys, others)
        + f"Run directory: {args.run_dir} ({len(others) + 1} shards)\n"
        + (f"Metrics: {metrics_url}\n" if metrics_url else "")
    )
    sys.stdout.flush()
