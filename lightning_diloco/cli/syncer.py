"""`lightning-diloco syncer`: the process that merges fragments. Local mode starts it too (`--supervised`)."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import resource
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning_diloco.cli.shards import refuse_shards, run_shards
from lightning_diloco.errors import CannotListenError, ConfigurationError
from lightning_diloco.runtime.addresses import bulk_after, is_loopback, split
from lightning_diloco.runtime.disk import disk_errors, lose_output_of_a_full_disk, unlink_quietly
from lightning_diloco.runtime.life_signs import begin_signs, give_sign
from lightning_diloco.runtime.shard_process import CANNOT_LISTEN

if TYPE_CHECKING:
    from lightning_diloco.runtime.keys import SyncerKeys
    from lightning_diloco.runtime.live_summary import LiveSummary
    from lightning_diloco.runtime.service import ServiceOptions, SyncerService

__all__ = ["add_parser", "run"]

_log = logging.getLogger(__name__)

_STARTED_S = time.monotonic()
"""The process began about now: torch, which takes longest, is imported later."""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "syncer",
        help="merge the fragments of one job",
        usage="lightning-diloco syncer (--run-dir DIR [--rebuild] | --resume RUN_DIR) [--bind ENDPOINT] [--keys DIR | --insecure] "
        "[--shards S] [--metrics-port PORT] [--verbose]",
        description="Run the syncer of one job. It ends when the last learner has reached its own limit, or on SIGTERM.",
    )
    parser.add_argument(
        "--bind",
        default="tcp://127.0.0.1:0",
        metavar="ENDPOINT",
        help="control endpoint, by an IP address or interface of this machine or * (default tcp://127.0.0.1:0, any free port); beyond "
        "loopback the port after it is taken too",
    )
    parser.add_argument(
        "--keys", type=Path, metavar="DIR", help="folder made by keygen: links are encrypted, and only admitted sites are let in"
    )
    parser.add_argument("--insecure", action="store_true", help="bind beyond loopback without keys")
    # Required, but checked later: argparse would name this one and not the option beside it that is misspelt.
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of the job: tape, summary, global model (required)")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with the job in this folder, whose syncer has ended")
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="the job's folder is lost: take the job from its learners, which dial --bind, into the new folder --run-dir",
    )
    parser.add_argument(
        "--metrics-port",
        metavar="PORT",
        type=_metrics_address,
        help="serve figures for Prometheus at http://127.0.0.1:PORT/metrics (HOST:PORT: at that address, for all who reach it)",
    )
    parser.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="one log line per merge")
    parser.add_argument(
        "--shards",
        metavar="S",
        help="so many processes, each for its share of the fragments (default 1), at the ports from --bind's on, two each",
    )
    parser.add_argument("--as-shard", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until the job ends; returns the exit code."""
    _refuse(args)
    num_shards = refuse_shards(args)
    keys = _read_keys(args.keys)
    if num_shards > 1:
        _make_dir(args.run_dir)
        return run_shards(args, num_shards, keys, _STARTED_S)
    try:
        return _serve(args, keys)
    except CannotListenError as error:
        if not args.as_shard:
            raise
        sys.stderr.write(f"lightning-diloco syncer: {error}\n")
        return CANNOT_LISTEN


def _serve(args: argparse.Namespace, keys: SyncerKeys | None) -> int:
    has_parent = args.supervised or args.as_shard
    if has_parent:
        # Its log is on the disk that it may have to complain of; what cannot be said there must not change how it ends.
        lose_output_of_a_full_disk()
    lines = _stdin_lines() if has_parent else iter(())
    hello = _first_line(lines) if has_parent else {}
    _make_dir(args.run_dir)
    name = f"shard {hello['shard']}" if args.as_shard else "syncer"
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format=f"%(asctime)s {name}: %(message)s")
    _begin_signs(hello)
    # Late imports: `--help` and wrong use need no torch.
    import torch

    from lightning_diloco.runtime.alone import LoneSyncer
    from lightning_diloco.runtime.rundir import link_latest
    from lightning_diloco.runtime.service import ServiceOptions, SyncerService

    torch.set_num_threads(_num_threads())
    options = ServiceOptions(
        run_dir=args.run_dir,
        bind=args.bind,
        token=hello.get("token", ""),
        takeover_token=hello.get("takeover_token", ""),
        num_slots=hello.get("num_slots"),
        supervised=args.supervised,
        resume=args.resume is not None,
        rebuild=args.rebuild,
        bulk=hello.get("bulk", "") or bulk_after(args.bind),
        keys=keys,
        observer_token=secrets.token_hex(16) if args.supervised else "",
        shard=hello.get("shard", 0),
        num_shards=hello.get("num_shards", 1),
        shard_endpoints=tuple(hello.get("endpoints", ())),
        spare_dir=Path(hello["spare_dir"]) if "spare_dir" in hello else None,
    )
    _allow_descriptors()
    lone = None if args.supervised else LoneSyncer(options, _STARTED_S, args.metrics_port, shown=_shown(options))
    service = SyncerService(options) if lone is None else lone.service
    endpoint = service.bind() if lone is None else lone.bind()
    _heed_signals(functools.partial(service.finish, "stopped") if lone is None else lone.stop, is_shard=args.as_shard)
    try:
        with disk_errors(args.run_dir):
            _announce(args, endpoint, service, "" if lone is None else lone.metrics_url, keys)
    except ConfigurationError:
        # Nobody could find the syncer. Its number is used up, and nothing was served under it.
        (service if lone is None else lone).abandon()
        raise
    if has_parent:
        threading.Thread(target=_obey, args=(service, lines), name="diloco-supervisor", daemon=True).start()
    else:
        link_latest(args.run_dir)
    if lone is not None:
        return 1 if lone.run() == "failed" else 0
    try:
        service.run()
    except Exception:  # the service has logged it
        return 1
    return 0


def _begin_signs(hello: dict[str, Any]) -> None:
    """Give signs of life where the supervisor looks for them: in the folder that it names, or in the one on another disk."""
    if "signs_path" not in hello:
        return
    path = Path(hello["signs_path"])
    for folder in (path.parent, *([Path(hello["spare_dir"])] if "spare_dir" in hello else [])):
        with contextlib.suppress(OSError):
            begin_signs(folder / path.name)
            # The first one says that there will be more.
            give_sign()
            return
    _log.warning("%s: its disk takes no file. Should this syncer hang, nobody will notice. Free the disk.", path)


def _heed_signals(stop: Callable[[], object], *, is_shard: bool) -> None:
    """End the job on SIGTERM and Ctrl-C; a shard ends by its life line only, or the job would be over at it and not at the others."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # On a thread: the handler may run while this one holds the lock that `stop` needs.
        signal.signal(number, signal.SIG_IGN if is_shard else lambda *_: threading.Thread(target=stop, daemon=True).start())


def _shown(options: ServiceOptions) -> LiveSummary | None:
    """What the lead of several shards tells observers: the figures of all."""
    if not options.shard_endpoints:
        return None
    from lightning_diloco.runtime.sharded_live import ShardedLive

    return ShardedLive(options.run_dir.parent.parent, options.num_shards)


def _allow_descriptors() -> None:
    """As many as the system allows this process, not as many as it gives by default: each connection takes one, a stranger's too."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems call that unlimited, and refuse it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _read_keys(folder: Path | None) -> SyncerKeys | None:
    if folder is None:
        return None
    from lightning_diloco.runtime.keys import SyncerKeys

    return SyncerKeys.read(folder)


def _num_threads() -> int:
    """As many as the launcher gave this process; one otherwise."""
    value = os.environ.get("OMP_NUM_THREADS", "1").split(",")[0].strip()
    return int(value) if value.isdigit() and int(value) else 1


def _make_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--run-dir {run_dir}: cannot be created ({error}). Give a directory that can be written to.") from error


def _refuse(args: argparse.Namespace) -> None:
    if args.resume is not None:
        if args.rebuild:
            raise ConfigurationError(
                f"--rebuild takes a job whose folder is lost from its learners; {args.resume} is there. Say --resume {args.resume} alone, "
                "or --rebuild --run-dir with a new folder."
            )
        if args.run_dir is not None and args.run_dir != args.resume:
            raise ConfigurationError(
                f"--resume {args.resume} names the folder of the job; --run-dir {args.run_dir} is another one. Leave it out."
            )
        if not args.resume.is_dir():
            raise ConfigurationError(f"--resume {args.resume}: there is no such folder. Give the run directory of an earlier syncer.")
        args.run_dir = args.resume
    if args.run_dir is None:
        raise ConfigurationError("--run-dir DIR is required: the folder of the job, for example --run-dir outputs/by_hand.")
    address = split(args.bind)
    if address is None:
        raise ConfigurationError(f"--bind {args.bind}: an endpoint is tcp://HOST:PORT, for example tcp://127.0.0.1:7777.")
    bulk_after(args.bind)
    if args.keys is not None and args.insecure:
        raise ConfigurationError(f"--insecure with --keys {args.keys}: with keys nobody comes in without. Say one of the two.")
    if args.rebuild and not address[1]:
        raise ConfigurationError(
            f"--rebuild --bind {args.bind}: the job's learners go on dialling the address that their syncer had. Give that, with its port."
        )
    if not is_loopback(address[0]) and args.keys is None and not args.insecure:
        raise ConfigurationError(
            f"--bind {args.bind}: beyond loopback whoever reaches the port could read and change the model. Give --keys DIR "
            "(lightning-diloco keygen DIR makes it), or say --insecure in a network in which you trust everybody."
        )


def _metrics_address(value: str) -> tuple[str, int]:
    """(host, port) of PORT, which is one of loopback, or of HOST:PORT."""
    try:
        address = urlsplit(f"//127.0.0.1:{value}" if value.isdecimal() else f"//{value}")
        host, port = address.hostname, address.port
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value}: {error}; 0 is any free port") from error
    if not host or port is None or address.path or address.username is not None:
        raise argparse.ArgumentTypeError(f"{value}: give PORT, which is one of 127.0.0.1, or HOST:PORT")
    return host, port


def _announce(args: argparse.Namespace, endpoint: str, service: SyncerService, metrics_url: str, keys: SyncerKeys | None) -> None:
    path = args.run_dir / "syncer.json"
    temporary = path.with_suffix(".tmp")
    said = {"endpoint": endpoint, "bulk": service.bulk_endpoint, "pid": os.getpid(), "observer_token": service.options.observer_token}
    # Who can read the token may watch the job: nobody else.
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(said, file)
        temporary.replace(path)
    except OSError:
        unlink_quietly(temporary)
        raise
    if not args.supervised and not args.as_shard:
        from lightning_diloco.cli.inviting import invite

        sys.stdout.write(
            invite(endpoint, service.bulk_endpoint, keys)
            + f"Run directory: {args.run_dir}\n"
            + (f"Metrics: {metrics_url}\n" if metrics_url else "")
        )
        sys.stdout.flush()


def _stdin_lines() -> Iterator[bytes]:
    """Lines of standard input. Without Python's buffer: a thread that waits in it would hold its lock when the interpreter ends."""
    pending = b""
    while block := os.read(0, 65536):
        *lines, pending = (pending + block).split(b"\n")
        yield from lines


def _first_line(lines: Iterator[bytes]) -> dict[str, Any]:
    try:
        value = json.loads(next(lines, b""))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigurationError("--supervised reads one line of JSON from its standard input; it is for the supervisor of local mode.")
    return value


def _obey(service: SyncerService, lines: Iterator[bytes]) -> None:
    """Follow the supervisor's commands; the end of its pipe is the end of the supervisor, and of this process."""
    is_finishing = False
    for line in lines:
        try:
            command = json.loads(line)
            if command["command"] == "lost":
                service.learner_lost(int(command["learner_id"]), int(command["life"]))
            elif command["command"] == "finish" and command["status"] in ("finished", "stopped", "failed"):
                is_finishing = True
                service.finish(command["status"])
            else:
                raise ValueError("unknown")
        except (ValueError, TypeError, KeyError):
            _log.error("The supervisor's command %.200r was not understood.", line)
    if not is_finishing:
        os._exit(1)
