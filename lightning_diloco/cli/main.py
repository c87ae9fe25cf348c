"""Entry point of `lightning-diloco`: one subcommand per file.

Wrong use ends with one sentence on stderr and exit code 2; a disk that takes nothing at the
start of a syncer with one and exit code 74; `--help` with 0. Commands that are not there yet say so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning_diloco import __version__
from lightning_diloco.cli import export, keygen, replay, simulate, status, syncer
from lightning_diloco.errors import DiLoCoError, DiskError
from lightning_diloco.runtime.disk import DISK_FAILED

__all__ = ["main"]

_LATER = {
    "plan": ("a forecast of bandwidth and memory", "Read bytes_up and bytes_down in summary.json of a short run."),
    "report": ("a page of plots from a run directory", "Read summary.json."),
}
"""What each will do, and the remedy until then."""


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
        The exit code: 0 success, 1 a run that failed, 2 wrong use, 74 a disk that takes nothing at the start of a syncer.
    """
    parser = _build_parser()
    commands = _commands(parser)
    args, unknown = parser.parse_known_args(argv)
    if args.command in _LATER:
        what, remedy = _LATER[args.command]
        sys.stderr.write(f"lightning-diloco: {args.command} ({what}) is not there yet. {remedy}\n")
        return 2
    if unknown:
        commands[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        code: int = args.run(args)
    except DiLoCoError as error:
        sys.stderr.write(f"lightning-diloco {args.command}: {error}\n")
        return DISK_FAILED if isinstance(error, DiskError) else 2
    except KeyboardInterrupt:
        return 130
    return code


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lightning-diloco",
        description="Decoupled DiLoCo for PyTorch Lightning.",
        epilog="lightning-diloco COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"lightning-diloco {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    syncer.add_parser(commands)
    keygen.add_parser(commands)
    status.add_parser(commands)
    export.add_parser(commands)
    replay.add_parser(commands)
    simulate.add_parser(commands)
    for name, (what, remedy) in _LATER.items():
        commands.add_parser(name, help=f"(not there yet) {what}", description=f"{name} ({what}) is not there yet. {remedy}")
    return parser


def _commands(parser: argparse.ArgumentParser) -> dict[str, _Parser]:
    (action,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(action.choices)
