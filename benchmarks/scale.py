"""Many learners and one syncer: rounds per second, how long control waits for its answer, and whether somebody is left out.

    .venv/bin/python benchmarks/scale.py [--learners 64] [--step-ms 1000 500 250] [--quorum 32] [--seconds 60] [--json FILE]

The syncer is a process on one core, over real sockets. The learners are real `LearnerClient`s, each with its background thread, its sockets
and a small module of its own (64 thousand parameters in 24 fragments), in `--processes` processes on the other core. They do not train: an
inner step is a small random change of the module, `LearnerClient.boundary`, and sleep. H = P = 24, so that one round is due in each step.

| figure | what | aim |
|---|---|---|
| rounds per second | merges over the time that counts | 0.9 of what is due, one a step |
| control | from a learner's `Ping` to the answer's arrival at that learner | p99 within 250 ms |
| participation | of the least favoured learner, over the mean of all | at least 0.9 |
| members | mean of a merge | none |

With 64 learners on one core the learners' side is the busier one; the last columns say how busy both were. The aims are judged for the
longest of the steps: shorter ones show where it ends. The exit code is 1 if an aim is missed. Rows that the JSON file holds are not run
again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.recipe_rows import table  # noqa: E402
from benchmarks.row_file import read_rows, write_rows  # noqa: E402
from benchmarks.syncer_process import running_syncer  # noqa: E402
from benchmarks.wan.jobs import processor_s  # noqa: E402
from benchmarks.wan.report import ANSWER_S, p99  # noqa: E402

FRAGMENTS, WIDTH, TOKENS = 24, 51, 100
"""24 matrices of 51 x 51."""
WARM_UP_STEPS = 24
MIN_ROUNDS, MIN_PARTICIPATION = 0.9, 0.9


def main() -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learners", type=int, default=64, help="default 64")
    parser.add_argument("--processes", type=int, default=4, help="that they live in (default 4)")
    parser.add_argument("--step-ms", nargs="+", type=int, default=[1000, 500, 250], help="length of a step (default 1000 500 250)")
    parser.add_argument("--quorum", type=int, default=32, help="min_quorum (default 32)")
    parser.add_argument("--seconds", type=float, default=60.0, help="that count of each length (default 60)")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "scale.json", metavar="FILE", help="rows so far")
    parser.add_argument("--process", nargs=4, metavar=("ENDPOINT", "FIRST", "COUNT", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        live(arguments)
        return 0
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that processes end with this one
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two cores are needed: one for the syncer, one for the learners.")
    rows: dict[str, Any] = read_rows(arguments.json, {})
    names = {f"{arguments.learners} learners, quorum {arguments.quorum}, {ms} ms, {arguments.seconds:g} s": ms for ms in arguments.step_ms}
    for name, ms in names.items():
        if name not in rows:
            print(f"... {name}", flush=True)
            rows[name] = run(arguments, ms)
            write_rows(arguments.json, rows, indent=None)
    return report([rows[name] for name in names])


def run(arguments: argparse.Namespace, step_ms: int) -> dict[str, Any]:
    """One length of a step."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_scale_") as folder:
        run_dir, children = Path(folder) / "run", list[subprocess.Popen[bytes]]()
        with running_syncer(run_dir, core=cores[1]) as (syncer, endpoint):
            try:
                share = -(-arguments.learners // arguments.processes)
                for first in range(0, arguments.learners, share):
                    told = [endpoint, str(first), str(min(share, arguments.learners - first)), str(Path(folder) / f"row_{first}.json")]
                    learner = ["taskset", "-c", str(cores[0]), sys.executable, __file__, "--process", *told]
                    learner += ["--learners", str(arguments.learners), "--quorum", str(arguments.quorum), "--step-ms", str(step_ms)]
                    learner += ["--processes", str(arguments.processes), "--seconds", str(arguments.seconds)]
                    children.append(subprocess.Popen(learner, cwd=folder))
                spent_s = watch(syncer, children, Path(folder), arguments.seconds)
            finally:
                for child in children:
                    child.kill()
                    child.wait()
        rows = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("row_*.json"))]
        summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "step_s": step_ms / 1e3,
        "rounds_per_s": statistics.mean(rate for row in rows for rate in row["rounds_per_s"]),
        "steps_per_s": statistics.mean(row["steps_per_s"] for row in rows),
        "answers_s": [round(answer_s, 5) for row in rows for answer_s in row["answers_s"]],
        "participation": [learner["participation"] for learner in summary["learners"]],
        "mean_members": summary["mean_members"],
        "syncer_busy": spent_s / arguments.seconds,
        "learners_busy": sum(row["busy"] for row in rows),
    }


def watch(syncer: subprocess.Popen[bytes], children: list[subprocess.Popen[bytes]], folder: Path, seconds: float) -> float:
    """Until all have ended; returns the syncer's processor time of the time that counts."""
    begin_s, before_s, spent_s = None, 0.0, 0.0
    while syncer.poll() is None:
        if any(child.poll() for child in children):
            raise SystemExit("A process of learners failed.")
        if begin_s is None and (folder / "counting").exists():
            begin_s, before_s = time.monotonic(), processor_s(syncer.pid)
        if begin_s is not None and time.monotonic() < begin_s + seconds:
            spent_s = processor_s(syncer.pid) - before_s
        time.sleep(0.1)
    return spent_s


# ---- a process of learners --------------------------------------------------------------------------------------------------


def live(arguments: argparse.Namespace) -> None:
    """Join with all learners of this process, take steps, leave, write the row."""
    import torch
    import zmq
    from torch import nn

    from benchmarks.wan.watch import Watch
    from lightning_diloco.config import SyncConfig
    from lightning_diloco.runtime.client import ClientOptions, LearnerClient

    torch.set_num_threads(1)
    endpoint, first, count, out = arguments.process[0], *map(int, arguments.process[1:3]), Path(arguments.process[3])
    config = SyncConfig(
        num_fragments=FRAGMENTS,
        sync_interval_steps=24,
        min_quorum=arguments.quorum,
        heartbeat_s=0.5,
        drain_timeout_s=60.0,
        norm_gate=None,  # a random change is no training
    )
    torch.manual_seed(0)
    context: zmq.Context[Any] = zmq.Context()
    modules = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(FRAGMENTS))) for _ in range(count)]
    options = [ClientOptions(endpoint=endpoint, config=config, learner_id=first + i, join_timeout_s=300.0) for i in range(count)]
    clients = [LearnerClient(module, option, context=context) for module, option in zip(modules, options, strict=True)]
    together([client.join for client in clients])
    (out.parent / f"joined_{first}").touch()
    share = -(-arguments.learners // arguments.processes)
    while len(list(out.parent.glob("joined_*"))) < -(-arguments.learners // share):
        time.sleep(0.05)
    watches = [Watch(client) for client in clients]
    row = take_steps(arguments, list(zip(clients, modules, strict=True)), out)
    asked_s = row.pop("begin_s")
    row["answers_s"] = [seconds for watch in watches for at_s, seconds in watch.rest()["answers"] if at_s > asked_s]
    together([lambda client=client: client.leave("limit") for client in clients])
    for client in clients:
        client.close()
    out.write_text(json.dumps(row))


def take_steps(arguments: argparse.Namespace, learners: list[tuple[Any, Any]], out: Path) -> dict[str, Any]:
    """Steps of all learners in turns, at their pace; the figures of the time that counts."""
    import torch

    step_s = arguments.step_ms[0] / 1e3
    last = WARM_UP_STEPS + max(1, round(arguments.seconds / step_s))
    merges, begin_s, busy_s = [0] * len(learners), 0.0, 0.0
    start_s = time.monotonic()
    for step in range(last):
        if step == WARM_UP_STEPS:
            (out.parent / "counting").touch()
            merges = [client.figures.merges for client, _ in learners]
            begin_s, busy_s = time.monotonic(), time.process_time()
        for i, (client, module) in enumerate(learners):
            # Spread over the step: learners of different sites do not step at the same moment.
            time.sleep(max(0.0, start_s + (step + i / len(learners)) * step_s - time.monotonic()))
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)
            client.boundary(tokens=TOKENS)
    counted_s = time.monotonic() - begin_s
    return {
        "begin_s": begin_s,
        "rounds_per_s": [(client.figures.merges - before) / counted_s for (client, _), before in zip(learners, merges, strict=True)],
        "steps_per_s": (last - WARM_UP_STEPS) / counted_s,
        "busy": (time.process_time() - busy_s) / counted_s,
    }


def together(calls: list[Any]) -> None:
    """Make all calls at once, each on a thread; raises what one of them raised."""
    errors: list[BaseException] = []

    def call(function: Any) -> None:
        """Keep the error."""
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=call, args=(function,)) for function in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# ---- the report -------------------------------------------------------------------------------------------------------------


def report(rows: list[dict[str, Any]]) -> int:
    """Print the table; 1 if an aim is missed."""
    lines, missed = [], []
    for row in rows:
        known = [0.0 if p is None else p for p in row["participation"]]
        fairness, due = min(known) / statistics.mean(known), 1 / row["step_s"]
        slowest_s = p99(row["answers_s"])
        lines.append(
            [
                f"{1e3 * row['step_s']:.0f}",
                f"{row['rounds_per_s']:.2f} ({due:.2f}, {row['steps_per_s']:.2f})",
                f"{len(row['answers_s'])}",
                f"{1e3 * statistics.median(row['answers_s']):.0f}, {1e3 * slowest_s:.0f}",
                f"{min(known):.3f}, {statistics.mean(known):.3f} ({fairness:.2f})",
                f"{row['mean_members']:.1f}",
                f"{row['syncer_busy']:.0%}, {row['learners_busy']:.0%}",
            ]
        )
        misses = {
            "rounds": row["rounds_per_s"] < MIN_ROUNDS * due,
            "control": slowest_s > ANSWER_S,
            "fairness": fairness < MIN_PARTICIPATION,
        }
        if row["step_s"] == max(other["step_s"] for other in rows):
            missed += [title for title, is_missed in misses.items() if is_missed]
    header = ["step, ms", "rounds/s (due, steps/s)", "answers", "median, p99, ms", "participation: least, mean (ratio)"]
    print(table([*header, "members", "cores: syncer, learners"], lines))
    if missed:
        print(f"\nMISSED: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
