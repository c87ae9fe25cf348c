"""`lightning-diloco syncer`: the process that merges fragments. Local mode starts it too (`--supervised`)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning_diloco.errors import ConfigurationError

__all__ = ["add_parser", "run"]

_log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "syncer",
        help="merge the fragments of one job",
        description="Run the syncer of one job. It ends when the last learner has reached its own limit, or on SIGTERM.",
    )
    parser.add_argument(
        "--bind", default="tcp://127.0.0.1:0", metavar="ENDPOINT", help="control endpoint, tcp://127.0.0.1:PORT; 0 = any (default)"
    )
    parser.add_argument("--run-dir", required=True, type=Path, metavar="DIR", help="folder of the job: tape, summary, global model")
    parser.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="one log line per merge")
    for option, issue in (("--keys", "internet"), ("--shards", "internet"), ("--metrics-port", "internet")):
        parser.add_argument(option, default=None, metavar="...", help=f"(not landed yet: {issue} issue)")
    for option in ("--resume", "--rebuild"):
        parser.add_argument(option, action="store_true", help="(not landed yet: resilience issue)")
    parser.add_argument("--insecure", action="store_true", help="(not landed yet: internet issue)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until the job ends; returns the exit code."""
    _refuse(args)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(asctime)s syncer: %(message)s")
    # Late imports: `--help` and wrong use need no torch.
    import torch

    from lightning_diloco.runtime.service import ServiceOptions, SyncerService

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    hello = _read_line() if args.supervised else {}
    options = ServiceOptions(
        run_dir=args.run_dir,
        bind=args.bind,
        token=hello.get("token", ""),
        takeover_token=hello.get("takeover_token", ""),
        num_slots=hello.get("num_slots"),
        supervised=args.supervised,
    )
    args.run_dir.mkdir(parents=True, exist_ok=True)
    (args.run_dir / "counters").mkdir(exist_ok=True)
    service = SyncerService(options)
    endpoint = service.bind()
    _announce(args, endpoint)
    if args.supervised:
        threading.Thread(target=_obey, args=(service,), name="diloco-supervisor", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.finish("stopped"))
    if args.supervised:
        service.run()
    else:
        _run_alone(service, args.run_dir)
    return 0 if service.status in ("finished", "stopped") or args.supervised else 1


def _refuse(args: argparse.Namespace) -> None:
    for name, issue in (("keys", "internet"), ("shards", "internet"), ("metrics_port", "internet")):
        if getattr(args, name) is not None:
            raise ConfigurationError(f"--{name.replace('_', '-')} has not landed yet: it comes with the {issue} issue. Leave it out.")
    for name, issue in (("resume", "resilience"), ("rebuild", "resilience"), ("insecure", "internet")):
        if getattr(args, name):
            raise ConfigurationError(f"--{name} has not landed yet: it comes with the {issue} issue. Leave it out.")
    try:
        address = urlsplit(args.bind)
        port = address.port
    except ValueError as error:
        raise ConfigurationError(f"--bind {args.bind}: {error}. Give tcp://127.0.0.1:PORT.") from error
    if address.scheme != "tcp" or address.hostname is None or port is None:
        raise ConfigurationError(f"--bind {args.bind}: an endpoint is tcp://HOST:PORT, for example tcp://127.0.0.1:7777.")
    if address.hostname not in LOOPBACK:
        raise ConfigurationError(
            f"--bind {args.bind}: binding beyond loopback comes with the internet issue (keys first). Use tcp://127.0.0.1:{port}."
        )


def _announce(args: argparse.Namespace, endpoint: str) -> None:
    path = args.run_dir / "syncer.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"endpoint": endpoint, "pid": os.getpid()}))
    temporary.replace(path)
    if not args.supervised:
        sys.stdout.write(
            f"Syncer ready. A learner joins with DecoupledDiLoCoStrategy(syncer={endpoint!r}).\nRun directory: {args.run_dir}\n"
        )
        sys.stdout.flush()


def _read_line() -> dict[str, Any]:
    line = sys.stdin.readline()
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigurationError("--supervised reads one line of JSON from its standard input; it is for the supervisor of local mode.")
    return value


def _obey(service: Any) -> None:
    """Follow the supervisor's commands; the end of its pipe is the end of the supervisor, and of this process."""
    is_finishing = False
    for line in sys.stdin:
        command = json.loads(line)
        if command["command"] == "lost":
            service.learner_lost(int(command["learner_id"]))
        elif command["command"] == "finish":
            is_finishing = True
            service.finish(command["status"])
    if not is_finishing:
        os._exit(1)


def _run_alone(service: Any, run_dir: Path) -> None:
    """Without a supervisor this process keeps summary.json itself."""
    from lightning_diloco.protocol.records import RunRecord
    from lightning_diloco.runtime.summary import SUMMARY_PERIOD_S, SummaryKeeper
    from lightning_diloco.runtime.tape import TAPE_NAME, append_run_record, read_tape

    keeper = SummaryKeeper(run_dir)
    stop = threading.Event()

    def keep() -> None:
        while not stop.wait(SUMMARY_PERIOD_S):
            keeper.tick(time.monotonic())

    thread = threading.Thread(target=keep, name="diloco-summary", daemon=True)
    thread.start()
    try:
        service.run()
    finally:
        stop.set()
        thread.join()
    first = next((line.t_s for line in read_tape(run_dir / TAPE_NAME) if type(line.record).__name__ == "JoinRecord"), 0.0)
    status = service.status or "failed"
    append_run_record(run_dir / TAPE_NAME, RunRecord(status=status, startup_s=first, restarts={"learners": 0, "syncer": 0}, val=None))
    keeper.finish()
