"""How fast payloads pass from a learner to the syncer and back on loopback, against a plain TCP stream in the same run.

    .venv/bin/python benchmarks/transport.py [--rounds 5] [--seconds 4] [--mib 64] [--no-keys] [--json FILE]

Two processes, each pinned to a core of its own with all its threads, and the real `LearnerTransport` and `SyncerTransport`: chunks of
1 MiB, credit, both checksums, validation. Two payloads are queued at any time, so that one is always on its way. A stream of plain TCP
between two processes that are pinned in the same way stands before and after each measurement, and the machine's slow drift falls out.

| kind | what passes, counted where it arrives |
|---|---|
| `tcp` | the reference, one stream: `iperf3` where it is installed, else `sendall` of 1 MiB and `recv_into` of up to 1 MiB, which are C |
| `up`, `down` | payloads from the learner to the syncer, and from the syncer to the learner |
| `both` | both at once; the sum |
| `... keys` | the same, encrypted (CURVE) |

Aims, of the mean of the streams before and after: `up` and `down` at least 45 %, with keys at least 20 %. The second table is a profile:
processor time of each side for a GB that passed, by stage on the transport's thread, and the rest, which is ZeroMQ's I/O thread (copies
between user and kernel, encryption).

The exit code is 1 if an aim is missed. Measurements that the JSON file holds are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.merge import Clock  # noqa: E402
from benchmarks.recipe_rows import table  # noqa: E402
from benchmarks.row_file import read_rows, write_rows  # noqa: E402

KINDS = ("up", "down", "both")
WARM_UP_S = 1.0
CHUNK_BYTES = 1 << 20
MIN_SHARE, MIN_SHARE_KEYS = 0.45, 0.2
NONCE = bytes(range(16))


def main() -> int:
    """Measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="that count of each (default 4)")
    parser.add_argument("--mib", type=int, default=64, help="of a payload (default 64)")
    parser.add_argument("--no-keys", action="store_true", help="leave encryption out")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "transport.json", metavar="FILE", help="measurements so far")
    parser.add_argument("--end", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.end:
        serve(*arguments.end)
        return 0
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that both ends end with this process
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two cores are needed, one for each end.")
    options = {"seconds": arguments.seconds, "mib": arguments.mib, "reference": reference()}
    rows: list[dict[str, Any]] = read_rows(arguments.json, [])
    if any(row.get("options") != options for row in rows):
        parser.error(f"{arguments.json} holds measurements of other options than {options}. Give another file.")
    kinds = [*KINDS, *([] if arguments.no_keys else [f"{kind}, keys" for kind in KINDS])]
    # The stream stands first and last, so that every other kind has one on both sides.
    order = [kind for _ in range(arguments.rounds) for other in kinds for kind in ("tcp", other)] + ["tcp"]
    for kind in order[len(rows) :]:
        rows.append({"options": options, "kind": kind, **measure(kind, arguments)})
        print(f"... {kind}: {rows[-1]['bytes_per_s'] / 1e9:.2f} GB/s", flush=True)
        write_rows(arguments.json, rows, indent=None)
    return report(rows, kinds)


def reference() -> str:
    """Which plain stream there is."""
    return "tcp by iperf3" if shutil.which("iperf3") else "tcp by sendall and recv_into"


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement."""
    if kind == "tcp" and shutil.which("iperf3"):
        return {"bytes_per_s": iperf3(arguments.seconds)}
    way, _, has_keys = kind.partition(", ")
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_transport_") as folder:
        keys = Path(folder) / "keys"
        if has_keys:
            make_keys(keys)
        told = [way, str(arguments.seconds), str(arguments.mib), str(keys) if has_keys else ""]
        syncer = end(1, "syncer", *told)
        try:
            assert syncer.stdout is not None
            learner = end(0, "learner", *told, syncer.stdout.readline())
            try:
                outputs = [process.communicate(timeout=60 + 4 * arguments.seconds)[0] for process in (learner, syncer)]
            finally:
                learner.kill()
                learner.wait()
        finally:
            syncer.kill()
            syncer.wait()
    sides = dict(zip(("learner", "syncer"), (json.loads(text.splitlines()[-1]) for text in outputs), strict=True))
    return {"bytes_per_s": sum(side["bytes_per_s"] for side in sides.values()), "sides": sides}


def end(core: int, *told: str) -> subprocess.Popen[str]:
    """Start one end on its core."""
    cores = sorted(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(cores[core]), sys.executable, __file__, "--end", *told]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def make_keys(folder: Path) -> None:
    """A syncer's keys and those of one site that it lets in."""
    from lightning_diloco.runtime.keys import admit, make_pair, trust_syncer

    public = make_pair(folder / "syncer")
    admit(folder / "syncer", "site", trust_syncer(folder / "site", public.hex()).hex())


def iperf3(seconds: float) -> float:
    """One stream of `iperf3`, pinned as the ends are; bytes per second as its receiver saw them."""
    cores = sorted(os.sched_getaffinity(0))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    server = subprocess.Popen(["taskset", "-c", str(cores[1]), "iperf3", "-s", "-1", "-p", port], stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        command = ["taskset", "-c", str(cores[0]), "iperf3", "-c", "127.0.0.1", "-p", port, "-J", "-t", str(max(1, round(seconds)))]
        done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    finally:
        server.kill()
        server.wait()
    return float(done["end"]["sum_received"]["bits_per_second"]) / 8


# ---- one end, in its process ------------------------------------------------------------------------------------------------


def serve(role: str, way: str, seconds: str, mib: str, keys: str, endpoint: str = "") -> None:
    """Be one end; prints a line of JSON."""
    # Written to once: the kernel has one page for all memory that was not.
    payload = bytearray(os.urandom(CHUNK_BYTES) * int(mib))
    if way == "tcp":
        row = stream(role, float(seconds), payload, endpoint)
    else:
        row = Payloads(role, way, float(seconds), payload).run(keys, endpoint)
    print(json.dumps(row), flush=True)


def stream(role: str, seconds: float, payload: bytearray, endpoint: str) -> dict[str, float]:
    """The reference: from the learner to the syncer."""
    if role == "learner":
        with socket.create_connection(tuple(json.loads(endpoint))) as sock:
            view, end_s = memoryview(payload), time.monotonic() + WARM_UP_S + seconds
            while time.monotonic() < end_s:
                for start in range(0, len(view), CHUNK_BYTES):
                    sock.sendall(view[start : start + CHUNK_BYTES])
        return {"bytes_per_s": 0.0}
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(json.dumps(server.getsockname()), flush=True)
        sock, _ = server.accept()
    start_s, begin_s, count = time.monotonic(), 0.0, 0
    view = memoryview(payload)
    at = 0
    with sock:
        # Into memory that goes on and on, as a payload's does.
        while received := sock.recv_into(view[at : at + CHUNK_BYTES]):
            at = (at + received) % len(view)
            now_s = time.monotonic()
            if begin_s:
                count, last_s = count + received, now_s
            elif now_s > start_s + WARM_UP_S:
                begin_s = now_s
    return {"bytes_per_s": count / (last_s - begin_s)}


class Payloads:
    """One end of our transport.

    Args:
        role: "learner" or "syncer".
        way: of payloads: "up", "down", "both".
        seconds: that count.
        payload: what is sent over and over.
    """

    def __init__(self, role: str, way: str, seconds: float, payload: bytearray) -> None:
        self._role, self._seconds, self._payload = role, seconds, payload
        self._is_sender = way == "both" or (way == "up") == (role == "learner")
        self._arrived: list[tuple[float, int]] = []
        """Looks: when, and how many bytes of payloads had arrived here."""
        self._sent_bytes = 0
        self._clock = Clock(time.thread_time)

    def run(self, keys: str, endpoint: str) -> dict[str, Any]:
        """Until the time is over; what was delivered of what this side sent."""
        from lightning_diloco.runtime.transport import SYNCER

        self._wrap_stages()
        transport = self._open(Path(keys) if keys else None, json.loads(endpoint or "null"))
        peer: bytes | None = SYNCER if self._role == "learner" else None
        start_s, is_going = None, False
        processor = time.process_time(), time.thread_time()
        while True:
            now_s = time.monotonic()
            if self._role == "learner" and not is_going:
                transport.send_control(SYNCER, b"go")
            for event in transport.poll(0.2):
                peer, is_end, is_going = self._take(event, peer, is_going)
                if is_end:
                    transport.close()
                    return self._row(start_s or now_s, processor)
            stats = transport.stats
            self._arrived.append((time.monotonic(), stats.bytes_down if self._role == "learner" else stats.bytes_up))
            if is_going and start_s is None:
                start_s, processor = time.monotonic(), (time.process_time(), time.thread_time())
                self._clock.spent_s.clear()
                for _ in range(2 if self._is_sender else 0):
                    assert peer is not None
                    transport.send_payload(peer, b"", self._payload)
            if self._role == "learner" and start_s is not None and now_s > start_s + WARM_UP_S + self._seconds:
                transport.send_control(SYNCER, b"end")
                row = self._row(start_s, processor)
                transport.poll(0.2)
                transport.close()
                return row

    def _take(self, event: Any, peer: bytes | None, is_going: bool) -> tuple[bytes | None, bool, bool]:
        """One event: the peer, whether this is the end, whether payloads go."""
        from lightning_diloco.runtime.transport import ControlReceived, PayloadDelivered, PayloadFailed

        if isinstance(event, ControlReceived):
            if self._role == "syncer" and event.data == b"go":
                self._transport.send_control(event.peer, b"go")
            return event.peer, event.data == b"end", True
        if isinstance(event, PayloadDelivered):
            self._sent_bytes += len(self._payload)
            self._transport.send_payload(event.peer, b"", self._payload)
        elif isinstance(event, PayloadFailed):
            raise RuntimeError(f"A payload failed: {event.reason}.")
        return peer, False, is_going

    def _open(self, keys: Path | None, endpoint: Any) -> Any:
        from lightning_diloco.runtime.transport import LearnerTransport, SyncerTransport

        if self._role == "syncer":
            more: dict[str, Any] = {}
            if keys is not None:
                from lightning_diloco.runtime.keys import SyncerKeys

                more = {"keys": SyncerKeys.read(keys / "syncer")}
            self._transport: Any = SyncerTransport(accept=lambda *_: True, **more)
            self._transport.bind()
            print(json.dumps([self._transport.control_endpoint, self._transport.bulk_endpoint]), flush=True)
        else:
            more = {}
            if keys is not None:
                from lightning_diloco.runtime.keys import SiteKeys

                more = {"configure": SiteKeys.read(keys / "site").configure}
            self._transport = LearnerTransport(endpoint[0], nonce=NONCE, accept=lambda *_: True, **more)
            self._transport.connect()
            self._transport.connect_bulk(endpoint[1])
        return self._transport

    def _wrap_stages(self) -> None:
        from lightning_diloco.runtime.blocks import Blocks
        from lightning_diloco.runtime.transport import base, receiving, sending

        self._clock.wrap(sending, "crc32", "checksum, sending")
        self._clock.wrap(receiving, "crc32", "checksum, receiving")
        self._clock.wrap(base, "send_parts", "hand to ZeroMQ")
        self._clock.wrap(base, "receive_parts", "take from ZeroMQ")
        self._clock.wrap(receiving.IncomingTransfers, "on_chunk", "copy into the payload")
        self._clock.wrap(Blocks, "view", "memory for the payload")

    def _row(self, start_s: float, processor: tuple[float, float]) -> dict[str, Any]:
        if not self._arrived[-1][1] and not self._sent_bytes:
            raise RuntimeError(f"Nothing passed: {self._transport.stats}.")
        (first_s, first), *_, (last_s, last) = [look for look in self._arrived if look[0] > start_s + WARM_UP_S]
        process_s, thread_s = time.process_time() - processor[0], time.thread_time() - processor[1]
        stages = dict(self._clock.spent_s)
        stages["the rest of its thread"] = thread_s - sum(stages.values())
        stages["ZeroMQ's thread"] = process_s - thread_s
        return {
            "bytes_per_s": (last - first) / (last_s - first_s),
            "passed_bytes": self._sent_bytes + last,
            "stages_s": stages,
            "wall_s": time.monotonic() - start_s,
        }


# ---- the report -------------------------------------------------------------------------------------------------------------


def report(rows: list[dict[str, Any]], kinds: list[str]) -> int:
    """Print the tables; 1 if an aim is missed."""
    missed, lines = [], []
    for kind in ("tcp", *kinds):
        rates = [row["bytes_per_s"] / 1e9 for row in rows if row["kind"] == kind]
        shares = [share(rows, i) for i, row in enumerate(rows) if row["kind"] == kind != "tcp"]
        text = f"{statistics.mean(shares):.1%} ({min(shares):.1%}, {max(shares):.1%})" if shares else "-"
        name = rows[0]["options"]["reference"] if kind == "tcp" else kind
        lines.append([name, str(len(rates)), f"{statistics.median(rates):.2f} ({min(rates):.2f}, {max(rates):.2f})", text])
        aim = MIN_SHARE_KEYS if kind.endswith("keys") else MIN_SHARE
        if shares and not kind.startswith("both") and statistics.mean(shares) < aim:
            missed.append(f"{kind}: {statistics.mean(shares):.1%}, aim {aim:.0%}")
    print(table(["kind", "measured", "GB/s (least, largest)", "of `tcp` (least, largest)"], lines))
    print("\nProcessor time for a GB, ms:\n")
    profile = []
    names = list(dict.fromkeys(stage for row in rows for side in row.get("sides", {}).values() for stage in side.get("stages_s", {})))
    for kind in kinds:
        for side in ("learner", "syncer"):
            sides = [row["sides"][side] for row in rows if row["kind"] == kind]
            gb = sum(s["passed_bytes"] for s in sides) / 1e9
            cells = [1e3 * sum(s["stages_s"].get(name, 0.0) for s in sides) / gb for name in names]
            busy = sum(sum(s["stages_s"].values()) for s in sides) / sum(s["wall_s"] for s in sides)
            profile.append([f"{kind}: {side}", *(f"{cell:.0f}" for cell in cells), f"{sum(cells):.0f}", f"{busy:.0%}"])
    print(table(["", *names, "all", "of its core"], profile))
    if missed:
        print(f"\nMISSED: {'; '.join(missed)}")
    return 1 if missed else 0


def share(rows: list[dict[str, Any]], i: int) -> float:
    """A measurement over the mean of the streams before and after it."""
    return float(rows[i]["bytes_per_s"] / statistics.mean(rows[j]["bytes_per_s"] for j in (i - 1, i + 1)))


if __name__ == "__main__":
    sys.exit(main())
