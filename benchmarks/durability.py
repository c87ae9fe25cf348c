"""What snapshots, the tape and kept payloads cost: throughput of a learner, and how late a publication is, with them and without in turns.

    .venv/bin/python benchmarks/durability.py [--kinds disk payloads] [--params 25] [--blocks N] [--interval S] [--json FILE]

One learner is pinned to one core and the syncer to another one, as in `stall.py`. What is written is switched on and off in turns, in
blocks of one run, so that a block is compared with those around it and the machine's slow drift falls out. On, a snapshot begins with the
block and every `--interval` seconds after it, ten times as often as by default, and the tape is flushed twice a second; off, there is no
snapshot and the tape waits in memory. `payloads` is a run with `tape_payloads=True` that keeps them too while it is on; that is no
default, and no aim holds for it. The first steps of a run, and of every block, are left out: a snapshot of the block before, and the tape
that has waited, are written then.

| figure | what |
|---|---|
| on / off | inner steps per second of a block over those of the blocks around it: median, quartiles; aim: at least 0.99 |
| delay | from the moment at which the learner hands a contribution to its socket to that at which the version with it is decoded |
| p99 later by | 99th percentile of the delays with it, less that without |
| ... by default | the same of a mixture, in which delays with it have the share of `--interval` in the strategy's 30 s; aim: at most 5 ms |

The range of "later by" holds 90 of 100 figures that come of drawing as many blocks with replacement. An aim whose range reaches over both
sides of it is not decided, and said to be so. The exit code is 1 if an aim is missed or not decided.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.recipe_rows import table  # noqa: E402
from benchmarks.row_file import read_rows, write_rows  # noqa: E402
from benchmarks.stall import MODELS, QUIET, job, on_over_off  # noqa: E402
from lightning_diloco.config import SyncConfig  # noqa: E402

KINDS = ("disk", "payloads")
WARM_UP_STEPS, SKIPPED_STEPS, BLOCK_STEPS = 60, 6, 30
"""Inner steps: of the run and of a block that are left out, and of a whole block."""
MIN_SHARE, MAX_LATER_S = 0.99, 0.005
DRAWS = 1000


def main() -> int:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: both")
    parser.add_argument("--params", type=int, choices=list(MODELS), default=25, help="millions of parameters (default 25)")
    parser.add_argument("--blocks", type=int, default=20, help="blocks with and as many without, at least 3 (default 20)")
    parser.add_argument("--interval", type=float, default=3.0, help="seconds between two snapshots (default 3)")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "durability.json", metavar="FILE", help="rows so far")
    parser.add_argument("--learner", nargs=4, metavar=("ENDPOINT", "OUT", "KIND", "PID"), help=argparse.SUPPRESS)
    parser.add_argument("--syncer", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.blocks < 3:
        parser.error(f"--blocks {arguments.blocks}: at least 3, so that there are two with others around them.")
    if arguments.interval <= 0:
        parser.error(f"--interval {arguments.interval:g}: give seconds above 0, for example 3.")
    if arguments.syncer:
        serve(arguments.syncer, arguments.interval)
        return 0
    if arguments.learner:
        endpoint, out, kind, pid = arguments.learner
        learn(endpoint, Path(out), kind, int(pid), arguments)
        return 0
    rows: dict[str, Any] = read_rows(arguments.json, {})
    for kind in arguments.kinds:
        name = f"{kind}, {arguments.params} M, {arguments.interval:g} s, {arguments.blocks} blocks"
        if name not in rows:
            rows[name] = run(kind, arguments)
            write_rows(arguments.json, rows, indent=None)
    return report(rows)


def run(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run: a syncer and a learner, each on its core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("Two cores are needed: one for the learner, one for the syncer.")
    same = ["--params", str(arguments.params), "--blocks", str(arguments.blocks), "--interval", str(arguments.interval)]
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_durability_") as folder:
        run_dir, out = Path(folder) / "run", Path(folder) / "row.json"
        command = [sys.executable, __file__, "--syncer", str(run_dir), *same]
        syncer = subprocess.Popen(["taskset", "-c", str(cores[1]), *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert syncer.stdout is not None
            endpoint = syncer.stdout.readline().strip()
            if not endpoint:
                raise SystemExit("The syncer ended before it had said its address; what it wrote stands above.")
            learner = [sys.executable, __file__, "--learner", endpoint, str(out), kind, str(syncer.pid), *same]
            subprocess.run(["taskset", "-c", str(cores[0]), *learner], check=True, cwd=folder, stdout=subprocess.DEVNULL)
            row: dict[str, Any] = json.loads(out.read_text())
            row |= {"snapshots": int(syncer.stdout.readline()), "share": min(1.0, arguments.interval / SyncConfig().snapshot_interval_s)}
        finally:
            syncer.kill()
            syncer.wait()
    return row


def serve(run_dir: Path, interval_s: float) -> None:
    """The syncer's process: SIGUSR1 switches what it writes on, SIGUSR2 off. Prints its address, and at the end its snapshots."""
    import torch

    from lightning_diloco.runtime.alone import LoneSyncer
    from lightning_diloco.runtime.service import ServiceOptions

    torch.set_num_threads(1)
    run_dir.mkdir()
    lone = LoneSyncer(ServiceOptions(run_dir=run_dir), time.monotonic())
    endpoint = lone.bind()
    performer, tape = lone.service._performer, lone.service._tape
    keeper, kept, thread = performer.keeper, performer.payloads, None

    def off(*_: object) -> None:
        """No snapshot is due, the tape waits, payloads are not kept."""
        nonlocal thread
        keeper._interval_s = keeper._due_s = 1e12
        tape.flush_if_due = lambda now_s: None  # type: ignore[method-assign]
        thread, kept._thread = kept._thread or thread, None

    def on(*_: object) -> None:
        """All of it, from now on."""
        keeper._interval_s, keeper._due_s, kept._thread = interval_s, 0.0, thread
        vars(tape).pop("flush_if_due", None)

    signal.signal(signal.SIGUSR1, on)
    signal.signal(signal.SIGUSR2, off)
    print(endpoint, flush=True)
    lone.run()
    print(keeper.num_written, flush=True)


def learn(endpoint: str, out: Path, kind: str, pid: int, arguments: argparse.Namespace) -> None:
    """The learner's process: train, switch, measure, write the row."""
    from lightning.pytorch import Callback, Trainer

    from lightning_diloco import DecoupledDiLoCoStrategy

    module, data = job(arguments.params)
    strategy = DecoupledDiLoCoStrategy(syncer=endpoint, tape_payloads=kind == "payloads")
    watch = Watch(pid)

    class Watching(Callback):
        """Hands the hooks on."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            watch.start(strategy._outer_sync._client._loop)

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            watch.step_ended()

    # Off first and last, so that every block with it has one without on both sides.
    num_steps = WARM_UP_STEPS + (2 * arguments.blocks + 1) * BLOCK_STEPS
    trainer = Trainer(strategy=strategy, callbacks=[Watching()], max_steps=num_steps, **QUIET)
    trainer.fit(module, datamodule=data)
    out.write_text(json.dumps({"blocks": watch.blocks}))


class Watch:
    """Switches at the ends of blocks; times steps, and each contribution until the version with it is decoded.

    Args:
        pid: of the syncer.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._step = 0
        self._end_s = 0.0
        self._sent: dict[tuple[int, int], tuple[float, int]] = {}
        self.blocks: list[dict[str, Any]] = []
        """``is_on``, ``steps_s``, ``delays_s`` of each, off first and last."""

    def start(self, loop: Any) -> None:
        """Put clocks around what the learner's background thread sends and decodes."""
        from lightning_diloco.protocol.actions import Decode, SendContribution

        do = loop._do

        def timed(action: Any) -> None:
            """The same, with its time."""
            if isinstance(action, SendContribution) and self._counts():
                self._sent.setdefault((action.header.fragment_id, action.header.seq), (time.monotonic(), len(self.blocks) - 1))
            do(action)
            if isinstance(action, Decode):
                sent_s, block = self._sent.pop((action.fragment_id, action.with_contribution), (None, -1))
                # One that was merged in the next block belongs to neither.
                if sent_s is not None and block == len(self.blocks) - 1:
                    self.blocks[block]["delays_s"].append(time.monotonic() - sent_s)

        loop._do, self._end_s = timed, time.monotonic()

    def _counts(self) -> bool:
        return self._step >= WARM_UP_STEPS and (self._step - WARM_UP_STEPS) % BLOCK_STEPS >= SKIPPED_STEPS

    def step_ended(self) -> None:
        """The end of an inner step."""
        now_s = time.monotonic()
        if self._counts():
            self.blocks[-1]["steps_s"].append(now_s - self._end_s)
        self._step += 1
        if self._step >= WARM_UP_STEPS and (self._step - WARM_UP_STEPS) % BLOCK_STEPS == 0:
            is_on = len(self.blocks) % 2 == 1
            os.kill(self._pid, signal.SIGUSR1 if is_on else signal.SIGUSR2)
            self.blocks.append({"is_on": is_on, "steps_s": [], "delays_s": []})
        self._end_s = time.monotonic()


def p99(on: list[list[float]], off: list[list[float]], share: float) -> float:
    """99th percentile of a mixture of two kinds of blocks: the smallest value that 99 of 100 do not exceed.

    Args:
        on: values by block.
        off: of the other kind.
        share: of the first kind, in [0, 1].
    """
    kinds = [(sum(on, []), share), (sum(off, []), 1.0 - share)]
    weighted = sorted((value, weight / len(values)) for values, weight in kinds for value in values)
    sums = accumulate(weight for _, weight in weighted)
    return next((value for (value, _), done in zip(weighted, sums, strict=True) if done >= 0.99 - 1e-9), weighted[-1][0])


def report(rows: dict[str, Any]) -> int:
    """Print the table; 1 if an aim is missed, or not decided."""
    lines, missed = [], []
    for name, row in rows.items():
        blocks = [block for block in row["blocks"] if block["steps_s"]]
        ratios = on_over_off([statistics.mean(block["steps_s"]) for block in blocks])
        low, middle, high = statistics.quantiles(ratios, n=4)
        on, off = ([block["delays_s"] for block in blocks if block["is_on"] is state] for state in (True, False))
        medians = [f"{1e3 * statistics.median(sum(part, [])):.1f}" for part in (on, off)]
        tails = [f"{1e3 * p99(on, off, share):.1f}" for share in (1.0, 0.0)]
        counts = f"{sum(map(len, on))}, {sum(map(len, off))}"
        later = [in_ms(on, off, 1.0), "-"]
        if name.startswith("disk"):
            verdict = verdict_of(*later_range(on, off, row["share"]))
            later[1] = f"{in_ms(on, off, row['share'])}: {verdict}"
            missed += [f"{name}: p99 {verdict}"] if verdict != "reached" else []
        lines.append(
            [name, str(row["snapshots"]), f"{middle:.3f} ({low:.3f}, {high:.3f})", counts, ", ".join(medians), ", ".join(tails), *later]
        )
        if name.startswith("disk") and middle < MIN_SHARE:
            missed.append(f"{name}: throughput")
    header = [
        "run",
        "snapshots",
        "on / off (quartiles)",
        "publications, on and off",
        "median delay, ms",
        "p99, ms",
        "p99 later by, ms (range)",
        "... by default",
    ]
    print(table(header, lines))
    for what in missed:
        print(f"MISSED or not decided: {what}")
    return 1 if missed else 0


def verdict_of(least_s: float, most_s: float) -> str:
    """Of the aim for how late a publication may be, from the range of what was found."""
    return "reached" if most_s <= MAX_LATER_S else "missed" if least_s > MAX_LATER_S else "not decided"


def in_ms(on: list[list[float]], off: list[list[float]], share: float) -> str:
    """By how much the 99th percentile of a mixture is later than that without, with its range."""
    least_s, most_s = later_range(on, off, share)
    return f"{1e3 * (p99(on, off, share) - p99(on, off, 0.0)):+.1f} ({1e3 * least_s:+.1f}, {1e3 * most_s:+.1f})"


def later_range(on: list[list[float]], off: list[list[float]], share: float) -> tuple[float, float]:
    """Between what 90 of 100 such differences lie, for blocks drawn with replacement.

    Args:
        on: delays by block, with it.
        off: without.
        share: of delays with it.
    """
    dice = random.Random(0)
    found = []
    for _ in range(DRAWS):
        drawn = dice.choices(on, k=len(on)), dice.choices(off, k=len(off))
        found.append(p99(*drawn, share) - p99(*drawn, 0.0))
    found.sort()
    return found[DRAWS // 20], found[-DRAWS // 20 - 1]


if __name__ == "__main__":
    sys.exit(main())
