"""The figure of a cell: each method at its best rate, and no aim is reached with a run missing or without its merges."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.row_file import write_rows
from lightning_diloco.outer import plan_layout
from recipes.gpt_text import build

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
OURS = {0.006: 1.50, 0.012: 1.45, 0.024: 1.42, 0.048: 1.60}
DDP = {0.006: 1.48, 0.012: 1.40, 0.024: 1.44, 0.048: 1.55}


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import quality

    return quality


def rows_of(quality, path):
    """Rows of cell 4x800 with three seeds at the best rates: ours 1 % behind, 2 % and 3 %."""
    rows = quality.Rows(path)
    more = {"ddp": [(0.012, 1, 1.40), (0.012, 2, 1.40)], "decoupled_diloco": [(0.024, 1, 1.428), (0.024, 2, 1.442)]}
    for method, searched in (("ddp", DDP), ("decoupled_diloco", OURS)):
        for rate, seed, loss in [*((rate, 0, loss) for rate, loss in searched.items()), *more[method]]:
            values = zip(quality.NAMES, (method, quality.BATCH_SIZE, 4, 800, f"{rate:g}", seed), strict=True)
            row = {"val_loss": loss} | ({} if method == "ddp" else {"merges": 667})
            rows.known[" ".join(["recipe=quality", *(f"{name}={value}" for name, value in values)])] = row
    return rows


def test_each_method_has_its_best_rate_and_seeds_are_paired(quality, tmp_path):
    line, is_reached = quality.figure(rows_of(quality, tmp_path / "rows.json"), "4x800", runs=False)
    assert line[1:3] == ["1: 1.4000, 1.4000, 1.4000", "2: 1.4200, 1.4280, 1.4420"]
    assert line[3:5] == ["100.1%", "+2.14% (+1.43%, +3.00%)"] and not is_reached, "the aim is 2 %"


@pytest.mark.parametrize("method", ["ddp", "decoupled_diloco"])
@pytest.mark.parametrize(("rate", "seed"), [(0.048, 0), (None, 2)])
def test_a_run_that_failed_leaves_the_cell_incomplete(quality, tmp_path, method, rate, seed):
    rows = rows_of(quality, tmp_path / "rows.json")
    for key in rows.known:
        rows.known[key]["val_loss"] -= 0.1 if "decoupled" in key else 0.0
    assert quality.figure(rows, "4x800", runs=False)[1], "ours is ahead"
    (lost,) = [k for k in rows.known if method in k and f"seed={seed}" in k and (rate is None or f"rate={rate:g}" in k)]
    rows.known[lost] = {"error": "Traceback\n  a line\nit was killed\n"}
    line, is_reached = quality.figure(rows, "4x800", runs=False)
    assert not is_reached and line[4].endswith("; runs are missing")
    (sentence,) = rows.failed()
    remedy = f"Delete this row from {rows.path} to run it again, or give another file with --json."
    assert sentence == f"FAILED: {lost}\n    it was killed\n    {remedy}"


def test_a_failed_row_of_another_cell_is_not_told_about(quality, tmp_path, monkeypatch, capsys):
    rows = rows_of(quality, tmp_path / "rows.json")
    for cell in ("4x800", "8x800"):
        rows.known[" ".join(quality.overrides(cell, "ddp", 1.0, 0))] = {"error": f"killed in {cell}"}
    write_rows(rows.path, rows.known)
    monkeypatch.setattr(sys, "argv", ["quality.py", "--report", "--only", "4x800", "--json", str(rows.path)])
    assert quality.main() == 1
    said = capsys.readouterr().out
    assert "MISSED, disturbed or not complete: 4x800\nFAILED: recipe=quality strategy.name=ddp" in said
    assert "killed in 4x800" in said and "killed in 8x800" not in said


@pytest.mark.parametrize(("merges", "is_disturbed"), [(601, False), (599, True)])
@pytest.mark.parametrize("seed", [0, 2])
def test_a_run_without_its_merges_disturbs_the_cell(quality, tmp_path, merges, is_disturbed, seed):
    rows = rows_of(quality, tmp_path / "rows.json")
    for key in rows.known:
        rows.known[key]["val_loss"] -= 0.1 if "decoupled" in key else 0.0
    rows.known[" ".join(quality.overrides("4x800", "decoupled_diloco", 2.0, seed))]["merges"] = merges
    line, is_reached = quality.figure(rows, "4x800", runs=False)
    assert line[3] == f"{merges / (20 * 800 / 24):.1%}" and is_reached is not is_disturbed
    assert line[4].endswith("; disturbed") is is_disturbed


def test_merges_that_are_due_follow_from_the_fragments_and_the_interval(quality):
    assert quality.due("2x2400") == 2000 and quality.due("4x800/8") == 800
    with initialize_config_dir(str(BENCHMARKS.parent / "recipes" / "conf"), version_base="1.3"):
        for cell, (fragments, interval) in {"4x800": quality.SCHEDULE, "4x800/8": quality.OFTEN_SCHEDULE}.items():
            cfg = compose("config", quality.overrides(cell, "decoupled_diloco", 1.0, 0))
            asked = {"num_fragments": cfg.strategy.num_fragments, "merge": "rda", "mean_patterns": ()}
            assert len(plan_layout(build(cfg)[0], **asked).fragments) == fragments
            assert cfg.strategy.sync_interval_steps == interval
