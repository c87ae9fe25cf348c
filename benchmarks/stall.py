"""What outer synchronization costs the training thread: throughput with it on and off in turns, and the time of every boundary.

    .venv/bin/python benchmarks/stall.py [--params 1 25 100] [--blocks N] [--times N] [--json FILE] [--report]

One learner is pinned to one core and the syncer to another one; the learner's background thread shares the core of its training thread, as
it may in the worst case. Outer synchronization is on and off in turns, in blocks of 20 inner steps of one run. While it is off the learner
is paused and no boundary is passed. It saves its inner optimizer state as the learners of a supervised job do. Left out are the first 60
steps, in which every fragment has its turn twice and memory is asked for that is used again from then on, and the first two steps of a
block: what was on its way ends there. A batch is 16, 2 or 1 windows of 64 bytes (by size), or `--times` as many: what is
exchanged does not grow with it.

| figure | what |
|---|---|
| on / off | inner steps per second of a block over those of the blocks around it: median and quartiles; aim: a median of at least 0.97 |
| other threads | processor time of all threads but the training thread, of a step with it: what the difference should be, without noise |
| stall | time of the training thread in outer-sync code at boundaries, over the time of the blocks; aim: at most 1 % |
| p99 of a boundary | aim: at most 3 times a plain `copy_` of the bytes that were copied, put aside and adopted at it, plus 1 ms |
| p99 above 3 copies | the same, as the 99th percentile of what is above 3 such copies: at most 1 ms |

A median, because one block without, in which something else ran, makes both ratios beside it too good, and a mean moves with them. Two bad
ones of five leave a median among the good ones, so rows with fewer than five ratios are printed and not judged. A 99th percentile is of 18
boundaries a block: the second largest of 144 (8 blocks) and 108 (6), the largest below 100.

The exit code is 1 if an aim is missed or a row not judged. Rows that the JSON file holds are not run again; the report is of all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.row_file import read_rows, write_rows  # noqa: E402
from benchmarks.syncer_process import running_syncer  # noqa: E402

BLOCK_STEPS = 20
SKIPPED_STEPS = 2
WARM_UP_STEPS = 3 * BLOCK_STEPS
MIN_ON_OVER_OFF, MAX_STALL_SHARE, MAX_ABOVE_S = 0.97, 0.01, 1e-3
MIN_RATIOS = 5
"""For a verdict."""
MODELS = {
    1: {"num_layers": 4, "num_heads": 4, "channels": 128, "batch": 16},
    25: {"num_layers": 8, "num_heads": 8, "channels": 512, "batch": 2},
    100: {"num_layers": 8, "num_heads": 16, "channels": 1024, "batch": 1},
}
"""By millions of parameters; context 64."""

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "limit_val_batches": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of a Trainer that does nothing but train."""


def main() -> int:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", nargs="+", type=int, choices=list(MODELS), default=list(MODELS), help="millions of parameters")
    parser.add_argument(
        "--blocks", type=int, default=6, help="blocks with it, and one more without (default 6); at least 3, and 5 for a verdict"
    )
    parser.add_argument("--times", type=int, default=1, metavar="N", help="so many times the windows in a batch (default 1)")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "stall.json", metavar="FILE", help="rows so far")
    parser.add_argument("--report", action="store_true", help="print what is there and run nothing")
    parser.add_argument("--learner", nargs=2, metavar=("ENDPOINT", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.blocks < 3:
        parser.error(f"--blocks {arguments.blocks}: at least 3, so that there are two with others around them.")
    if arguments.times < 1:
        parser.error(f"--times {arguments.times}: at least 1, the batch as it is.")
    if arguments.learner:
        learn(arguments.learner[0], Path(arguments.learner[1]), arguments.params[0], arguments.blocks, arguments.times)
        return 0
    rows: dict[str, Any] = read_rows(arguments.json, {})
    for size in arguments.params:
        name = f"{size} M, {arguments.times * MODELS[size]['batch']} windows, {arguments.blocks} blocks"
        if name not in rows and not arguments.report:
            rows[name] = run(size, arguments.blocks, arguments.times)
            write_rows(arguments.json, rows)
    if not rows:
        raise SystemExit(f"{arguments.json} has no rows: leave out --report to run them, or give another file with --json.")
    return report(rows)


def run(size: int, blocks: int, times: int) -> dict[str, Any]:
    """One model: a syncer and a learner, each on its core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("Two cores are needed: one for the learner, one for the syncer.")
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_stall_") as folder:
        out = Path(folder) / "row.json"
        with running_syncer(Path(folder) / "run", core=cores[1]) as (syncer, endpoint):
            learner = ["taskset", "-c", str(cores[0]), sys.executable, __file__, "--learner", endpoint, str(out)]
            options = ["--params", str(size), "--blocks", str(blocks), "--times", str(times)]
            subprocess.run([*learner, *options], check=True, cwd=folder, stdout=subprocess.DEVNULL)
            syncer.wait(60)
        row: dict[str, Any] = json.loads(out.read_text())
        row["merges"] = sum('"event":"merge"' in line for line in (Path(folder) / "run" / "tape.jsonl").read_text().splitlines())
    return row


def job(size: int, times: int = 1) -> tuple[Any, Any]:
    """Module and data of a size in millions of parameters, with so many times its windows in a batch."""
    from lightning.pytorch import seed_everything

    from recipes.gpt_text.data import TextData
    from recipes.gpt_text.model import GPTText

    seed_everything(0, verbose=False)
    options: dict[str, Any] = dict(MODELS[size])
    data = TextData(context=64, batch_size=times * options.pop("batch"))
    return GPTText(**options, context=64, learning_rate=1e-3), data


def learn(endpoint: str, out: Path, size: int, blocks: int, times: int) -> None:
    """The learner's process: train, measure, write the row."""
    from lightning.pytorch import Callback, Trainer

    from lightning_diloco import DecoupledDiLoCoStrategy

    module, data = job(size, times)
    # With a run directory it saves its inner optimizer state, as a learner of a supervised job does.
    strategy = DecoupledDiLoCoStrategy(syncer=endpoint, run_dir=out.with_name("learner"))
    watch = Watch(blocks)

    class Turns(Callback):
        """Hands the hooks on."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            watch.start(strategy._outer_sync)

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            watch.step_ended()

    trainer = Trainer(
        strategy=strategy,
        callbacks=[Turns()],
        max_steps=(2 * blocks + 1) * BLOCK_STEPS + WARM_UP_STEPS,
        **QUIET,
    )
    trainer.fit(module, datamodule=data)
    row = watch.row()
    row["num_params"] = sum(p.numel() for p in module.parameters())
    out.write_text(json.dumps(row))


class Watch:
    """Turns the exchange on and off, and measures, after a while in which it is on."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._step = 0
        self._is_on = True
        self._end_s = 0.0
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._blocks_s: list[float] = []
        """Mean step of every block, on and off in turns, off first and last."""
        self._block: list[float] = []
        self._others_s = 0.0
        """Processor time of all threads but the training thread, while it is on."""
        self._boundary: list[tuple[float, int]] = []
        self._parts: defaultdict[str, list[float]] = defaultdict(list)
        self._bytes = 0
        self._spent = defaultdict(float)

    def start(self, outer_sync: Any) -> None:
        """Put clocks around what the training thread calls."""
        self._client = client = outer_sync._client
        self._pass_boundary = client.boundary
        client.boundary = self._boundary_or_nothing
        self._wrap(client, "_poisoned", "look for what is not finite")
        self._wrap(client, "_hand_over", "the machine's actions")
        self._wrap(client._machine, "handle", "the machine")
        perform, store, saver = client._perform, client._store, outer_sync._saver
        stage = saver._staged

        def counted(work: Any) -> None:
            """How many bytes are read and written at this boundary: float32 of every fragment that is copied or adopted."""
            self._bytes += sum(4 * store.views[action.fragment_id].num_params for action, _ in work if hasattr(action, "fragment_id"))
            perform(work)

        def staged(tensors: dict[str, Any]) -> dict[str, Any]:
            """The inner optimizer state that is copied aside counts with them."""
            self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())
            return stage(tensors)  # type: ignore[no-any-return]

        client._perform, saver._staged = counted, staged
        self._wrap(client, "_perform", "copies and adoptions")
        self._wrap(client, "on_boundary", "inner state aside")
        self._others_at_s = time.process_time() - time.thread_time()
        self._end_s = time.monotonic()

    def _wrap(self, owner: Any, name: str, title: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            """Add the time of this call to its title."""
            start_s = time.monotonic()
            try:
                return function(*args, **named)
            finally:
                self._spent[title] += time.monotonic() - start_s

        setattr(owner, name, timed)

    def _boundary_or_nothing(self, *, tokens: int) -> None:
        if not self._is_on:
            return
        self._bytes = 0
        self._spent.clear()
        start_s = time.monotonic()
        self._pass_boundary(tokens=tokens)
        spent_s = time.monotonic() - start_s
        if self._counts():
            self._boundary.append((spent_s, self._bytes))
            for title, value in self._spent.items():
                self._parts[title].append(value)
            self._parts["all"].append(spent_s)

    def _counts(self) -> bool:
        return self._step >= WARM_UP_STEPS and self._step % BLOCK_STEPS >= SKIPPED_STEPS

    def step_ended(self) -> None:
        """The end of an inner step: keep its time, and turn at the end of a block."""
        now_s = time.monotonic()
        if self._counts():
            self._block.append(now_s - self._end_s)
            if self._is_on:
                self._others_s += time.process_time() - time.thread_time() - self._others_at_s
        self._step += 1
        if self._step >= WARM_UP_STEPS and self._step % BLOCK_STEPS == 0:
            self._end_block()
        self._others_at_s = time.process_time() - time.thread_time()
        self._end_s = time.monotonic()

    def _end_block(self) -> None:
        if self._block:
            self._blocks_s.append(statistics.mean(self._block))
            self._times[self._is_on] += self._block
            self._block = []
        self._is_on = not self._is_on
        self._client.set_paused(not self._is_on)

    def row(self) -> dict[str, Any]:
        """The figures."""
        on, off = self._times[True], self._times[False]
        per_byte_s = self._copy_s_per_byte()
        above = sorted(spent_s - 3 * per_byte_s * count for spent_s, count in self._boundary)
        stalls = sorted(spent_s for spent_s, _ in self._boundary)
        return {
            "step_on_s": statistics.mean(on),
            "step_off_s": statistics.mean(off),
            "step_by_block_s": self._blocks_s,
            "others_s": self._others_s / len(on),
            "stall_share": sum(stalls) / sum(on),
            "stall_median_s": statistics.median(stalls),
            "stall_p99_s": nearest_rank(stalls, 0.99),
            "above_3_copies_p99_s": nearest_rank(above, 0.99),
            "copy_bytes_per_s": 1 / per_byte_s,
            "bytes_per_boundary": statistics.mean(count for _, count in self._boundary),
            "parts_s": {title: statistics.mean(values) for title, values in self._parts.items()},
        }

    def _copy_s_per_byte(self) -> float:
        """Of a plain `copy_` of a fragment, each from other memory, as at a boundary."""
        import torch

        views = self._client_views()
        scratch = torch.empty(max(t.numel() for t in views))
        times = []
        for _ in range(5):
            for tensor in views:
                start_s = time.monotonic()
                scratch[: tensor.numel()].copy_(tensor)
                times.append((time.monotonic() - start_s) / (4 * tensor.numel()))
        return statistics.median(times)

    def _client_views(self) -> list[Any]:
        import torch

        return [torch.randn(view.num_params) for view in self._client._store.views]


def nearest_rank(values: list[float], share: float) -> float:
    """The least of sorted values that is not below this share of them."""
    return values[math.ceil(share * len(values)) - 1]


def on_over_off(blocks_s: list[float]) -> list[float]:
    """Throughput of each block with it over the mean of those around it, so that the machine's slow drift falls out.

    Args:
        blocks_s: mean step of every block, off and on in turns, off first and last.
    """
    return [(blocks_s[i - 1] + blocks_s[i + 1]) / 2 / blocks_s[i] for i in range(1, len(blocks_s) - 1, 2)]


def report(rows: dict[str, Any]) -> int:
    """Print the tables; 1 if an aim is missed or a row has too few blocks for a verdict."""
    missed, not_judged = [], []
    print(
        "| model | step without, ms | on / off (quartiles) | other threads, ms | stall | p99 of a boundary, ms | p99 above 3 copies, ms "
        "| merges |\n" + "|---" * 8 + "|"
    )
    for name, row in rows.items():
        ratios = on_over_off(row["step_by_block_s"])
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(
            f"| {name} ({row['num_params']:,}) | {1e3 * row['step_off_s']:.1f} | "
            f"{ratio:.3f} ({low:.3f}, {high:.3f}) | {1e3 * row['others_s']:.2f} | {row['stall_share']:.2%} | "
            f"{1e3 * row['stall_p99_s']:.2f} | {1e3 * row['above_3_copies_p99_s']:.2f} | {row['merges']} |"
        )
        if len(ratios) < MIN_RATIOS:
            not_judged.append(name)
        elif ratio < MIN_ON_OVER_OFF or row["stall_share"] > MAX_STALL_SHARE or row["above_3_copies_p99_s"] > MAX_ABOVE_S:
            missed.append(name)
    print("\nWhere the time of a boundary goes (means, ms):\n")
    titles = list(next(iter(rows.values()))["parts_s"])
    print("| model | " + " | ".join(titles) + " | MB copied |\n" + "|---" * (len(titles) + 2) + "|")
    for name, row in rows.items():
        cells = " | ".join(f"{1e3 * row['parts_s'][title]:.3f}" for title in titles)
        print(f"| {name} | {cells} | {row['bytes_per_boundary'] / 1e6:.2f} |")
    if missed:
        print(f"\nMISSED: {'; '.join(missed)}")
    if not_judged:
        print(f"\nNOT JUDGED, fewer than {MIN_RATIOS} ratios on / off: {'; '.join(not_judged)}")
    return 1 if missed or not_judged else 0


if __name__ == "__main__":
    sys.exit(main())
