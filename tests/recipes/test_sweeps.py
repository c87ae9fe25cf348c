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
TOKENS = 6_553_600


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import ablation
    import quality

    return {"ablation": ablation, "quality": quality}


def run_directory(folder: Path, overrides: list[str], val_loss: float | None, status: str = "finished") -> None:
    """As Hydra and a run leave it."""
    logs = folder / "logs" / "hydra"
    logs.mkdir(parents=True)
    with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
        OmegaConf.save(compose("config", overrides), logs / "config.yaml")
    (folder / "result.json").write_text(json.dumps({"status": status, "val": {"val_loss": val_loss}, "tokens": TOKENS}))


ABLATION_RUNS = (
    # What is swept, the text of its row beside what all have, the seed.
    (["seed=1"], "", 1),
    (["+strategy.outer_lr=0.7"], "", 0),  # the default, written out
    (["+strategy={merge:mean,outer_lr:1}"], " +strategy.merge=mean +strategy.outer_lr=1.0", 0),
    (
        # In another order than the row's.
        [
            "+strategy.outer_momentum=0.8",
            "+strategy.outer_lr=0.4",
            "+strategy.outer_momentum_warmup=15",
            "strategy.num_fragments=8",
            "strategy.sync_interval_steps=8",
        ],
        " strategy.sync_interval_steps=8 strategy.num_fragments=8 +strategy.outer_lr=0.4"
        " +strategy.outer_momentum_warmup=15 +strategy.outer_momentum=0.8",
        0,
    ),
)


def test_the_runs_of_a_sweep_of_ablation_become_its_table(tmp_path, benchmarks, monkeypatch, capsys):
    path, sweep = tmp_path / "rows.json", tmp_path / "sweep"
    for i, (swept, _, _) in enumerate(ABLATION_RUNS):
        run_directory(sweep / str(i), ["recipe=ablation", *swept], 1.0 + i)
    run_directory(sweep / "other", ["recipe=ablation", "+strategy.outer_lr=0.123"], 9.0)
    run_directory(sweep / "failed", ["recipe=ablation", "strategy.wire_dtype=int4"], 9.0, status="failed")
    for seed, diverged in enumerate((None, float("nan"))):
        run_directory(sweep / f"diverged_{seed}", ["recipe=ablation", "strategy.wire_dtype=int4", f"seed={seed}"], diverged)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--only", "merge", "--seeds", "2", "--json", str(path), "--from", str(sweep)])
    assert benchmarks["ablation"].main() == 1, "not complete"
    said = capsys.readouterr().out
    assert f"{sweep}: 4 new rows; 4 runs are none of this benchmark or did not end well\n" in said
    assert "| rda, embeddings and head by the mean (default) | 1.5000 | 2.0000, 1.0000 | 6.55 |" in said
    assert "| mean, outer_lr 1.0 | 3.0000 | 3.0000 | 6.55 |" in said
    names = [" ".join(benchmarks["ablation"].base(seed)) + more for _, more, seed in ABLATION_RUNS]
    assert json.loads(path.read_text()) == {name: {"val_loss": 1.0 + i, "tokens": TOKENS} for i, name in enumerate(names)}


def test_the_runs_of_a_sweep_of_quality_are_rows_of_its_cells_and_a_failed_row_is_replaced(tmp_path, benchmarks):
    quality, sweep = benchmarks["quality"], tmp_path / "sweep"
    names = [
        " ".join(quality.overrides("2x800", "ddp", 1.0, 1)),
        " ".join(quality.overrides("4x800/8", "decoupled_diloco", 2.0, 0)),
    ]
    often = ["+strategy.outer_momentum_warmup=15", *quality.OFTEN_OVERRIDES[:-1]]
    # `ddp` has no use for what is swept beside it.
    run_directory(sweep / "0", ["recipe=quality", "strategy.name=ddp", "seed=1", *often], 1.0)
    run_directory(sweep / "1", ["recipe=quality", "trainer.devices=4", "model.learning_rate=2.4e-2", *often], 2.0)
    run_directory(sweep / "2", ["recipe=digits"], 9.0)
    rows = quality.Rows(tmp_path / "rows.json")
    rows.known = {names[0]: {"error": "an earlier try"}}
    wanted = [name.split(" ") for name in names]
    assert rows.take(sweep, wanted) == (2, 1) and rows.take(sweep, wanted) == (0, 1)
    assert json.loads(rows.path.read_text()) == {name: {"val_loss": 1.0 + i, "tokens": TOKENS} for i, name in enumerate(names)}


def test_a_folder_that_is_not_there_is_refused(tmp_path, benchmarks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quality.py", "--from", str(tmp_path / "gone")])
    with pytest.raises(SystemExit, match="2"):
        benchmarks["quality"].main()
    assert f"{tmp_path / 'gone'}: there is no such folder; recipes/train.py -m prints where" in capsys.readouterr().err


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
