"""`lightning-diloco replay`: a run's merges executed again from its tape and payloads, and compared with what the run ended at."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_diloco.runtime.replay import Replayed

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "replay",
        help="execute the merges of a run again and compare the result",
        description="Execute the merges of a run that had tape_payloads=True again, and compare the result with summary.json. "
        "Exit code 0: equal; 1: something differs; 2: it cannot be replayed.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the job")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay, say what was found; returns the exit code."""
    from lightning_diloco.runtime.sharded_replay import replay_job

    found = replay_job(args.run_dir)
    sys.stdout.write(json.dumps(asdict(found)) + "\n" if args.json else _text(args.run_dir, found))
    return 0 if found.is_equal else 1


def _text(run_dir: Path, found: Replayed) -> str:
    lines = [
        f"fragment {f.fragment_id} ({f.kind}, {f.num_params} elements): {f.merges} merges of {f.contributions} contributions, from version "
        f"{f.founded_n} to {f.version[1]} of epoch {f.version[0]}" + (f", {f.differences} DIFFER" if f.differences else "")
        for f in found.fragments
    ]
    total = f"{run_dir}: {found.merges} merges of job {found.job_id} replayed, {found.restarts} restarts; sha256 {found.global_sha256}"
    if not found.is_equal:
        end = f"DIFFERS from {found.expected_from or 'the tape'} in {found.differences} places, the first one: {found.first_difference}."
    elif found.expected_from is None:
        end = "every merge has the checksum on the tape; the job has not ended, so there is no global_sha256 to compare with."
    else:
        end = f"equals that of {found.expected_from}."
    return "\n".join([*lines, f"{total} {end}"]) + "\n"
