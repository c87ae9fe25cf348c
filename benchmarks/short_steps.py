"""What short inner steps do to K=1: participation and loss of a small regression with three learners, by step time and by remedy.

    .venv/bin/python benchmarks/short_steps.py [--repeat N] [--json FILE]

Each cell is N jobs of 600 steps per learner (`--repeat`, default 4), the same seed and data. The step's length is set by sleeping in
`training_step`. Rows that the JSON file holds are not run again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightning.pytorch as pl
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.row_file import read_rows, write_rows
from lightning_diloco import DecoupledDiLoCoStrategy

ROOT = Path(__file__).resolve().parent.parent
NUM_LEARNERS = 3
CELLS: list[tuple[float, dict[str, Any]]] = [
    (0.003, {}),
    (0.003, {"overlap_steps": 4}),
    (0.003, {"min_quorum": NUM_LEARNERS}),
    (0.015, {}),
    (0.05, {}),
]


class Regression(pl.LightningModule):
    """y = sum(x), of variance 8: an untrained network has a loss of about 8, a trained one of a few thousandths."""

    def __init__(self, sleep_s: float) -> None:
        super().__init__()
        self.sleep_s = sleep_s
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Mean squared error, after a sleep."""
        time.sleep(self.sleep_s)
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Mean squared error."""
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without a schedule."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def run_once(sleep_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """One job; the figures that matter here."""
    seed_everything(1, verbose=False)
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    with tempfile.TemporaryDirectory() as run_dir:
        trainer = Trainer(
            accelerator="cpu",
            devices=NUM_LEARNERS,
            strategy=DecoupledDiLoCoStrategy(run_dir=run_dir, **options),
            max_steps=600,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Regression(sleep_s), DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=64))
    summary = trainer.strategy.summary  # type: ignore[attr-defined]
    learners = summary["learners"]
    return {
        "step_median_ms": 1e3 * sum(row["step_median_s"] for row in learners) / len(learners),
        "min_participation": min(row["participation"] for row in learners),
        "mean_members": summary["mean_members"],
        "val_loss": summary["val"]["val_loss"],
    }


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=4, metavar="N", help="jobs per cell (default 4)")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "short_steps.json", metavar="FILE", help="rows so far")
    args = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = read_rows(args.json, {})
    for sleep_s, options in CELLS:
        name = f"{1e3 * sleep_s:g} ms, " + (" ".join(f"{k}={v}" for k, v in options.items()) or "defaults")
        while len(rows.setdefault(name, [])) < args.repeat:
            rows[name].append(run_once(sleep_s, options))
            write_rows(args.json, rows)
    print("| sleep, options | median step | least participation | mean members of 3 | validation loss of each job |\n|---|---|---|---|---|")
    for name, jobs in rows.items():
        mean = {key: sum(job[key] for job in jobs) / len(jobs) for key in ("step_median_ms", "min_participation", "mean_members")}
        losses = ", ".join(f"{loss:.4f}" for loss in sorted(job["val_loss"] for job in jobs))
        print(f"| {name} | {mean['step_median_ms']:.1f} ms | {mean['min_participation']:.2f} | {mean['mean_members']:.2f} | {losses} |")


if __name__ == "__main__":
    main()
