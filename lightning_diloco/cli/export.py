"""`lightning-diloco export`: the global model of a run directory as a checkpoint that plain Lightning reads."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_diloco.errors import ConfigurationError

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "export",
        help="write the global model of a run directory as a checkpoint",
        description="Write the global model of the newest snapshot, of a job that runs or has ended.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the job")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write: OUT.ckpt (plain Lightning) or OUT.safetensors")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, say what was written; returns the exit code."""
    if not args.run_dir.is_dir():
        raise ConfigurationError(f"{args.run_dir}: there is no such folder. Give the run directory of a job.")
    from lightning_diloco.runtime.exporting import export_model

    exported = export_model(args.run_dir, args.out)
    if args.json:
        sys.stdout.write(json.dumps(asdict(exported)) + "\n")
        return 0
    low, high = min(exported.versions), max(exported.versions)
    sys.stdout.write(
        f"{args.out}: {exported.num_params} parameters of job {exported.job_id}, {len(exported.versions)} fragments at versions "
        f"{low} to {high}, sha256 {exported.global_sha256}\n"
    )
    return 0
