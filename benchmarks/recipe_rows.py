"""Rows of a benchmark that are runs of a recipe: each in a process of its own, kept in a JSON file as soon as it is there.

Not a benchmark itself: `quality.py` and `ablation.py` use it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.row_file import read_rows, write_rows

__all__ = ["Rows", "add_sweeps", "mean", "table", "take_sweeps"]

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

    def take(self, folder: Path, wanted: Iterable[Sequence[str]]) -> tuple[int, int]:
        """Take the runs of a sweep (``recipes/train.py -m``) as rows.

        A run is the row whose options come to the same, however they were given: by another recipe, in another order, written out or left
        to the default. A row whose run has failed is replaced.

        Args:
            folder: of the sweep; all run directories below it count.
            wanted: the overrides of every row that a run may be.

        Returns:
            How many rows are new, and how many runs are none of these rows or did not end well.
        """
        options = [(_options(_with(overrides)), " ".join(overrides)) for overrides in wanted]
        num_new = num_others = 0
        for path in sorted(folder.rglob("logs/hydra/config.yaml")):
            found, row = _options(OmegaConf.load(path)), _figures(path.parents[2])
            name = next((name for asked, name in options if asked == found), None)
            if name is None or row is None:
                num_others += 1
            elif "val_loss" not in self.known.get(name, {}):
                self.known[name], num_new = row, num_new + 1
        write_rows(self.path, self.known)
        return num_new, num_others


def add_sweeps(parser: argparse.ArgumentParser) -> None:
    """The option ``--from``; its folders are `sweeps`."""
    help_text = "take the runs of a sweep (recipes/train.py -m) as rows; run nothing"
    parser.add_argument("--from", dest="sweeps", type=_sweep, nargs="+", default=[], metavar="DIR", help=help_text)


def take_sweeps(rows: Rows, folders: Sequence[Path], wanted: Sequence[Sequence[str]]) -> None:
    """Take the runs of these folders, and say how many."""
    for folder in folders:
        num_new, num_others = rows.take(folder, wanted)
        print(f"{folder}: {num_new} new rows; {num_others} runs are none of this benchmark or did not end well")


def _sweep(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder; recipes/train.py -m prints where its runs are.")
    return Path(text)


@cache
def _recipe(name: str) -> Any:
    from hydra import compose, initialize_config_dir  # here: others take `table` alone

    with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
        cfg = compose("config", [f"recipe={name}"])
    OmegaConf.set_struct(cfg, False)
    return cfg


def _with(overrides: Sequence[str]) -> Any:
    """The configuration of a row; not by Hydra, which takes a quarter of a second for each."""
    recipe, *rest = (override.removeprefix("+") for override in overrides)
    return OmegaConf.merge(_recipe(recipe.removeprefix("recipe=")), OmegaConf.from_dotlist(rest))


def _options(cfg: Any) -> dict[str, Any]:
    """What a configuration comes to, with the strategy's defaults written out; a plain Trainer has none."""
    from msgspec import to_builtins

    from lightning_diloco.config import SyncConfig

    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)
    asked = values.get("strategy", {})
    is_ours = asked.get("name") == "decoupled_diloco"
    values["strategy"] = to_builtins(SyncConfig()) | asked if is_ours else {"name": asked.get("name")}
    # Tuples become lists.
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]


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
    loss = (summary.get("val") or {}).get("val_loss")
    # A run that diverged has none: null in `summary.json`, NaN with `ddp`.
    if summary["status"] != "finished" or loss is None or not math.isfinite(loss):
        return None
    row: dict[str, Any] = {"val_loss": loss}
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
