"""Rows of a benchmark that are runs of a recipe: each in a process of its own, kept in a JSON file as soon as it is there.

Not a benchmark itself: `quality.py` and `ablation.py` use it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.row_file import read_rows, write_rows

__all__ = ["Rows", "mean", "table"]

ROOT = Path(__file__).resolve().parent.parent


class Rows:
    """What was run so far, by the overrides of the recipe.

    Args:
        path: the JSON file; made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = read_rows(path, {})
        self._asked: dict[str, None] = {}

    def get(self, *overrides: str, script: list[str] | None = None, runs: bool = True) -> dict[str, Any] | None:
        """The row of these overrides; run now if it is not there and `runs` says so, by ``recipes/train.py`` or another script.

        A run that fails is kept with its last lines under ``error`` and has no ``val_loss``: it may fail again after minutes, and whoever
        starts the benchmark again for the rows behind it does not wait for that. `failed` says what to do.
        """
        name = " ".join(overrides)
        self._asked[name] = None
        if name not in self.known and runs:
            print(f"... {name}", flush=True)
            self.known[name] = _run(script or [str(ROOT / "recipes" / "train.py")], overrides)
            write_rows(self.path, self.known)
            print(f"    {self.known[name]}", flush=True)
        return self.known.get(name)

    def failed(self) -> list[str]:
        """A sentence about each row that was asked for and whose run has failed: its name, why, what to do."""
        remedy = f"Delete this row from {self.path} to run it again, or give another file with --json."
        errors = {name: self.known.get(name, {}).get("error") for name in self._asked}
        return [
            f"FAILED: {name}\n    {(error.strip().splitlines() or ['it said nothing'])[-1]}\n    {remedy}"
            for name, error in errors.items()
            if error is not None
        ]

    def take(self, folder: Path, recipe: str, *names: str) -> int:
        """Take the runs of a sweep (``recipes/train.py -m``) as rows, named by these values of their configuration.

        What else the command line has changed stands behind them, in its order. Runs of other recipes are left out.

        Args:
            folder: of the sweep; all run directories below it count.
            recipe: whose runs are taken.
            names: dotted, in the order of the overrides of a row.

        Returns:
            How many rows are new.
        """
        count = 0
        for path in sorted(folder.rglob("logs/hydra/config.yaml")):
            changed = [str(item) for item in OmegaConf.load(path.with_name("overrides.yaml"))]
            if f"recipe={recipe}" not in changed:
                continue
            cfg = OmegaConf.load(path)
            values = [(name, OmegaConf.select(cfg, name)) for name in names]
            more = [item for item in changed if item.partition("=")[0] not in ("recipe", *names)]
            key = " ".join([f"recipe={recipe}", *(f"{name}={v:g}" if isinstance(v, float) else f"{name}={v}" for name, v in values), *more])
            row = _figures(path.parents[2])
            if row is not None and "val_loss" not in self.known.get(key, {}):
                self.known[key], count = row, count + 1
        write_rows(self.path, self.known)
        return count


def _run(script: list[str], overrides: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_row_") as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, *script, f"hydra.run.dir={run_dir}", *overrides]
        start_s = time.monotonic()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        elapsed_s = round(time.monotonic() - start_s, 1)
        row = None if done.returncode else _figures(run_dir)
        if row is None:
            return {"error": (done.stdout + done.stderr)[-2000:], "elapsed_s": elapsed_s}
    return {**row, "elapsed_s": elapsed_s}


def _figures(run_dir: Path) -> dict[str, Any] | None:
    """What a run directory says of its run; None if the run did not end well."""
    path = next((path for name in ("summary.json", "result.json") if (path := run_dir / name).exists()), None)
    if path is None:
        return None
    summary = json.loads(path.read_text())
    if summary["status"] != "finished" or not summary.get("val"):
        return None
    row: dict[str, Any] = {"val_loss": summary["val"]["val_loss"]}
    for name in ("wall_s", "tokens", "merges", "mean_members", "bytes_up", "steps_lost"):
        if name in summary:
            row[name] = summary[name]
    if "config" in summary:
        row["config"] = summary["config"]
    learners = summary.get("learners", [])
    if learners:
        row["participation"] = min(learner["participation"] or 0.0 for learner in learners)
    return row


def mean(values: list[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
