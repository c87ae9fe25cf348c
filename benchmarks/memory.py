"""What the learner and the syncer need for each parameter, against the formulas that the code claims.

    .venv/bin/python benchmarks/memory.py [--params 1 25 100] [--json FILE]

For every size three processes are measured by their resident memory: a plain Trainer, the same Trainer as a learner of a syncer, and that
syncer. What synchronization costs a learner is the difference of the first two. In P fragments of n parameters, with H = P and one learner:

| process | float32 copies | bytes per parameter |
|---|---|---|
| learner 0 while it trains | base, momentum; under way: blocks 16 n, payload buffers 2 n; aside 8 n | 8 + 18 / P * (1 to 3) + 8 / P |
| another learner (not measured) | no momentum | 4 less |
| syncer meanwhile | Theta, momentum, shadow, newest difference; merges: blocks 18 n, payload buffers 4 n | 14 + 22 / P * (1 to 3) |

"Aside" is one fragment's AdamW moments on their way to a file, as in a supervised job (`rejoin_every_steps`). Blocks and buffers are used
again (`runtime/blocks.py`): those of two fragments are kept, so there are never fewer. While it trains: the highest of the second half of
the steps. The highest of the whole run is beside it: at its beginning the whole model is sent at once, and at its end all fragments are
under way at once.

The line through the sizes gives the bytes per parameter; its start, at no parameters, is what the process is; beside it the slope from
each size to the next. The exit code is 1 if a slope of the training is outside its formula (with the largest fragment's real share) by more
than 15 %. Rows that the JSON file holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.row_file import read_rows, write_rows
from benchmarks.stall import MODELS, QUIET, ROOT, job
from benchmarks.syncer_process import running_syncer

STEPS = 144
"""Of blocks that a founding needed some are kept for `RECENT` loans more, one loan a step and pool: they are over in the second half."""
MARGIN = 0.15
FRAGMENTS = 24


def main() -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", nargs="+", type=int, choices=list(MODELS), default=list(MODELS), help="millions of parameters")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "memory.json", metavar="FILE", help="rows so far")
    parser.add_argument("--process", nargs=2, metavar=("ENDPOINT", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        train(arguments.process[0], Path(arguments.process[1]), arguments.params[0])
        return 0
    rows: dict[str, Any] = read_rows(arguments.json, {})
    for size in arguments.params:
        if str(size) not in rows:
            rows[str(size)] = measure(size)
            write_rows(arguments.json, rows)
    return report([rows[str(size)] for size in arguments.params])


def measure(size: int) -> dict[str, float]:
    """The three processes of one size, in bytes."""
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_memory_") as folder:
        plain = trained(folder, "none", size)
        for mark in ("half", "trained", "row.json"):
            Path(folder, mark).unlink()
        with running_syncer(Path(folder, "run")) as (syncer, endpoint):
            learner = subprocess.Popen(child(folder, endpoint, size), cwd=folder, stdout=subprocess.DEVNULL)
            try:
                syncer_figures = watch(learner, syncer, Path(folder))
                if learner.wait(120):
                    raise SystemExit(f"The learner failed with exit code {learner.returncode}.")
            finally:
                learner.kill()
                learner.wait()
        row = json.loads(Path(folder, "row.json").read_text())
    keys = {f"plain_{k}": plain[k] for k in ("training", "highest")} | {f"learner_{k}": row[k] for k in ("training", "highest")}
    return {"num_params": row["num_params"], "share": row["share"], **keys, **syncer_figures}


def child(folder: str, address: str, size: int) -> list[str]:
    """The command of a training process."""
    return [sys.executable, __file__, "--process", address, f"{folder}/row.json", "--params", str(size)]


def trained(folder: str, address: str, size: int) -> dict[str, Any]:
    """What a training process without a syncer says."""
    subprocess.run(child(folder, address, size), check=True, cwd=folder, stdout=subprocess.DEVNULL)
    row: dict[str, Any] = json.loads(Path(folder, "row.json").read_text())
    return row


def watch(learner: subprocess.Popen[bytes], syncer: subprocess.Popen[bytes], folder: Path) -> dict[str, float]:
    """The syncer's highest resident memory: between the two marks of the learner, and until it has ended."""
    training = highest = 0.0
    while syncer.poll() is None:
        if learner.poll():
            raise SystemExit(f"The learner failed with exit code {learner.returncode}.")
        is_training = (folder / "half").exists() and not (folder / "trained").exists()
        now = resident(syncer.pid, "VmRSS")
        training, highest = max(training, now if is_training else 0.0), max(highest, resident(syncer.pid, "VmHWM"))
        time.sleep(0.05)
    return {"syncer_training": training, "syncer_highest": highest}


def resident(pid: int | str, field: str) -> float:
    """Resident memory of a process in bytes, now (VmRSS) or at most (VmHWM); 0 if it has ended."""
    try:
        found = re.search(field + r":\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return 0.0 if found is None else 1024.0 * int(found.group(1))


def train(address: str, out: Path, size: int) -> None:
    """One training process; with an address, as a learner."""
    from lightning.pytorch import Callback, Trainer

    from lightning_diloco import DecoupledDiLoCoStrategy
    from lightning_diloco.outer import plan_layout

    module, data = job(size)
    row: dict[str, Any] = {"training": 0.0}

    class Marks(Callback):
        """The highest memory of the second half of the steps, and marks for whoever watches the syncer."""

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == STEPS // 2:
                out.with_name("half").touch()
            if trainer.global_step > STEPS // 2:
                row["training"] = max(row["training"], resident("self", "VmRSS"))
            if trainer.global_step == STEPS:
                out.with_name("trained").touch()

    trainer = Trainer(
        callbacks=[Marks()],
        strategy="auto" if address == "none" else DecoupledDiLoCoStrategy(syncer=address, run_dir=out.with_name("learner")),
        max_steps=STEPS,
        **QUIET,
    )
    trainer.fit(module, datamodule=data)
    count = sum(p.numel() for p in module.parameters())
    layout = plan_layout(module, num_fragments=FRAGMENTS, merge="mean", mean_patterns=())
    row |= {"highest": resident("self", "VmHWM"), "num_params": count, "share": max(f.num_params for f in layout.fragments) / count}
    out.write_text(json.dumps(row))


def slope(rows: list[dict[str, float]], value: Any) -> tuple[float, float]:
    """Least squares: bytes per parameter, and bytes at none."""
    xs, ys = [row["num_params"] for row in rows], [value(row) for row in rows]
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    per = sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / sum((x - x0) ** 2 for x in xs)
    return per, y0 - per * x0


def report(rows: list[dict[str, float]]) -> int:
    """Print the tables; 1 if a slope is outside its formula."""
    print("MB while it trains (highest of the run):\n\n| parameters | plain Trainer | learner | syncer |\n" + "|---" * 4 + "|")
    for row in rows:
        cells = [f"{row[f'{name}_training'] / 1e6:.0f} ({row[f'{name}_highest'] / 1e6:.0f})" for name in ("plain", "learner", "syncer")]
        print(f"| {row['num_params']:,.0f} | " + " | ".join(cells) + " |")
    if len(rows) < 2:
        return 0
    share, missed = rows[-1]["share"], False
    processes = {"learner 0, beside the plain Trainer": ("learner", "plain", 8 + 8 * share, 18), "syncer": ("syncer", "", 14, 22)}
    print(
        "\n| process | bytes per parameter while it trains | between two sizes each | formula | at no parameters, MB "
        "| bytes per parameter, highest |\n" + "|---" * 6 + "|"
    )
    for title, (name, beside, fixed, moving) in processes.items():
        low, high = fixed + moving * share, fixed + 3 * moving * share
        (per, start), (highest, _) = (slope(rows, partial(above, name=name, beside=beside, when=when)) for when in ("training", "highest"))
        each = ", ".join(
            f"{slope(list(pair), partial(above, name=name, beside=beside, when='training'))[0]:.1f}" for pair in pairwise(rows)
        )
        missed = missed or not (1 - MARGIN) * low <= per <= (1 + MARGIN) * high
        print(f"| {title} | {per:.1f} | {each} | {low:.1f} to {high:.1f} | {start / 1e6:.0f} | {highest:.1f} |")
    return 1 if missed else 0


def above(row: dict[str, float], *, name: str, beside: str, when: str) -> float:
    """Memory of one process above that of another one."""
    return row[f"{name}_{when}"] - (row[f"{beside}_{when}"] if beside else 0.0)


if __name__ == "__main__":
    sys.exit(main())
