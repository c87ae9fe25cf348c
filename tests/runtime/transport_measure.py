"""Measures the transport on loopback: ``python -m tests.runtime.transport_measure``.

The syncer is a process of its own. Control round trips are taken one after the other while 64 MiB payloads pass both ways without
a pause; the throughput is that of the same time, both ways together.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning_diloco.runtime.transport import SYNCER, ControlReceived, LearnerTransport, PayloadDelivered
from tests.runtime.transport_helpers import MIB, NONCE, accept_all


@dataclass(frozen=True)
class LoadMeasurement:
    """Round trips in seconds, sorted, and what passed meanwhile."""

    round_trips_s: list[float]
    bytes_up: int
    bytes_down: int
    duration_s: float

    def quantile_s(self, share: float) -> float:
        return self.round_trips_s[min(len(self.round_trips_s) - 1, int(share * len(self.round_trips_s)))]

    def __str__(self) -> str:
        p50, p99, longest = (1000 * self.quantile_s(share) for share in (0.5, 0.99, 1.0))
        rate = (self.bytes_up + self.bytes_down) / self.duration_s / 1e9
        return f"{len(self.round_trips_s)} round trips: p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {longest:.1f} ms; {rate:.2f} GB/s"


@contextmanager
def joined(mode: str) -> Iterator[tuple[subprocess.Popen[str], LearnerTransport]]:
    """A syncer in a process of its own (see `transport_peer`) and a learner here."""
    command = [sys.executable, "-m", "tests.runtime.transport_peer", mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            control, bulk = process.stdout.readline().split()
            learner = LearnerTransport(control, nonce=NONCE, accept=accept_all)
            learner.connect()
            learner.connect_bulk(bulk)
            yield process, learner
            learner.close()
        finally:
            process.kill()


def measure_under_load(num_round_trips: int) -> LoadMeasurement:
    payload = bytes(64 * MIB)
    round_trips_s: list[float] = []
    with joined("echo") as (process, learner):
        learner.send_payload(SYNCER, b"up", payload)
        start_s = sent_s = time.monotonic()
        learner.send_control(SYNCER, b"0")
        is_loaded = False
        while len(round_trips_s) < num_round_trips:
            assert time.monotonic() < start_s + 60, learner.stats
            for event in learner.poll(1.0):
                if isinstance(event, PayloadDelivered):
                    learner.send_payload(SYNCER, b"up", payload)
                if isinstance(event, ControlReceived):
                    if is_loaded:
                        round_trips_s.append(time.monotonic() - sent_s)
                    is_loaded = min(learner.stats.bytes_up, learner.stats.bytes_down) > 8 * MIB
                    sent_s = time.monotonic()
                    learner.send_control(SYNCER, b"%d" % len(round_trips_s))
        duration_s = time.monotonic() - start_s
        learner.send_control(SYNCER, b"stop")
        learner.poll(0.1)
        process.wait(10)
        return LoadMeasurement(sorted(round_trips_s), learner.stats.bytes_up, learner.stats.bytes_down, duration_s)


if __name__ == "__main__":
    sys.stdout.write(f"{measure_under_load(1000)}\n")
