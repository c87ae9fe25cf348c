"""The tables at the end of a run show the figures of the summary."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from recipes.report import job_table, learner_table

LEARNER = {
    "learner_id": 1,
    "incarnations": 2,
    "inner_steps": 1000,
    "tokens": 1_024_000,
    "stall_s": 0.25,
    "stall_p99_s": 0.004,
    "step_median_s": 0.081,
    "rounds_merged": 39,
    "rounds_eligible": 40,
    "participation": 0.975,
    "batch_size": 16,
    "discarded": 0,
}

SUMMARY = {
    "status": "finished",
    "wall_s": 123.4,
    "startup_s": 5.5,
    "merges": 960,
    "mean_members": 1.98,
    "tokens": 2_048_000,
    "tokens_merged": 2_047_000,
    "tokens_pending": 0,
    "tokens_discarded": 1000,
    "bytes_up": 68_000_000,
    "bytes_down": 69_000_000,
    "goodput": 0.97,
    "val": {"val_loss": 1.55, "val_perplexity": 4.71},
}


def shown(table):
    out = io.StringIO()
    Console(file=out, width=110).print(table)
    return out.getvalue()


def test_a_learners_row_holds_its_figures():
    row = next(line for line in shown(learner_table([LEARNER])).splitlines() if "1,024,000" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        *("1", "2", "1,000", "1,024,000", "81.0 ms", "250.0 ms", "4.0 ms", "97.5 %"),
    ]


@pytest.mark.parametrize(
    "text",
    ["finished", "123.4 s (5.50 s)", "960", "1.98", "2,047,000 / 0 / 1,000", "68.0 MB / 69.0 MB", "97.0 %", "1.5500", "4.7100"],
)
def test_the_job_table_holds_a_figure(text):
    assert text in shown(job_table(SUMMARY))


def test_what_is_undefined_is_a_dash():
    empty = {**SUMMARY, "val": None, "goodput": None, "mean_members": None}
    lines = [line for line in shown(job_table(empty)).splitlines() if "│ -" in line]
    assert len(lines) == 2 and "validation" not in shown(job_table(empty)), "metrics that a recipe has not are not named"
    assert "│" in shown(learner_table([{**LEARNER, "participation": None}]))
