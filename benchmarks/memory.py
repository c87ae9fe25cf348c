"""What the learner and the syncer need for each parameter, against the formulas that the code claims.

    .venv/bin/python benchmarks/memory.py [--params 1 25 100] [--json FILE]

For every size three processes are measured by their highest resident memory: a plain Trainer, the same Trainer as a learner of a syncer,
and that syncer. What synchronization costs a learner is the difference of the first two. In P fragments, with H = P and one learner:

| process | float32 copies | bytes per parameter |
|---|---|---|
| learner 0 | base and momentum, and the fragments under way | 8 + 18 / P * (fragments under way, 1 to 3) |
| another learner | no momentum | 4 less |
| syncer | Theta, momentum, shadow and the newest difference, and the open merges | 14 + 8 / P * (open merges, 1 to 3) |

The line through the sizes gives the bytes per parameter; its start, at no parameters, is what the process is. The exit code is 1 if a slope
is outside its formula (with the largest fragment's real share) by more than 15 %. Rows that the JSON file holds are not run again.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stall import MODELS, ROOT

STEPS = 60
MARGIN = 0.15
FRAGMENTS = 24


def main() -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", nargs="*", type=int, choices=list(MODELS), default=list(MODELS), help="millions of parameters")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "memory.json", metavar="FILE", help="rows so far")
    parser.add_argument("--process", nargs=2, metavar=("ENDPOINT", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        train(arguments.process[0], Path(arguments.process[1]), arguments.params[0])
        return 0
    rows: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for size in arguments.params:
        if str(size) not in rows:
            rows[str(size)] = measure(size)
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return report([rows[str(size)] for size in arguments.params])


def measure(size: int) -> dict[str, float]:
    """The three processes of one size, in bytes."""
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_memory_") as folder:
        plain = trained(folder, "none", size)
        command = [sys.executable, "-m", "lightning_diloco", "syncer", "--run-dir", f"{folder}/run"]
        with open(f"{folder}/out", "w+") as out:
            syncer = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, cwd=ROOT)
            try:
                learner = subprocess.Popen(
                    child(folder, endpoint(Path(folder, "out"), syncer), size), cwd=folder, stdout=subprocess.DEVNULL
                )
                highest = watch(learner, syncer)
            finally:
                syncer.kill()
                syncer.wait()
        row = json.loads(Path(folder, "row.json").read_text())
    return {"num_params": row["num_params"], "plain": plain["rss"], "learner": row["rss"], "syncer": highest, "share": row["share"]}


def child(folder: str, address: str, size: int) -> list[str]:
    """The command of a training process."""
    return [sys.executable, __file__, "--process", address, f"{folder}/row.json", "--params", str(size)]


def trained(folder: str, address: str, size: int) -> dict[str, Any]:
    """What a training process without a syncer says."""
    subprocess.run(child(folder, address, size), check=True, cwd=folder, stdout=subprocess.DEVNULL)
    row: dict[str, Any] = json.loads(Path(folder, "row.json").read_text())
    return row


def endpoint(said: Path, syncer: subprocess.Popen[bytes]) -> str:
    """The address that the syncer prints."""
    while syncer.poll() is None:
        found = re.search(r"tcp://[\d.:]+", said.read_text())
        if found is not None:
            return found.group()
        time.sleep(0.1)
    raise SystemExit("The syncer ended before it said its address.")


def watch(learner: subprocess.Popen[bytes], syncer: subprocess.Popen[bytes]) -> float:
    """The syncer's highest resident memory until both have ended."""
    highest = 0.0
    while syncer.poll() is None:
        if learner.poll():
            raise SystemExit(f"The learner failed with exit code {learner.returncode}.")
        highest = max(highest, peak(syncer.pid))
        time.sleep(0.2)
    return highest


def peak(pid: int | str) -> float:
    """The highest resident memory of a process, in bytes; 0 if it has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return 0.0 if found is None else 1024.0 * int(found.group(1))


def train(address: str, out: Path, size: int) -> None:
    """One training process; with an address, as a learner."""
    from lightning.pytorch import Trainer, seed_everything

    from lightning_diloco import DecoupledDiLoCoStrategy
    from lightning_diloco.outer import plan_layout
    from recipes.gpt_text.data import TextData
    from recipes.gpt_text.model import GPTText

    seed_everything(0, verbose=False)
    options: dict[str, Any] = dict(MODELS[size])
    data = TextData(context=64, batch_size=options.pop("batch"))
    module = GPTText(**options, context=64, learning_rate=1e-3)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy="auto" if address == "none" else DecoupledDiLoCoStrategy(syncer=address),
        max_steps=STEPS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    count = sum(p.numel() for p in module.parameters())
    layout = plan_layout(module, num_fragments=FRAGMENTS, merge="mean", mean_patterns=())
    share = max(f.num_params for f in layout.fragments) / count
    out.write_text(json.dumps({"rss": peak("self"), "num_params": count, "share": share}))


def slope(rows: list[dict[str, float]], value: Any) -> tuple[float, float]:
    """Least squares: bytes per parameter, and bytes at none."""
    xs, ys = [row["num_params"] for row in rows], [value(row) for row in rows]
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    per = sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / sum((x - x0) ** 2 for x in xs)
    return per, y0 - per * x0


def report(rows: list[dict[str, float]]) -> int:
    """Print the tables; 1 if a slope is outside its formula."""
    print("| parameters | plain Trainer, MB | learner, MB | syncer, MB |\n" + "|---" * 4 + "|")
    for row in rows:
        print(f"| {row['num_params']:,.0f} | {row['plain'] / 1e6:.0f} | {row['learner'] / 1e6:.0f} | {row['syncer'] / 1e6:.0f} |")
    if len(rows) < 2:
        return 0
    share = rows[-1]["share"]
    formulas = {
        "learner 0, beside the plain Trainer": (lambda row: row["learner"] - row["plain"], 8 + 18 * share, 8 + 3 * 18 * share),
        "syncer": (lambda row: row["syncer"], 14 + 8 * share, 14 + 3 * 8 * share),
    }
    missed = False
    print("\n| process | bytes per parameter | formula | at no parameters, MB |\n" + "|---" * 4 + "|")
    for name, (value, low, high) in formulas.items():
        per, start = slope(rows, value)
        missed = missed or not (1 - MARGIN) * low <= per <= (1 + MARGIN) * high
        print(f"| {name} | {per:.1f} | {low:.1f} to {high:.1f} | {start / 1e6:.0f} |")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
