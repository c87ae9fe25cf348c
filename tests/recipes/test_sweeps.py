"""The sweeps of `quality` and `ablation`, and what the benchmark takes of a sweep's folder."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import msgspec
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lightning_diloco.config import SyncConfig

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


def test_rows_of_the_recipe_are_taken_with_what_was_changed_and_those_of_others_left_out(tmp_path, rows):
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
    assert rows.take(tmp_path / "sweep", "quality", *NAMES) == 2
    other = "recipe=quality strategy.name=decoupled_diloco trainer.devices=2 seed=1 +strategy.outer_lr=0.5"
    assert json.loads((tmp_path / "rows.json").read_text()) == {ROW: {"val_loss": 1.0}, other: {"val_loss": 3.0}}
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


def test_the_sweeps_that_the_recipe_names_are_the_rows_of_the_benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import ablation

    def options(cfg) -> str:
        return json.dumps(msgspec.to_builtins(SyncConfig()) | OmegaConf.to_container(cfg.strategy), sort_keys=True)

    named, wanted, parser = set(), set(), OverridesParser.create()
    text = (ROOT / "recipes" / "conf" / "recipe" / "ablation.yaml").read_text()
    with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
        for line in re.findall(r"^#   (?:\.\.\.|python recipes/train.py -m recipe=ablation) (.+)$", text, re.MULTILINE):
            *fixed, swept = shlex.split(line)
            override = parser.parse_override(swept)
            assert override.is_sweep_override(), swept
            named |= {
                options(compose("config", ["recipe=ablation", *fixed, f"{override.get_key_element()}={value}"]))
                for value in override.sweep_string_iterator()
            }
        for name, rows in ablation.TABLES.items():
            if name != "events":
                base = ["recipe=quality", f"trainer.devices={ablation.LEARNERS}"]
                wanted |= {options(compose("config", base + overrides)) for overrides in rows.values()}
    assert len(wanted) > 20 and named == wanted
