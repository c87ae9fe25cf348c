"""The sweeps of `quality` and `ablation`, and what the benchmark takes of a sweep's folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("strategy.name", "trainer.devices", "seed")
ROW = "recipe=quality strategy.name=ddp trainer.devices=2 seed=1"


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from recipe_rows import Rows

    return Rows(tmp_path / "rows.json")


def run_directory(folder: Path, overrides: list[str], val_loss: float, status: str = "finished") -> None:
    values = dict(item.split("=") for item in overrides)
    logs = folder / "logs" / "hydra"
    logs.mkdir(parents=True)
    (logs / "overrides.yaml").write_text(json.dumps(overrides))
    config = {"strategy": {"name": values.get("strategy.name", "decoupled_diloco")}, "trainer": {"devices": 2}, "seed": int(values["seed"])}
    (logs / "config.yaml").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps({"status": status, "val": {"val_loss": val_loss}}))


def test_rows_of_the_recipe_are_taken_and_those_of_other_jobs_left_out(tmp_path, rows):
    rows.known = {ROW: {"error": "an earlier try"}}
    runs = (
        ["recipe=quality", "strategy.name=ddp", "seed=1"],
        ["recipe=ablation", "seed=1"],
        ["recipe=quality", "+strategy.outer_lr=0.5", "seed=1"],
        ["seed=1"],
    )
    for i, overrides in enumerate(runs):
        run_directory(tmp_path / "sweep" / str(i), overrides, 1.0 + i)
    run_directory(tmp_path / "sweep" / "failed", ["recipe=quality", "seed=2"], 9.0, status="failed")
    assert rows.take(tmp_path / "sweep", "quality", *NAMES) == 1
    assert json.loads((tmp_path / "rows.json").read_text()) == {ROW: {"val_loss": 1.0}}
    assert rows.take(tmp_path / "sweep", "quality", *NAMES) == 0


@pytest.mark.parametrize(
    ("recipe", "devices", "swept"),
    [("quality", 2, {"strategy.name", "model.learning_rate", "seed"}), ("ablation", 4, set())],
)
def test_the_sweeps_are_composed(recipe, devices, swept):
    with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
        cfg = compose("config", [f"recipe={recipe}"], return_hydra_config=True)
    assert set(cfg.hydra.sweeper.params or {}) == swept
    assert cfg.trainer.devices == cfg.strategy.min_quorum == devices
    assert cfg.name == "gpt_text" and cfg.model.num_layers == 2


def test_the_ablation_has_the_job_of_its_benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import ablation

    with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
        cfg = compose("config", ["recipe=ablation"])
    assert (cfg.trainer.devices, cfg.trainer.max_steps) == (ablation.LEARNERS, ablation.STEPS)
    assert (cfg.data.batch_size, cfg.data.context, cfg.model.learning_rate) == (ablation.BATCH_SIZE, ablation.CONTEXT, ablation.RATE)
    assert cfg.strategy.min_quorum == ablation.LEARNERS
