"""Simulate 8 learners through 10,000 rounds and say, as JSON, what it took: run by a test, or by hand with the number of repetitions."""

from __future__ import annotations

import hashlib
import json
import sys
import time

from lightning_diloco.config import SyncConfig
from lightning_diloco.sim import SimLearner, SimOptions, simulate

ROUNDS = 10_000


def options(rounds: int = ROUNDS, seed: int = 7) -> SimOptions:
    """At P = H one round falls due per inner step of the fastest learner, which takes a second."""
    return SimOptions(
        config=SyncConfig(num_fragments=24, sync_interval_steps=24, heartbeat_s=10.0),
        learners=tuple(SimLearner(step_s=1.0 + 0.02 * i, jitter=0.05) for i in range(8)),
        stop_at_s=float(rounds),
        seed=seed,
    )


def main(repetitions: int) -> int:
    """Exit code 0 if every repetition gave the same bytes, finished, and left nothing pending."""
    started_s = time.process_time()
    results = [simulate(options())]
    cpu_s = time.process_time() - started_s
    results += [simulate(options()) for _ in range(repetitions - 1)]
    digests = sorted({hashlib.sha256(result.trace).hexdigest() for result in results})
    first = results[0]
    report = {"merges": first.merges, "cpu_s": cpu_s, "events": first.num_events, "bytes": len(first.trace), "sha256": digests}
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if len(digests) == 1 and first.status == "finished" and not first.pending else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2))
