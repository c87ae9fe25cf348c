"""`lightning-diloco simulate`: the real machines on a virtual clock."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("simulate", help="simulate a job on a virtual clock", description="Run the real rules on a virtual clock.")
    parser.add_argument("--learners", type=int, default=8, metavar="M", help="number of learners (default 8)")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="inner steps of each (default 500)")
    parser.add_argument("--quorum", type=int, default=1, metavar="K", help="minimum quorum (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the jitter (default 0)")
    parser.add_argument("--tape", type=Path, default=None, metavar="FILE", help="write the tape there")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Simulate, print the figures; returns the exit code."""
    from lightning_diloco.config import SyncConfig
    from lightning_diloco.errors import ConfigurationError
    from lightning_diloco.sim import SimLearner, SimOptions, simulate

    if args.learners < 1 or args.steps < 1:
        raise ConfigurationError(f"--learners {args.learners} --steps {args.steps}: both must be at least 1.")
    learners = tuple(SimLearner(max_steps=args.steps) for _ in range(args.learners))
    result = simulate(SimOptions(config=SyncConfig(min_quorum=args.quorum), learners=learners, seed=args.seed))
    if args.tape is not None:
        try:
            args.tape.write_bytes(result.trace)
        except OSError as error:
            raise ConfigurationError(f"--tape {args.tape}: cannot be written ({error}). Give a file in a folder that exists.") from error
    summary = result.summary()
    if args.json:
        sys.stdout.write(json.dumps(summary) + "\n")
        return 0
    sys.stdout.write(f"{result.merges} merges in {result.virtual_s:.1f} virtual seconds, {summary['mean_members']:.2f} members each\n")
    for learner in summary["learners"]:
        sys.stdout.write(f"learner {learner['learner_id']}: {learner['inner_steps']} steps, participation {learner['participation']:.3f}\n")
    return 0
