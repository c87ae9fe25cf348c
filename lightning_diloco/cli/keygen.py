"""`lightning-diloco keygen`: the keys of one machine, and who is let in.

Only public keys are printed or taken: a secret is in one file and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "keygen",
        help="make the keys of a machine, let a site in, shut it out",
        usage="lightning-diloco keygen DIR [--syncer KEY | --admit NAME KEY | --revoke NAME] [--json]",
        description="Make the keys of this machine in the folder DIR. Every machine makes its own, and only public keys are passed on.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the keys of this machine; never overwritten")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--syncer", metavar="KEY", help="at a site: make its keys, and speak to the syncer with this public key only")
    what.add_argument("--admit", nargs=2, metavar=("NAME", "KEY"), help="at the syncer: let in the site with this public key, from now on")
    what.add_argument("--revoke", metavar="NAME", help="at the syncer: shut this site out, from now on")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do one of the four; returns the exit code."""
    from lightning_diloco.runtime import keys

    if args.admit is not None:
        name, key = args.admit
        keys.admit(args.folder, name, key)
        return _say(args, {"admitted": name, "public_key": key.lower()}, f"Site {name} is admitted.\n")
    if args.revoke is not None:
        keys.revoke(args.folder, args.revoke)
        said = f"Site {args.revoke} is shut out: a syncer that runs with these keys drops whatever it sends from now on.\n"
        return _say(args, {"revoked": args.revoke}, said)
    if args.syncer is not None:
        public = keys.trust_syncer(args.folder, args.syncer).hex()
        next_step = f"At the syncer:  lightning-diloco keygen DIR --admit NAME {public}"
    else:
        public = keys.make_pair(args.folder).hex()
        next_step = f"At each site:   lightning-diloco keygen DIR --syncer {public}"
    said = f"The secret is in {args.folder / keys.SECRET} and stays on this machine.\nThe public key is {public}\n{next_step}\n"
    return _say(args, {"folder": str(args.folder), "public_key": public}, said)


def _say(args: argparse.Namespace, result: dict[str, str], text: str) -> int:
    sys.stdout.write(json.dumps(result) + "\n" if args.json else text)
    return 0
