"""Do the others notice when one is killed? The longest distance between two ends of steps of survivors, around 20 kills.

    .venv/bin/python benchmarks/survivors.py [--kills 20] [--step-ms 50] [--json FILE]

Learners 0 and 1 survive. They are pinned to one core, all their threads; learner 2, the syncer, and everything that is started again is
pinned to the other one. In turns learner 2 and the syncer are killed (SIGKILL). The syncer is started again as in `Trainer(devices=N)`,
learner 2 by this script (`storm/cluster.py`); the next kill waits until all three are merged again. A step's end is noted in the survivor
itself, after everything that a step does (`storm/steps.py`).

For each kill and survivor:

| figure | what |
|---|---|
| median | of the last 100 steps before the kill |
| gap | longest distance between two ends of steps within 10 s after the kill, the step during which it came included |
| limit | twice the median, or the median + 50 ms, whichever is more |
| calm | the longest distance in the 10 s before the kill, when nothing happened: what the machine does by itself |

The exit code is 1 if a gap is above its limit.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.row_file import write_rows  # noqa: E402
from benchmarks.storm.cluster import Cluster, Job  # noqa: E402
from benchmarks.storm.faults import is_serving  # noqa: E402
from benchmarks.storm.steps import longest_gap_s  # noqa: E402

SURVIVORS = (0, 1)
VICTIM = 2
WINDOW_S = 10.0
MEDIAN_STEPS = 100


def main() -> int:
    """Kill, measure, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="half of them of a learner, half of the syncer (default 20)")
    parser.add_argument("--step-ms", type=float, default=50.0, help="shortest length of a step (default 50)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("two cores are needed: one for the survivors, one for what is started again.")
    logging.basicConfig(level=logging.ERROR)
    os.sched_setaffinity(0, {cores[1]})  # what is started by this process inherits it
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_survivors_") as folder:
        job = Job(
            folder=Path(folder),
            step_s=arguments.step_ms / 1e3,
            on_start=lambda learner_id, child: os.sched_setaffinity(child.pid, {cores[0] if learner_id in SURVIVORS else cores[1]}),
        )
        rows = run(Cluster(job), arguments.kills)
    if arguments.json is not None:
        write_rows(arguments.json, rows)
    return report(rows)


def run(cluster: Cluster, num_kills: int) -> list[dict[str, Any]]:
    """Kill in turns, and measure at the end: to read the files meanwhile would be load of its own."""
    kills: list[tuple[str, float]] = []
    try:
        cluster.start(len(SURVIVORS) + 1)
        for number in range(num_kills):
            pause(cluster, WINDOW_S + 2.0)
            kind = ("learner", "syncer")[number % 2]
            child = cluster.syncer.child if kind == "syncer" else cluster.learners[VICTIM].child
            assert child is not None
            kills.append((kind, time.monotonic()))
            child.signal_group(signal.SIGKILL)
            cluster.wait(lambda: child.poll() is not None, "the end of a killed process")  # noqa: B023 - called at once
            pause(cluster, WINDOW_S)
            cluster.wait(lambda: is_whole(cluster), "a merge of all after a kill")
        cluster.finish()
    finally:
        cluster.kill()
    ends = {learner: cluster.steps(learner, 0) for learner in SURVIVORS}
    return [measure(kind, at_s, learner, ends[learner]) for kind, at_s in kills for learner in SURVIVORS]


def pause(cluster: Cluster, seconds: float) -> None:
    """Look after the processes for a while."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        cluster.turn()


def is_whole(cluster: Cluster) -> bool:
    """Whether the syncer serves, and every learner's present life is in a merge of the last five seconds."""
    newest = [cluster.tape.merged.get(item, 0.0) for item in cluster.tape.members.items()]
    return is_serving(cluster) and len(newest) == len(SURVIVORS) + 1 and min(newest) > time.monotonic() - 5.0


def measure(kind: str, at_s: float, learner: int, ends: list[float]) -> dict[str, Any]:
    """One row: a kill and a survivor. Times in seconds."""
    before = [end_s for end_s in ends if end_s <= at_s][-MEDIAN_STEPS - 1 :]
    median_s = statistics.median(b - a for a, b in zip(before, before[1:], strict=False))
    return {
        "kill": kind,
        "survivor": learner,
        "median_s": median_s,
        "gap_s": longest_gap_s(ends, at_s, at_s + WINDOW_S),
        "limit_s": max(2.0 * median_s, median_s + 0.05),
        "calm_s": longest_gap_s(ends, at_s - WINDOW_S, at_s),
    }


def report(rows: list[dict[str, Any]]) -> int:
    """Print the table; returns 1 if a gap is above its limit."""
    missed = [row for row in rows if row["gap_s"] is None or row["gap_s"] > row["limit_s"]]
    print("| kill of | survivor | median, ms | longest gap, ms | limit, ms | longest before, ms | |\n" + "|---" * 7 + "|")
    for row in rows:
        figures = " | ".join(f"{1e3 * (row[name] or 0.0):.1f}" for name in ("median_s", "gap_s", "limit_s", "calm_s"))
        print(f"| {row['kill']} | {row['survivor']} | {figures} | {'**above**' if row in missed else ''} |")
    print("\n| kill of | kills | above the limit | longest gap, ms | longest gap / limit | longest before, ms |\n" + "|---" * 6 + "|")
    for kind in ("learner", "syncer"):
        part = [row for row in rows if row["kill"] == kind]
        if part:
            gap_s, calm_s = (max(row[name] or 0.0 for row in part) for name in ("gap_s", "calm_s"))
            share = max((row["gap_s"] or 0.0) / row["limit_s"] for row in part)
            above = sum(row in missed for row in part)
            print(f"| {kind} | {len(part) // len(SURVIVORS)} | {above} | {1e3 * gap_s:.1f} | {share:.2f} | {1e3 * calm_s:.1f} |")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
