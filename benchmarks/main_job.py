"""The main job against its aims: `make train` on two learners, its figures beside what they should be.

    .venv/bin/python benchmarks/main_job.py [--repeat N] [--json FILE] [key=value ...]

Each repetition runs `recipes/train.py recipe=gpt_text` with another seed, reads its `summary.json`, and adds a row to the JSON file as
soon as it is there; rows that the file holds already are not run again, so an interrupted benchmark goes on where it was. Exit code 1 if
an aim is missed.

The aims: at most 240 s of training on two cores, at least 400 inner steps per learner, at least 500 merges, participation of each
learner at least 0.95, validation loss of the global model at most 1.75 nats per byte (byte unigram 3.15, bigram 2.43, trigram 1.79 on
this text), nothing pending or discarded.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.row_file import read_rows, write_rows  # noqa: E402


def main() -> int:
    """Run what is missing, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default 1)")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "main_job.json", metavar="FILE", help="rows so far")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed on to the recipe")
    args = parser.parse_args()
    rows: dict[str, Any] = read_rows(args.json, {})
    for seed in range(args.repeat):
        name = " ".join([f"seed={seed}", *args.overrides])
        if name not in rows:
            rows[name] = run_once([f"seed={seed}", *args.overrides])
            write_rows(args.json, rows)
    return report(rows)


def run_once(overrides: list[str]) -> dict[str, Any]:
    """One run of the recipe; the figures of its summary that the aims speak of."""
    run_dir = ROOT / "outputs" / ("main_job_" + "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", o) for o in overrides))
    number = 1
    while run_dir.exists():
        number += 1
        run_dir = run_dir.with_name(f"{run_dir.name.split('~')[0]}~{number}")
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), "recipe=gpt_text", f"hydra.run.dir={run_dir}", *overrides]
    subprocess.run(command, check=True, cwd=ROOT)
    summary = json.loads((run_dir / "summary.json").read_text())
    learners = summary["learners"]
    return {
        "wall_s": summary["wall_s"],
        "min_inner_steps": min(row["inner_steps"] for row in learners),
        "merges": summary["merges"],
        "mean_members": summary["mean_members"],
        "min_participation": min(row["participation"] for row in learners),
        "val_loss": summary["val"]["val_loss"],
        "tokens": summary["tokens"],
        "tokens_merged": summary["tokens_merged"],
        "pending": max(row["pending"] for row in summary["fragments"]),
        "discarded": max(row["discarded"] for row in summary["fragments"]),
        "goodput": summary["goodput"],
        "uptime": summary["uptime"],
        "max_stall_share": max(row["stall_s"] for row in learners) / summary["wall_s"],
        "max_stall_p99_s": max(row["stall_p99_s"] for row in learners),
        "bytes_up": summary["bytes_up"],
        "bytes_down": summary["bytes_down"],
    }


def missed_aims(row: dict[str, Any]) -> list[str]:
    """The aims that a row does not reach, in words."""
    checks = {
        f"wall_s {row['wall_s']:.0f} > 240": row["wall_s"] > 240,
        f"inner steps {row['min_inner_steps']} < 400": row["min_inner_steps"] < 400,
        f"merges {row['merges']} < 500": row["merges"] < 500,
        f"participation {row['min_participation']:.3f} < 0.95": row["min_participation"] < 0.95,
        f"val_loss {row['val_loss']:.3f} > 1.75": row["val_loss"] > 1.75,
        f"pending {row['pending']} > 0": row["pending"] > 0,
        f"discarded {row['discarded']} > 0": row["discarded"] > 0,
    }
    return [sentence for sentence, is_missed in checks.items() if is_missed]


def report(rows: dict[str, Any]) -> int:
    """Print a Markdown table; returns 1 if an aim is missed."""
    keys = list(next(iter(rows.values())))
    print("| run | " + " | ".join(keys) + " |\n" + "|---" * (len(keys) + 1) + "|")
    for name, row in rows.items():
        cells = [f"{row[key]:.4g}" if isinstance(row[key], float) else f"{row[key]:,}" for key in keys]
        print(f"| {name} | " + " | ".join(cells) + " |")
    missed = {name: missed_aims(row) for name, row in rows.items()}
    for name, sentences in missed.items():
        print(f"{name}: {'aims reached' if not sentences else 'MISSED: ' + '; '.join(sentences)}")
    return 1 if any(missed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
