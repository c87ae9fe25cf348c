"""Four devices of three generations in one job: what equal batches, grace, automatic sizing and data parallel training make of them.

    .venv/bin/python benchmarks/mixed.py [--seeds 0 1 2] [--tokens N] [--seconds S] [--only ROW [ROW ...]] [--json FILE]

Each learner is a process that trains a byte-level GPT of 60 thousand parameters (that of `chaos.py`) on Python's standard library. A device
is emulated by waiting: a micro-batch of b samples takes at least (10 + 5 b) / speed ms, with speeds of 0.5, 0.5, 0.25 and 0.125 of a
core, so that two cores are enough and no figure is that of the machine's scheduler. The arithmetic is done, and is part of that time.

| row | what |
|---|---|
| `alike` | four devices of the mean speed, batches of 8, a merge waits for all (K = M) |
| `all` | the mixed devices, batches of 8, K = M |
| `first` | K = 1, no grace window |
| `grace` | K = 1 with grace and carrying (the strategy's defaults) |
| `auto` | `batch_sizing="auto"`, K = M |
| `ddp` | Lightning's own `ddp` on the mixed devices, batches of 8 |

Every row trains the same number of tokens (`--tokens`), and once more for the same time (`--seconds`). Its throughput is counted while all
of its learners train, and given as a share of the same processes, at the same sizes of batches, at once and without communication. The
loss is that of the global model on the held-out text. Losses are compared by seed: mean of the paired relative differences and its 95 %
interval (Student's t).

Aims: `auto` at least 0.97 of the processes without communication; its loss at equal tokens within 1 % of `alike`; a participation of at
least 0.95 for every learner; step times within 10 % of the common target. The exit code is 1 if one is missed. Rows that the JSON file
holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
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
from benchmarks.row_file import read_rows, write_rows  # noqa: E402

SPEEDS = (0.5, 0.5, 0.25, 0.125)
OFFSET_S, PER_SAMPLE_S, BATCH, CONTEXT = 0.010, 0.005, 8, 32
ROWS: dict[str, dict[str, Any]] = {
    "alike": {"min_quorum": 4},
    "all": {"min_quorum": 4},
    "first": {"min_quorum": 1, "grace_fraction": 0.0},
    "grace": {"min_quorum": 1},
    "auto": {"min_quorum": 4, "batch_sizing": "auto"},
    "ddp": {},
}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a 95 % interval, by the number of seeds."""
SECONDS_ALONE = 20.0


def main() -> int:
    """Run the rows that are missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each row for each (default 0 1 2)")
    parser.add_argument("--tokens", type=int, default=400_000, help="of a row, over all learners (default 400000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a row at equal time (default 60; 0: leave those out)")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help="these rows alone")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "mixed.json", metavar="FILE", help="rows so far")
    parser.add_argument("--process", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        train(arguments.process)
        return 0
    known: dict[str, dict[str, Any]] = read_rows(arguments.json, {})
    for limit in [f"tokens={arguments.tokens}", *([f"seconds={arguments.seconds:g}"] if arguments.seconds else [])]:
        for seed in arguments.seeds:
            for row in arguments.only:
                name = f"{row} seed={seed} {limit}"
                if name not in known:
                    print(f"... {name}", flush=True)
                    known[name] = run(row, seed, limit)
                    print(f"    {known[name]}", flush=True)
                    write_rows(arguments.json, known)
    return report(known, arguments)


def run(row: str, seed: int, limit: str) -> dict[str, Any]:
    """One row in processes of its own, then the same processes without communication."""
    kind, _, value = limit.partition("=")
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_mixed_") as folder:
        told = {"row": row, "seed": seed, kind: float(value), "folder": folder}
        start_s = time.monotonic()
        _start(told).wait()
        wall_s = time.monotonic() - start_s
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
        sizes = result.get("sizes") or [BATCH] * len(SPEEDS)
        result |= {"wall_s": round(wall_s, 1), "tokens_per_s": round(_tokens_per_s(Path(folder)), 1)}
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_mixed_") as folder:
        told = {"row": row, "seed": seed, "seconds": SECONDS_ALONE, "folder": folder}
        for process in [_start({**told, "alone": rank, "size": sizes[rank]}) for rank in range(len(SPEEDS))]:
            process.wait()
        result["alone_tokens_per_s"] = round(_tokens_per_s(Path(folder)), 1)
    return result


def _start(told: dict[str, Any]) -> subprocess.Popen[bytes]:
    log = Path(told["folder"]) / f"log_{told.get('alone', 'row')}.txt"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, __file__, "--process", json.dumps(told)], cwd=told["folder"], stdout=file, stderr=file)
    wait = process.wait

    def checked(timeout: float | None = None) -> int:
        """Wait for the end; one that fails ends the benchmark with its last words."""
        code = wait(timeout)
        if code:
            raise SystemExit(f"{told}: exit code {code}\n{log.read_text()[-3000:]}")
        return code

    process.wait = checked  # type: ignore[method-assign]
    return process


def _tokens_per_s(folder: Path) -> float:
    """Tokens per second of all learners in the second half of the time in which all of them train: sizes have settled by then."""
    learners = [json.loads(path.read_text()) for path in sorted(folder.glob("steps_*.json"))]
    assert len(learners) == len(SPEEDS), list(folder.iterdir())
    first_s, end_s = max(steps[0][0] for steps in learners), min(steps[-1][0] for steps in learners)
    begin_s = (first_s + end_s) / 2
    return sum(CONTEXT * samples for steps in learners for at_s, samples in steps if begin_s < at_s <= end_s) / (end_s - begin_s)


# ---- in a process of the row ------------------------------------------------------------------------------------------------


def train(told: dict[str, Any]) -> None:
    """Train one row, or one of its devices alone; writes ``result.json`` and the learners' steps."""
    from lightning.pytorch import Trainer, seed_everything
    from safetensors.torch import save_file

    from benchmarks.stall import QUIET
    from benchmarks.storm.learner import validate
    from lightning_diloco import DecoupledDiLoCoStrategy

    folder, row, alone = Path(told["folder"]), told["row"], told.get("alone")
    seed_everything(told["seed"], verbose=False)
    speeds = (statistics.mean(SPEEDS),) * len(SPEEDS) if row == "alike" else SPEEDS
    module, data = make_module(speeds, alone), make_data(told.get("size", BATCH))
    devices, options = (1 if alone is not None else len(SPEEDS)), dict(QUIET, num_sanity_val_steps=0)
    options.pop("devices")
    callbacks = [make_steps(folder, alone, told.get("seconds"))]
    # Without end for the schedule, whose rate is constant after its warm-up.
    max_steps, strategy = 10**6, "auto"
    if row == "ddp" and alone is None:
        strategy = "ddp"
        max_steps = round(told["tokens"] / (BATCH * CONTEXT * devices)) if "tokens" in told else max_steps
    elif alone is None:
        budget = {"token_budget": round(told["tokens"])} if "tokens" in told else {}
        strategy = DecoupledDiLoCoStrategy(run_dir=folder / "run", drain_timeout_s=30, **ROWS[row], **budget)
    trainer = Trainer(**options, devices=devices, strategy=strategy, max_steps=max_steps, max_epochs=-1, callbacks=callbacks)
    trainer.fit(module, datamodule=data)
    if alone is not None or trainer.global_rank:
        return
    result: dict[str, Any] = {}
    if row == "ddp":
        save_file({k: v.contiguous().clone() for k, v in module.state_dict().items()}, folder / "final.safetensors")
        result["loss"] = validate(folder / "final.safetensors")
    else:
        learners = trainer.strategy.summary["learners"]
        result["loss"] = validate(folder / "run" / "global.safetensors")
        result["tokens"] = trainer.strategy.summary["tokens_merged"]
        result["participation"] = [round(x["participation"], 4) for x in learners]
        result["merges"], result["mean_members"] = (trainer.strategy.summary[k] for k in ("merges", "mean_members"))
        result["sizes"] = [x["batch_size"] for x in learners]
        lines = [json.loads(line) for line in (folder / "run" / "tape.jsonl").read_text().splitlines()]
        result["target_step_s"] = max((line["target_step_s"] for line in lines if line["event"] == "batch"), default=0.0)
    # Of the second half: by then sizes have settled.
    steps = [json.loads(path.read_text()) for path in sorted(folder.glob("steps_*.json"))]
    ends = [[at_s for at_s, _ in learner[len(learner) // 2 :]] for learner in steps]
    result["step_median_s"] = [round(statistics.median(b - a for a, b in zip(x, x[1:], strict=False)), 4) for x in ends]
    (folder / "result.json").write_text(json.dumps(result))


def make_module(speeds: tuple[float, ...], alone: int | None) -> Any:
    """The model on a device of the learner's speed."""
    from benchmarks.storm.learner import MODEL
    from recipes.gpt_text.model import GPTText

    class Paced(GPTText):  # type: ignore[misc]
        """A forward pass takes as long as it would on that device; it comes before anything that is communicated."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            """The loss, not before its time."""
            start_s = time.monotonic()
            loss = super().training_step(batch, batch_idx)
            speed = speeds[self.trainer.global_rank if alone is None else alone]
            time.sleep(max(0.0, start_s + (OFFSET_S + PER_SAMPLE_S * len(batch)) / speed - time.monotonic()))
            return loss

    # Short, since the slowest device does few steps.
    return Paced(**{**MODEL, "warmup_steps": 40}, learning_rate=3e-3)


def make_data(batch_size: int) -> Any:
    """The text."""
    from recipes.gpt_text.data import TextData

    return TextData(context=CONTEXT, batch_size=batch_size)


def make_steps(folder: Path, alone: int | None, seconds: float | None) -> Any:
    """A callback that notes the end and the samples of every step, and ends the training after so many seconds of it."""
    from lightning.pytorch import Callback

    class Steps(Callback):
        """See `make_steps`."""

        def __init__(self) -> None:
            self.steps: list[tuple[float, int]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            """A step has ended."""
            self.steps.append((time.monotonic(), len(batch)))
            if seconds is not None and self.steps[-1][0] > self.steps[0][0] + seconds:
                trainer.should_stop = True

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """Leave the steps for the driver."""
            rank = trainer.global_rank if alone is None else alone
            (folder / f"steps_{rank}.json").write_text(json.dumps(self.steps))

    return Steps()


# ---- report -----------------------------------------------------------------------------------------------------------------


def report(known: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> int:
    """Print the tables; 1 if an aim is missed."""
    limits = [f"tokens={arguments.tokens}", *([f"seconds={arguments.seconds:g}"] if arguments.seconds else [])]
    for limit in limits:
        rows = {row: {seed: run for seed in arguments.seeds if (run := known.get(f"{row} seed={seed} {limit}"))} for row in ROWS}
        print(f"\nAt equal {limit.replace('=', ': ')}\n")
        header = [
            "row",
            "runs",
            "share of no communication",
            "tokens/s",
            "loss",
            "against `alike`, %",
            "participation",
            "step, ms",
            "sizes",
        ]
        print(table(header, [_line(row, runs, rows["alike"]) for row, runs in rows.items() if runs]))
    return _check(known, arguments)


def _line(row: str, by_seed: dict[int, dict[str, Any]], alike: dict[int, dict[str, Any]]) -> list[str]:
    runs = list(by_seed.values())
    shares = statistics.mean(run["tokens_per_s"] / run["alone_tokens_per_s"] for run in runs)
    differences = [100 * (run["loss"] / alike[seed]["loss"] - 1) for seed, run in by_seed.items() if seed in alike]
    interval = ""
    if len(differences) in T95:
        interval = f" ± {T95[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5:.2f}"
    taking = ", ".join(f"{min(p):.3f}" for p in zip(*(run["participation"] for run in runs), strict=True)) if row != "ddp" else "-"
    steps = ", ".join(f"{1e3 * statistics.median(s):.0f}" for s in zip(*(run["step_median_s"] for run in runs), strict=True))
    sizes = (
        ", ".join(str(statistics.median_low(s)) for s in zip(*(run["sizes"] for run in runs), strict=True)) if row != "ddp" else str(BATCH)
    )
    loss = statistics.mean(run["loss"] for run in runs)
    against = f"{statistics.mean(differences):+.2f}{interval}" if differences else "-"
    return [
        f"`{row}`",
        str(len(runs)),
        f"{shares:.3f}",
        f"{statistics.mean(r['tokens_per_s'] for r in runs):,.0f}",
        f"{loss:.4f}",
        against,
        taking,
        steps,
        sizes,
    ]


def _check(known: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> int:
    """Judge the rows at equal tokens; 1 if an aim is missed, 2 if a row of `auto` or `alike` is not there to be judged."""
    limit = f"tokens={arguments.tokens}"
    auto = {seed: known.get(f"auto seed={seed} {limit}") for seed in arguments.seeds}
    alike = {seed: known.get(f"alike seed={seed} {limit}") for seed in arguments.seeds}
    if None in auto.values() or None in alike.values():
        print("\nThe aims are those of `auto` against `alike`: not all of their rows are there.")
        return 2
    share = statistics.mean(run["tokens_per_s"] / run["alone_tokens_per_s"] for run in auto.values())
    loss = statistics.mean(run["loss"] / alike[seed]["loss"] - 1 for seed, run in auto.items())
    taking = min(p for run in auto.values() for p in run["participation"])
    off = max(abs(s / run["target_step_s"] - 1) for run in auto.values() for s in run["step_median_s"])
    targets = ", ".join(f"{1e3 * run['target_step_s']:.0f}" for run in auto.values())
    aims = [
        ("`auto` at least 0.97 of no communication", f"{share:.3f}", share >= 0.97),
        ("its loss at equal tokens within 1 % of `alike`", f"{100 * loss:+.2f} %", loss <= 0.01),
        ("participation of every learner at least 0.95", f"{taking:.3f}", taking >= 0.95),
        (
            f"step times within 10 % of the target ({targets} ms)",
            f"{100 * off:.1f} % at most",
            off <= 0.10,
        ),
    ]
    print("\n" + table(["aim", "figure", ""], [[aim, figure, "reached" if ok else "**missed**"] for aim, figure, ok in aims]))
    return 0 if all(ok for _, _, ok in aims) else 1


if __name__ == "__main__":
    sys.exit(main())
