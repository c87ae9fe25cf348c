"""`lightning-diloco status`: how a running job is, asked of its syncer over TCP.

On a terminal the table is drawn anew until the job ends or Ctrl-C; into a pipe or file it is printed once. A syncer that falls silent while
it is watched may have been killed and be starting again, so its last table stays, with a line that says since when nothing was heard.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lightning_diloco.cli.status_table import status_text
from lightning_diloco.errors import SyncerUnavailableError

if TYPE_CHECKING:
    from lightning_diloco.runtime.observer import Observer, Status

__all__ = ["add_parser", "interrupts", "run"]

PERIOD_S = 2.0
"""Between two tables on a terminal, where nothing else is said."""
MIN_PATIENCE_S = 3.0
"""A question is not given up sooner."""
GIVE_UP_S = 120.0
"""A syncer that was there and was not heard for so long will not come back by itself."""
ENDED = ("finished", "stopped", "failed")


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "status",
        help="show how a running job is",
        description="Show the learners and figures of a running job: on a terminal again and again until it ends or Ctrl-C, otherwise "
        "once. Exit code 0: it was shown (or has ended meanwhile); 2: nobody answers.",
    )
    parser.add_argument(
        "target", metavar="TARGET", help="tcp://HOST:PORT of a syncer, or the run directory of a job (local mode: only that)"
    )
    often = parser.add_mutually_exclusive_group()
    often.add_argument("--once", action="store_true", help="show it once, on a terminal too")
    often.add_argument("--watch", type=_seconds, metavar="SECONDS", help=f"show it again and again (default on a terminal: {PERIOD_S:g})")
    parser.add_argument("--json", action="store_true", help="print a JSON object; with --watch one a line")
    parser.add_argument(
        "--timeout", type=_seconds, default=5.0, metavar="SECONDS", help="how long to wait for the first answer (default 5)"
    )
    parser.add_argument("--keys", type=Path, metavar="DIR", help="keys of this site, if the syncer has keys (lightning-diloco keygen)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask, and show what is answered; returns the exit code."""
    from lightning_diloco.runtime.keys import SiteKeys
    from lightning_diloco.runtime.observer import Observer

    is_live = sys.stdout.isatty() and not args.json and not args.once
    watch_s = args.watch or (PERIOD_S if is_live else None)
    with Observer(args.target, args.keys and SiteKeys.read(args.keys)) as observer:
        status = observer.ask(args.timeout)
        _show(status, is_json=args.json, is_live=is_live)
        if watch_s is not None:
            try:
                with interrupts() as came:
                    status = _watch(observer, status, watch_s, lambda status: _show(status, is_json=args.json, is_live=is_live), came)
            except KeyboardInterrupt:  # the ordinary way to stop watching
                return 0
    if not args.json and status.status in ENDED:
        sys.stdout.write(f"The job has ended: {status.status}. Its run directory has the summary.\n")
    return 0


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt as ever, and is put down: Python throws away what is raised while it destroys an object."""
    came: list[int] = []

    def heed(number: int, frame: object) -> None:
        """What the interpreter does, and a note of it."""
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, heed)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _watch(observer: Observer, status: Status, period_s: float, show: Callable[[Status], None], came: list[int]) -> Status:
    """Show the newest status every `period_s` until the job ends, or an interrupt came; returns the last one."""
    heard_s = time.monotonic()
    while status.status not in ENDED and not came:
        try:
            # It tells the end of its job unasked.
            status = observer.listen(period_s) or observer.ask(max(period_s, MIN_PATIENCE_S))
        except SyncerUnavailableError:
            silent_s = time.monotonic() - heard_s
            if silent_s > GIVE_UP_S:
                raise
            sys.stderr.write(f"Nothing was heard from the syncer for {silent_s:.0f} s; it may be starting again.\n")
        else:
            heard_s = time.monotonic()
            show(status)
    return status


def _show(status: Status, *, is_json: bool, is_live: bool) -> None:
    if is_json:
        # ASCII: msgspec's own JSON leaves control characters above 127 as they are, and a terminal may heed them.
        sys.stdout.write(json.dumps(msgspec.to_builtins(status), separators=(",", ":")) + "\n")
    elif is_live:
        # Home, then each line cut to the window and cleared to its end, then everything below: no flicker, and nothing wraps.
        size = shutil.get_terminal_size()
        lines = status_text(status).splitlines()[: max(1, size.lines - 2)]
        sys.stdout.write("\x1b[H" + "".join(f"{line[: size.columns]}\x1b[K\n" for line in lines) + "\x1b[J")
    else:
        sys.stdout.write(status_text(status))
    sys.stdout.flush()


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: give seconds above 0 and below a million, for example 2")
    return value
