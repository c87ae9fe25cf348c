"""The same model, text, tokens and seeds with Lightning's `ddp` and with this strategy, as real processes: whose model is better.

    .venv/bin/python benchmarks/quality.py [--only 2x800 4x800 ...] [--from DIR] [--report]

A cell is a number of learners and of inner steps. Both methods train recipe `quality` on as many processes, with the same batch in each, so
the total batch and the tokens are the same. Each gets the best of four inner learning rates (1/2, 1, 2 and 4 times the recipe's), by the
validation loss of one seed: data parallel training likes a higher one, and a comparison at one rate would flatter the learners. With its
rate each is then run with two more seeds. The figure of a cell is the mean over the seeds of (ours - ddp) / ddp, validation loss of the
final global model, with its least and largest. Cells that end with ``/8`` are the same with a merge every 8 steps instead of 24, and the
outer rate and momentum that `ablation.py` finds for that: three times the bytes.

Rows that the JSON file holds are not run again; a new one of ours says under ``config`` with which options it ran.
``python recipes/train.py -m recipe=quality`` makes all rows of a cell, more of them than needed; ``--from`` takes them, and runs
nothing. The exit code is 1 if an aim is missed, or a cell is not complete.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.recipe_rows import ROOT, Rows, mean, table

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
    parser.add_argument(
        "--from", dest="sweeps", type=Path, nargs="*", default=[], metavar="DIR", help="take the runs of a sweep as rows; run nothing"
    )
    arguments = parser.parse_args()
    rows = Rows(arguments.json)
    for folder in arguments.sweeps:
        if not folder.is_dir():
            parser.error(f"--from {folder}: there is no such folder; recipes/train.py -m prints where its runs are.")
        print(f"{folder}: {rows.take(folder, 'quality', *NAMES)} new rows")
    lines, missed = [], []
    for cell in arguments.only:
        line, is_reached = figure(rows, cell, runs=not (arguments.report or arguments.sweeps))
        lines.append(line)
        if not is_reached:
            missed.append(cell)
    print(table(["cell", *(f"{m}: best rate, losses by seed" for m in METHODS), "difference (least, largest)", "aim"], lines))
    if missed:
        print(f"MISSED or not complete: {', '.join(missed)}")
    return 1 if missed else 0


def figure(rows: Rows, cell: str, *, runs: bool) -> tuple[list[str], bool]:
    """One cell: its line of the table, and whether its aim is reached; never with a run missing, of the search either."""
    learners, steps = cell.removesuffix(OFTEN).split("x")
    losses, texts, is_complete = {}, [], True
    for method in METHODS:
        more = OFTEN_OVERRIDES if cell.endswith(OFTEN) and method != "ddp" else ()
        searched = {rate: loss(rows, method, learners, steps, rate, 0, *more, runs=runs) for rate in RATES}
        known = {rate: value for rate, value in searched.items() if value is not None}
        best = min(known, key=lambda rate: known[rate], default=1.0)
        losses[method] = [loss(rows, method, learners, steps, best, seed, *more, runs=runs) for seed in SEEDS]
        texts.append(f"{best:g}: " + ", ".join("-" if value is None else f"{value:.4f}" for value in losses[method]))
        is_complete = is_complete and len(known) == len(RATES) and None not in losses[method]
    pairs = [(a, b) for a, b in zip(*losses.values(), strict=True) if a is not None and b is not None]
    differences = [(ours - ddp) / ddp for ddp, ours in pairs]
    text = f"{mean(differences):+.2%} ({min(differences):+.2%}, {max(differences):+.2%})" if differences else "-"
    if not is_complete:
        return [cell, *texts, f"{text}; runs are missing", f"{CELLS[cell]:.1%}"], False
    return [cell, *texts, text, f"{CELLS[cell]:.1%}"], mean(differences) <= CELLS[cell]


def loss(rows: Rows, method: str, learners: str, steps: str, rate: float, seed: int, *more: str, runs: bool) -> float | None:
    """The validation loss of one run with `more` overrides; None if it is not there."""
    values = zip(NAMES, (method, BATCH_SIZE, learners, steps, f"{RECIPE_RATE * rate:g}", seed), strict=True)
    row = rows.get("recipe=quality", *(f"{name}={value}" for name, value in values), *more, runs=runs)
    return None if row is None else row.get("val_loss")


if __name__ == "__main__":
    sys.exit(main())
