"""What each setting is worth: one table a setting, on the real runtime, against the defaults.

    .venv/bin/python benchmarks/ablation.py [--only TABLE ...] [--rows TEXT] [--seeds N] [--json FILE] [--from DIR] [--report]

Recipe `quality` (K = M) with four learners and 800 inner steps each, at the inner learning rate that is best for `ddp` there (for ours,
three rates cannot be told apart); each row changes what its name says. The figure is the validation loss of the final global model, by
seed. The model has 20 tensors, and so 20 fragments where 24 or more are asked for. One seed does not rank rows: the same job with the
same seed differs by up to 1.4 %, with another one by up to 2.5 %.

Rows of ``events`` do something to the last learner: it needs twice as long for a step (it sleeps as long as each takes), it comes when the
others are half through (as `summary.json` says, which is up to 5 s old), or it is killed then and restarted, with what inner state its
run directory holds or without. Those in which it is slow or late end when all have trained 3.5 times the tokens of one, which is when the
others are through: nobody trains on alone.

Rows that the JSON file holds are not run again. ``python recipes/train.py -m recipe=ablation ...`` makes the rows of a table as a sweep,
but for those in which something happens (`recipes/conf/recipe/ablation.yaml` has the commands); ``--from`` takes them, for as many seeds
as ``--seeds`` says, by what their options come to, and runs nothing. The exit code is 1 if a row is missing or has failed. ``--one`` is how
a row of ``events`` is run in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.recipe_rows import ROOT, Rows, add_sweeps, mean, table, take_sweeps

LEARNERS, BATCH_SIZE, CONTEXT, STEPS, RATE = 4, 64, 32, 800, 2.4e-2
UNTIL_OTHERS_END = f"+strategy.token_budget={int((LEARNERS - 0.5) * STEPS * BATCH_SIZE * CONTEXT)}"
SHORT = [
    "strategy.sync_interval_steps=8",
    "strategy.num_fragments=8",
    "+strategy.outer_lr=0.4",
    "+strategy.outer_momentum_warmup=15",
]
TABLES: dict[str, dict[str, list[str]]] = {
    "adoption": {"rebase (default)": [], "overwrite": ["+strategy.adopt=overwrite"]},
    "merge": {
        "rda, embeddings and head by the mean (default)": [],
        "head by rda too": ["+strategy.mean_patterns=[]"],
        "mean": ["+strategy.merge=mean"],
        "mean, outer_lr 1.0": ["+strategy.merge=mean", "+strategy.outer_lr=1.0"],
    },
    "outer_lr": {"0.7 (default)": [], **{f"{lr}": [f"+strategy.outer_lr={lr}"] for lr in (0.3, 0.5, 1.0)}},
    "momentum": {
        "v / (v + 10), at most 0.8 (default)": [],
        "none": ["+strategy.outer_momentum=0"],
        **{f"constant {mu}": [f"+strategy.outer_momentum={mu}", "+strategy.outer_momentum_warmup=0"] for mu in (0.6, 0.9)},
        **{f"v / (v + {k}), at most 0.8": [f"+strategy.outer_momentum_warmup={k}"] for k in (3, 5, 20)},
        "v / (v + 5), at most 0.9 (the former default)": ["+strategy.outer_momentum=0.9", "+strategy.outer_momentum_warmup=5"],
    },
    "interval": {
        "H = 24, P = 20 (default)": [],
        **{f"H = {h}, P = {min(20, h)}": [f"strategy.sync_interval_steps={h}", f"strategy.num_fragments={h}"] for h in (8, 48, 96)},
        "H = 24, P = 8": ["strategy.num_fragments=8"],
        "H = 8, P = 20": ["strategy.sync_interval_steps=8"],
        "H = P = 8, at most 0.9": ["strategy.sync_interval_steps=8", "strategy.num_fragments=8", "+strategy.outer_momentum=0.9"],
        **{
            f"H = P = 8, outer_lr 0.4, v / (v + 15), at most {mu}": [*SHORT, f"+strategy.outer_momentum={mu}"]
            for mu in (0.9, 0.8, 0.7, 0.6)
        },
    },
    "wire": {
        "bf16 (default)": [],
        **{wire: [f"strategy.wire_dtype={wire}"] for wire in ("int4", "fp32")},
        # Three times the merges for fewer bytes than the default's.
        "int4, H = P = 8, outer_lr 0.4, v / (v + 15), at most 0.7": [*SHORT, "+strategy.outer_momentum=0.7", "strategy.wire_dtype=int4"],
    },
    "events": {
        "nothing, K = 4": [],
        "nothing, K = 1": ["strategy.min_quorum=1"],
        "one at half speed, K = 4": ["event=slow", UNTIL_OTHERS_END],
        "one at half speed, K = 1": ["event=slow", UNTIL_OTHERS_END, "strategy.min_quorum=1"],
        "one at half speed, K = 1, no grace": ["event=slow", UNTIL_OTHERS_END, "strategy.min_quorum=1", "+strategy.grace_fraction=0"],
        "one comes at half time, job's clock": ["event=late", UNTIL_OTHERS_END],
        "one comes at half time, its own clock": ["event=late", UNTIL_OTHERS_END, "+strategy.lr_clock=local"],
        "one killed at half time, freshest inner state of the run directory": ["event=killed"],
        # A period that no life of the job reaches: nothing is written, and nobody is asked.
        "one killed at half time, no inner state": ["event=killed", "+strategy.rejoin_every_steps=100000"],
    },
}


def main() -> int:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose setting contains this text")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default 1)")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "ablation.json", metavar="FILE", help="rows so far")
    parser.add_argument("--report", action="store_true", help="print what is there and run nothing")
    add_sweeps(parser)
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        train_with_event(arguments.one)
        return 0
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: there has to be one at least.")
    if not any(arguments.rows in title for name in arguments.only for title in TABLES[name]):
        parser.error(f"--rows {arguments.rows!r}: no row of {', '.join(arguments.only)} contains that.")
    rows, is_complete = Rows(arguments.json), True
    take_sweeps(rows, arguments.sweeps, wanted(range(arguments.seeds)))
    for name in arguments.only:
        lines = []
        for title, overrides in TABLES[name].items():
            if arguments.rows not in title:
                continue
            found = [run(rows, overrides, seed, runs=not (arguments.report or arguments.sweeps)) for seed in range(arguments.seeds)]
            done = [row for row in found if row is not None and "val_loss" in row]
            losses = [row["val_loss"] for row in done]
            is_complete = is_complete and len(losses) == arguments.seeds
            tokens = f"{mean([row['tokens'] for row in done]) / 1e6:.2f}" if done else "-"
            lines.append([title, f"{mean(losses):.4f}" if losses else "-", ", ".join(f"{loss:.4f}" for loss in losses), tokens])
        print(f"\n{name}\n\n{table(['setting', 'validation loss', 'by seed', 'million tokens'], lines)}")
    for sentence in rows.failed():
        print(sentence)
    return 0 if is_complete else 1


def run(rows: Rows, overrides: list[str], seed: int, *, runs: bool) -> dict[str, Any] | None:
    """One row; the same job has one row, whatever tables it is in."""
    script = [__file__, "--one"] if has_event(overrides) else None
    return rows.get(*base(seed), *overrides, script=script, runs=runs)


def base(seed: int) -> list[str]:
    """The overrides that all rows have."""
    return [
        "recipe=quality",
        f"data.batch_size={BATCH_SIZE}",
        f"trainer.devices={LEARNERS}",
        f"trainer.max_steps={STEPS}",
        f"model.learning_rate={RATE:g}",
        f"seed={seed}",
    ]


def has_event(overrides: list[str]) -> bool:
    """Whether something happens to a learner, which no recipe does."""
    return any(override.startswith("event=") for override in overrides)


def wanted(seeds: Iterable[int]) -> list[list[str]]:
    """The overrides of every row that a sweep can make."""
    settings = [overrides for rows in TABLES.values() for overrides in rows.values() if not has_event(overrides)]
    return [[*base(seed), *overrides] for seed in seeds for overrides in settings]


def train_with_event(overrides: list[str]) -> None:
    """One job of the recipe in which something happens to its last learner."""
    from hydra import compose, initialize_config_dir
    from lightning.pytorch import seed_everything

    from recipes.gpt_text import build
    from recipes.job import build_trainer
    from recipes.quiet import quiet

    values = dict(item.split("=", 1) for item in overrides)
    run_dir = Path(values["hydra.run.dir"])
    rest = [item for item in overrides if not item.startswith(("event=", "hydra."))]
    with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=rest)
    quiet()
    seed_everything(cfg.seed, workers=True, verbose=False)
    module, data = build(cfg)
    trainer = build_trainer(cfg, run_dir)
    trainer.callbacks.append(_event(values["event"], cfg.trainer.devices - 1, cfg.trainer.max_steps))
    trainer.fit(module, datamodule=data)


def _event(kind: str, learner_id: int, steps: int) -> Any:
    from lightning.pytorch import Callback

    class Event(Callback):
        """What happens, in the process of the learner that it happens to."""

        step_s = 0.0
        end_s = 0.0

        def _is_it(self, trainer: Any) -> bool:
            return trainer.strategy.learner_id == learner_id and trainer.strategy.assignment is not None

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            """Before the join: the late one waits until the others are half through."""
            if kind == "late" and self._is_it(trainer) and trainer.strategy.assignment.life > 0:
                counters = trainer.strategy.assignment.run_dir / "summary.json"
                while not _is_half_through(counters, steps):
                    time.sleep(0.5)

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            """The slow one waits as long as the last step took."""
            if kind == "slow" and self._is_it(trainer):
                time.sleep(self.step_s)
            self.end_s = time.monotonic()

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            """The one that is killed does it itself, once; so does the late one at its first step: all first lives begin together."""
            self.step_s = time.monotonic() - self.end_s
            end = {"killed": steps // 2, "late": 1}.get(kind)
            if end == trainer.global_step and self._is_it(trainer) and trainer.strategy.assignment.life == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return Event()


def _is_half_through(summary: Path, steps: int) -> bool:
    import json

    try:
        learners = json.loads(summary.read_text())["learners"]
    except (OSError, ValueError, KeyError):
        return False
    return any(learner["inner_steps"] >= steps // 2 for learner in learners)


if __name__ == "__main__":
    sys.exit(main())
