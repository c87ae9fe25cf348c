"""What a person reads at the end of a run: two tables from the figures of ``summary.json``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["job_table", "learner_table", "report", "report_single"]


def report(summary: Mapping[str, Any]) -> None:
    """Print both tables.

    Args:
        summary: the content of ``summary.json``.
    """
    console = _console()
    console.print(learner_table(summary["learners"]))
    console.print(job_table(summary))


def report_single(inner_steps: int | None, metrics: Mapping[str, float]) -> None:
    """Print what an ordinary run knows.

    Args:
        inner_steps: steps of its optimizer; None if they are not known here.
        metrics: of a validation after the last step.
    """
    table = Table("run", "")
    if inner_steps is not None:
        table.add_row("inner steps", f"{inner_steps:,}")
    for name, value in sorted(metrics.items()):
        table.add_row(name, _number(value))
    _console().print(table)


def learner_table(learners: list[Mapping[str, Any]]) -> Table:
    """One row a learner.

    Args:
        learners: `learners` of the summary.
    """
    table = Table()
    for name in ("learner", "lives", "steps", "tokens", "step median", "stall", "stall p99", "participation"):
        table.add_column(name, justify="right")
    for learner in learners:
        table.add_row(
            str(learner["learner_id"]),
            str(learner["incarnations"]),
            f"{learner['inner_steps']:,}",
            f"{learner['tokens']:,}",
            _seconds(learner["step_median_s"]),
            _seconds(learner["stall_s"]),
            _seconds(learner["stall_p99_s"]),
            _share(learner["participation"]),
        )
    return table


def job_table(summary: Mapping[str, Any]) -> Table:
    """One row a figure of the whole job.

    Args:
        summary: the content of ``summary.json``.
    """
    table = Table("job", summary["status"])
    tokens = " / ".join(f"{summary[f'tokens_{part}']:,}" for part in ("merged", "pending", "discarded"))
    val = summary["val"] or {}
    rows = {
        "wall clock (start-up before it)": f"{_seconds(summary['wall_s'])} ({_seconds(summary['startup_s'])})",
        "merges": f"{summary['merges']:,}",
        "mean members of a merge": _number(summary["mean_members"]),
        "tokens": f"{summary['tokens']:,}",
        "  merged / pending / discarded": tokens,
        "bytes up / down": f"{_megabytes(summary['bytes_up'])} / {_megabytes(summary['bytes_down'])}",
        "goodput": _share(summary["goodput"]),
    }
    rows |= {f"validation {name.removeprefix('val_')}": _number(value) for name, value in sorted(val.items())}
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _console() -> Console:
    """As wide as the terminal; where there is none, wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else 110)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} s" if value >= 10 else f"{1000 * value:,.1f} ms" if value < 1 else f"{value:.2f} s"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:,.1f} MB"
