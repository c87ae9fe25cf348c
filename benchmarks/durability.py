"""What snapshots, the tape and kept payloads cost: throughput of a learner, and how late a publication is.

    .venv/bin/python benchmarks/durability.py [--params 25] [--rounds N] [--seconds S] [--interval S] [--json FILE]

One learner is pinned to one core and the syncer to another one, as in `stall.py`. Three kinds of jobs in turns, `--rounds` times each:

| kind | tape | snapshots | payloads |
|---|---|---|---|
| `none` | a link to /dev/null | only that of the founding | not kept |
| `default` | on the disk | every `--interval` seconds (the strategy's default is 30) | not kept |
| `payloads` | on the disk | the same | kept (`tape_payloads=True`) |

Each job is a process pair of its own; its first steps, with the founding's snapshot, are left out. Throughput is that of a job over the
mean of the `none` jobs before and after it, so that the machine's slow drift falls out; aim: at least 0.99. The delay of a publication is
from the moment at which the learner hands a contribution to its socket to the moment at which the version with it is decoded: over all
jobs of a kind, the 99th percentile against that of `none`; aim: at most 5 ms more. Every job's delays are kept, and the spread of the
jobs' own 99th percentiles says how far that figure can be trusted.

The exit code is 1 if an aim is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.recipe_rows import table  # noqa: E402
from benchmarks.stall import MODELS, QUIET, job  # noqa: E402

KINDS = ("none", "default", "payloads")
WARM_UP_S = 6.0
"""Left out at the start of a job."""
MIN_SHARE, MAX_LATER_S = 0.99, 0.005


def main() -> int:
    """Run the jobs in turns, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, choices=list(MODELS), default=25, help="millions of parameters (default 25)")
    parser.add_argument("--rounds", type=int, default=4, help="jobs of each kind (default 4)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a job that count (default 30)")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between two snapshots (default 10)")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "durability.json", metavar="FILE", help="jobs so far")
    parser.add_argument("--learner", nargs=3, metavar=("ENDPOINT", "OUT", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.learner:
        endpoint, out, kind = arguments.learner
        learn(endpoint, Path(out), kind, arguments)
        return 0
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least 1.")
    jobs: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    options = {"params": arguments.params, "seconds": arguments.seconds, "interval": arguments.interval}
    if any(row["options"] != options for row in jobs):
        parser.error(f"{arguments.json} holds jobs of other options than {options}. Give another file.")
    # `none` stands first and last, so that every other job has one on both sides.
    order = [kind for _ in range(arguments.rounds) for other in KINDS[1:] for kind in ("none", other)] + ["none"]
    for kind in order[len(jobs) :]:
        jobs.append({"options": options, **run(kind, arguments)})
        print(f"... {kind}: {jobs[-1]['steps_per_s']:.2f} steps/s, {len(jobs[-1]['delays_s'])} publications", flush=True)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(jobs) + "\n")
    return report(jobs)


def run(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One job: a syncer and a learner, each on its core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("Two cores are needed: one for the learner, one for the syncer.")
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_durability_") as folder:
        run_dir, out = Path(folder) / "run", Path(folder) / "row.json"
        run_dir.mkdir()
        if kind == "none":
            (run_dir / "tape.jsonl").symlink_to("/dev/null")
        command = ["taskset", "-c", str(cores[1]), sys.executable, "-m", "lightning_diloco", "syncer", "--run-dir", str(run_dir)]
        syncer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
        try:
            assert syncer.stdout is not None
            found = re.search(r"tcp://[\d.:]+", syncer.stdout.readline())
            if found is None:
                raise SystemExit("The syncer did not say its address.")
            learner = ["taskset", "-c", str(cores[0]), sys.executable, __file__, "--learner", found.group(), str(out), kind]
            learner += ["--params", str(arguments.params), "--seconds", str(arguments.seconds), "--interval", str(arguments.interval)]
            subprocess.run(learner, check=True, cwd=folder, stdout=subprocess.DEVNULL)
            row: dict[str, Any] = json.loads(out.read_text())
        finally:
            syncer.kill()
            syncer.wait()
    return {"kind": kind, **row}


def learn(endpoint: str, out: Path, kind: str, arguments: argparse.Namespace) -> None:
    """The learner's process: train, measure, write the row."""
    from lightning.pytorch import Callback, Trainer

    from lightning_diloco import DecoupledDiLoCoStrategy

    module, data = job(arguments.params)
    interval_s = 1e6 if kind == "none" else arguments.interval
    strategy = DecoupledDiLoCoStrategy(syncer=endpoint, snapshot_interval_s=interval_s, tape_payloads=kind == "payloads")
    watch = Watch(arguments.seconds)

    class Watching(Callback):
        """Hands the hooks on."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            watch.start(strategy._outer_sync._client._loop)

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = watch.step_ended()

    trainer = Trainer(strategy=strategy, callbacks=[Watching()], max_steps=10**6, **QUIET)
    trainer.fit(module, datamodule=data)
    out.write_text(json.dumps(watch.row()))


class Watch:
    """Counts steps of the time that counts, and times each contribution until the version with it is decoded."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._start_s = 0.0
        self._ends: list[float] = []
        self._sent: dict[tuple[int, int], float] = {}
        self._delays: list[tuple[float, float]] = []

    def start(self, loop: Any) -> None:
        """Put clocks around what the learner's background thread sends and decodes."""
        from lightning_diloco.protocol.actions import Decode, SendContribution

        do, self._start_s = loop._do, time.monotonic()

        def timed(action: Any) -> None:
            """The same, with its time."""
            if isinstance(action, SendContribution):
                self._sent.setdefault((action.header.fragment_id, action.header.seq), time.monotonic())
            do(action)
            if isinstance(action, Decode):
                sent_s = self._sent.pop((action.fragment_id, action.with_contribution), None)
                if sent_s is not None:
                    self._delays.append((sent_s, time.monotonic() - sent_s))

        loop._do = timed

    def step_ended(self) -> bool:
        """The end of an inner step; whether the time is over."""
        self._ends.append(time.monotonic())
        return self._ends[-1] > self._start_s + WARM_UP_S + self._seconds

    def row(self) -> dict[str, Any]:
        """The figures of the time that counts."""
        ends = [end_s for end_s in self._ends if end_s > self._start_s + WARM_UP_S]
        delays = [delay_s for sent_s, delay_s in self._delays if sent_s > self._start_s + WARM_UP_S]
        return {"steps_per_s": (len(ends) - 1) / (ends[-1] - ends[0]), "delays_s": delays}


def p99(values: list[float]) -> float:
    """99th percentile: the smallest value that 99 of 100 do not exceed."""
    return sorted(values)[-(-99 * len(values) // 100) - 1]


def report(jobs: list[dict[str, Any]]) -> int:
    """Print the table; 1 if an aim is missed."""
    delays = {kind: [d for row in jobs if row["kind"] == kind for d in row["delays_s"]] for kind in KINDS}
    base_s, missed = p99(delays["none"]), []
    header = ["kind", "jobs", "throughput over `none` (least, largest)", "publications", "delay, median, ms", "p99, ms", "p99 by job, ms"]
    lines = []
    for kind in KINDS:
        of_kind = [row for row in jobs if row["kind"] == kind]
        shares = [share(jobs, i) for i, row in enumerate(jobs) if row["kind"] == kind and 0 < i < len(jobs) - 1]
        later_s = p99(delays[kind]) - base_s
        by_job = ", ".join(f"{1e3 * p99(row['delays_s']):.1f}" for row in of_kind)
        spread = f"{statistics.mean(shares):.3f} ({min(shares):.3f}, {max(shares):.3f})"
        times = [f"{1e3 * statistics.median(delays[kind]):.1f}", f"{1e3 * p99(delays[kind]):.1f} ({1e3 * later_s:+.1f})", by_job]
        lines.append([f"`{kind}`", str(len(of_kind)), spread, str(len(delays[kind])), *times])
        if kind != "none" and (statistics.mean(shares) < MIN_SHARE or later_s > MAX_LATER_S):
            missed.append(kind)
    print(table(header, lines))
    if missed:
        print(f"\nMISSED: {', '.join(missed)}")
    return 1 if missed else 0


def share(jobs: list[dict[str, Any]], i: int) -> float:
    """Throughput of a job over that of the nearest `none` jobs before and after it."""
    before = next(row["steps_per_s"] for row in reversed(jobs[:i]) if row["kind"] == "none")
    after = next(row["steps_per_s"] for row in jobs[i + 1 :] if row["kind"] == "none")
    return float(jobs[i]["steps_per_s"] / ((before + after) / 2))


if __name__ == "__main__":
    sys.exit(main())
