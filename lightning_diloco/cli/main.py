"""Entry point of `lightning-diloco`: one subcommand per file.

Wrong use ends with one sentence on stderr and exit code 2; `--help` with 0. Commands whose issue has not landed say so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning_diloco.cli import simulate, syncer
from lightning_diloco.errors import DiLoCoError

__all__ = ["main"]

_LATER = {
    "status": "a live table of a running job; it comes with the internet issue. Until then read summary.json in the run directory",
    "keygen": "keys for encrypted links; it comes with the internet issue. Until then jobs stay on loopback",
    "replay": "re-execution of a tape; it comes with the resilience issue",
    "export": "the global model of a run directory as a checkpoint; it comes with the resilience issue. Until then load global.safetensors",
    "plan": "a forecast of bandwidth and memory; it comes with the internet issue",
    "report": "a page of plots from a run directory; it comes later. Until then read summary.json",
}


class _Parser(argparse.ArgumentParser):
    """One sentence instead of a usage block."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is; exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name (None: those of the process).

    Returns:
        The exit code: 0 success, 1 a run that failed, 2 wrong use.
    """
    parser = _build_parser()
    args, unknown = parser.parse_known_args(argv)
    if args.command in _LATER:
        sys.stderr.write(f"lightning-diloco: {args.command} has not landed yet: {_LATER[args.command]}.\n")
        return 2
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        code: int = args.run(args)
    except DiLoCoError as error:
        sys.stderr.write(f"lightning-diloco {args.command}: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lightning-diloco", description="Decoupled DiLoCo for PyTorch Lightning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    syncer.add_parser(commands)
    simulate.add_parser(commands)
    for name, what in _LATER.items():
        commands.add_parser(name, help=f"(not landed yet) {what.split(';')[0]}", add_help=True)
    return parser
