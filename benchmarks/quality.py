"""The same model, text, tokens and seeds with Lightning's `ddp` and with this strategy, as real processes: whose model is better.

    .venv/bin/python benchmarks/quality.py [--only 2x800 4x800 ...] [--from DIR] [--report]

A cell is a number of learners and of inner steps. Both methods train recipe `quality` on as many processes, with the same batch in each, so
the total batch and the tokens are the same. Each gets the best of four inner learning rates (1/2, 1, 2 and 4 times the recipe's), by the
validation loss of one seed: data parallel training likes a higher one, and a comparison at one rate would flatter the learners. With its
rate each is then run with two more seeds. The figure of a cell is the mean over the seeds of (ours - ddp) / ddp, validation loss of the
final global model, with its least and largest. Cells that end with ``/8`` are the same with a merge every 8 steps instead of 24, and the
outer rate and momentum that `ablation.py` finds for that: three times the bytes.

A loss depends on how often a run has merged: where other work takes the cores merges come late, and fewer of them fit into the same steps.
So the table has the least share of the merges that were due, P S / H for S inner steps, and a cell with a run below 0.9 is disturbed: no
verdict. Every fragment is merged once more at the end, so a run may have a few percent more than were due.

Rows that the JSON file holds are not run again; a new one of ours says under ``config`` with which options it ran.
``python recipes/train.py -m recipe=quality`` makes all rows of a cell, more of them than needed; ``--from`` takes them, and runs
nothing. The exit code is 1 if an aim is missed, or a cell is disturbed or not complete.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.recipe_rows import ROOT, Rows, add_sweeps, mean, table, take_sweeps

AIMS = {"2x800": 0.0, "4x800": 0.02, "8x800": 0.05, "2x2400": 0.0, "4x2400": 0.01}
"""Learners x inner steps, with the largest relative difference that is aimed at."""
OFTEN = "/8"
CELLS = AIMS | {cell + OFTEN: aim for cell, aim in AIMS.items()}
OFTEN_OVERRIDES = (
    "strategy.sync_interval_steps=8",
    "strategy.num_fragments=8",
    "+strategy.outer_lr=0.4",
    "+strategy.outer_momentum=0.7",
    "+strategy.outer_momentum_warmup=15",
)
SCHEDULE, OFTEN_SCHEDULE = (20, 24), (8, 8)
"""P and H: the recipe asks for 24 fragments, of 20 tensors."""
MIN_MERGES = 0.9
"""Of those that were due."""
RATES = (0.5, 1.0, 2.0, 4.0)
RECIPE_RATE = 1.2e-2
SEEDS = (0, 1, 2)
METHODS = ("ddp", "decoupled_diloco")
BATCH_SIZE = 64
NAMES = ("strategy.name", "data.batch_size", "trainer.devices", "trainer.max_steps", "model.learning_rate", "seed")
"""What a row is known by."""


def main() -> int:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CELLS), default=list(AIMS), metavar="CELL", help=", ".join(CELLS))
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "quality.json", metavar="FILE", help="rows so far")
    parser.add_argument("--report", action="store_true", help="print what is there and run nothing")
    add_sweeps(parser)
    arguments = parser.parse_args()
    rows = Rows(arguments.json)
    wanted = [overrides(cell, method, rate, seed) for cell in CELLS for method in METHODS for rate in RATES for seed in SEEDS]
    take_sweeps(rows, arguments.sweeps, wanted)
    lines, missed = [], []
    for cell in arguments.only:
        line, is_reached = figure(rows, cell, runs=not (arguments.report or arguments.sweeps))
        lines.append(line)
        if not is_reached:
            missed.append(cell)
    header = ["cell", *(f"{m}: best rate, losses by seed" for m in METHODS), "least share of merges", "difference (least, largest)", "aim"]
    print(table(header, lines))
    if missed:
        print(f"MISSED, disturbed or not complete: {', '.join(missed)}")
    for sentence in rows.failed():
        print(sentence)
    return 1 if missed else 0


def figure(rows: Rows, cell: str, *, runs: bool) -> tuple[list[str], bool]:
    """One cell: its line of the table, and whether its aim is reached; never with a run missing, of the search either, or disturbed."""
    losses, texts, shares, is_complete = {}, [], list[float](), True
    for method in METHODS:
        searched = {rate: get(rows, cell, method, rate, 0, runs=runs) for rate in RATES}
        known = {rate: row["val_loss"] for rate, row in searched.items() if row is not None}
        best = min(known, key=lambda rate: known[rate], default=1.0)
        by_seed = [get(rows, cell, method, best, seed, runs=runs) for seed in SEEDS]
        losses[method] = [None if row is None else row["val_loss"] for row in by_seed]
        texts.append(f"{best:g}: " + ", ".join("-" if value is None else f"{value:.4f}" for value in losses[method]))
        is_complete = is_complete and len(known) == len(RATES) and None not in losses[method]
        if method != "ddp":
            shares = [row.get("merges", 0) / due(cell) for row in (*searched.values(), *by_seed) if row is not None]
    pairs = [(a, b) for a, b in zip(*losses.values(), strict=True) if a is not None and b is not None]
    differences = [(ours - ddp) / ddp for ddp, ours in pairs]
    text = f"{mean(differences):+.2%} ({min(differences):+.2%}, {max(differences):+.2%})" if differences else "-"
    is_disturbed = min(shares, default=1.0) < MIN_MERGES
    text += ("" if is_complete else "; runs are missing") + ("; disturbed" if is_disturbed else "")
    line = [cell, *texts, f"{min(shares):.1%}" if shares else "-", text, f"{CELLS[cell]:.1%}"]
    return line, is_complete and not is_disturbed and mean(differences) <= CELLS[cell]


def due(cell: str) -> float:
    """How many merges a run of ours has in a cell if none comes late."""
    fragments, interval = OFTEN_SCHEDULE if cell.endswith(OFTEN) else SCHEDULE
    return fragments * int(cell.removesuffix(OFTEN).split("x")[1]) / interval


def get(rows: Rows, cell: str, method: str, rate: float, seed: int, *, runs: bool) -> dict[str, Any] | None:
    """The row of one run of a cell; None if it is not there or has failed."""
    row = rows.get(*overrides(cell, method, rate, seed), runs=runs)
    return row if row is not None and "val_loss" in row else None


def overrides(cell: str, method: str, rate: float, seed: int) -> list[str]:
    """Of the recipe, for one run of a cell."""
    learners, steps = cell.removesuffix(OFTEN).split("x")
    values = zip(NAMES, (method, BATCH_SIZE, learners, steps, f"{RECIPE_RATE * rate:g}", seed), strict=True)
    more = OFTEN_OVERRIDES if cell.endswith(OFTEN) and method != "ddp" else ()
    return ["recipe=quality", *(f"{name}={value}" for name, value in values), *more]


if __name__ == "__main__":
    sys.exit(main())
