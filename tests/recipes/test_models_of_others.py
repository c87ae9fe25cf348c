"""Recipes with models that nobody here wrote, trained on two learners: the loss of the global model falls."""

from __future__ import annotations

import csv
import json
import pydoc_data
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.test_entry_point import ROOT
from tests.recipes.test_extras import with_extras

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.extras, pytest.mark.timeout(900), with_extras]


def train(run_dir: Path, *options: str) -> list[float]:
    """Train a recipe.

    Returns:
        The validation losses of the global model: those that learner 0 saw, in order, and the last one.
    """
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), f"hydra.run.dir={run_dir}", *options]
    done = subprocess.run(command, cwd=run_dir.parent, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    with (run_dir / "logs/metrics/metrics.csv").open() as file:
        seen = [float(row["val_loss"]) for row in csv.DictReader(file) if row.get("val_loss")]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["merges"] > 20 and summary["status"] == "finished"
    assert all(row["inner_steps"] >= 100 for row in summary["learners"]) and len(summary["learners"]) == 2
    return [*seen, summary["val"]["val_loss"]]


@pytest.mark.parametrize("recipe", ["hf_causal_lm", "moe_text"])
def test_a_language_model_of_transformers_learns(recipe, tmp_path):
    losses = train(tmp_path / "run", f"recipe={recipe}", "trainer.max_steps=200", "trainer.val_check_interval=50", "sample.num_bytes=10")
    # 5.55 nats are those of a guess. How many merges came before the first validation depends on how the learners share the machine.
    assert losses[0] < 5.55 and losses[-1] < losses[0] - 0.5 and losses[-1] < 2.9


def test_adapters_bring_a_trained_model_to_another_text(tmp_path):
    english = f"data.path={Path(pydoc_data.__file__).parent / 'topics.py'}"
    short = ("trainer.max_steps=200", "trainer.val_check_interval=50", "sample.num_bytes=10")
    train(tmp_path / "base", "recipe=hf_causal_lm", *short)
    options = ["recipe=lora_text", english, f"model.weights={tmp_path / 'base' / 'global.safetensors'}", *short]
    losses = train(tmp_path / "adapted", *options, "trainer.num_sanity_val_steps=0", "trainer.val_check_interval=10")
    assert losses[-1] < losses[0] - 0.1


def test_a_network_with_batch_norm_learns_digits(tmp_path):
    losses = train(tmp_path / "run", "recipe=digits", "trainer.max_steps=200", "trainer.val_check_interval=25")
    # ln 10 = 2.3 nats are those of a guess.
    assert losses[0] > 0.5 and min(losses) < 0.3 and losses[-1] < 0.6
