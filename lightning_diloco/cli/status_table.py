"""A job's status as text: a header, and a row for each learner.

Names, devices and reasons are a peer's own words. On a terminal they must not be able to move the cursor or change colours, so whatever is
not printable is shown as a question mark (`runtime.complaints.printable`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_diloco.runtime.complaints import printable

if TYPE_CHECKING:
    from lightning_diloco.runtime.observer import LearnerStatus, Status

__all__ = ["status_text"]

_COLUMNS = (
    *("learner", "life", "device", "state", "heard", "step", "tokens", "versions", "part.", "stale", "steps/s", "tokens/s", "up", "down"),
    "last error",
)
_LEFT = ("device", "state", "last error")
"""Words; all others are numbers and end on one line."""
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def status_text(status: Status) -> str:
    """Several lines, each with its end; see the module's docstring.

    Args:
        status: as the syncer told it.
    """
    lines = [*_header(status), ""]
    lines += _aligned([_COLUMNS, *(_row(x) for x in status.learners)])
    if status.num_learners > len(status.learners):
        lines.append(f"... and {status.num_learners - len(status.learners)} more learners")
    return "\n".join(lines) + "\n"


def _header(status: Status) -> list[str]:
    how_long = "for" if status.status == "running" else "after"
    since = "" if status.wall_s is None else f" {how_long} {_duration(status.wall_s)}"
    merged, pending, discarded = status.tokens_merged, status.tokens_pending, status.tokens_discarded
    lines = [
        f"job {printable(status.job_id)}, epoch {status.epoch}: {status.status}{since}",
        f"learners   {status.num_members} joined, {status.num_active} active",
        f"merges     {status.merges:,}, {_number(status.mean_members)} members each; {status.num_fragments} fragments at versions "
        f"{_range(status.version_min, status.version_max)}, {status.open_rounds} rounds open",
        f"tokens     {status.tokens:,}: merged {merged:,}, pending {pending:,}, discarded {discarded:,}",
        f"payloads   {_bytes(status.bytes_up)} up, {_bytes(status.bytes_down)} down",
        f"so far     uptime {_share(status.uptime)}, goodput {_share(status.goodput)}",
    ]
    if status.refused_join is not None:
        lines.append(f"turned away {_duration(status.refused_join.age_s)} ago: {printable(status.refused_join.what)}")
    return lines


def _row(x: LearnerStatus) -> tuple[str, ...]:
    return (
        str(x.learner_id),
        str(x.incarnation),
        printable(x.device),
        x.state,
        "-" if x.heard_age_s is None else _duration(x.heard_age_s),
        f"{x.inner_step:,}",
        f"{x.tokens:,}",
        _range(x.version_min, x.version_max),
        _share(x.participation),
        _number(x.staleness_versions),
        _number(x.steps_per_s),
        "-" if x.tokens_per_s is None else f"{x.tokens_per_s:,.0f}",
        _bytes(x.bytes_up),
        _bytes(x.bytes_down),
        "" if x.fault is None else f"{_duration(x.fault.age_s)} ago: {printable(x.fault.what)}",
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return [
        "  ".join(cell.ljust(w) if name in _LEFT else cell.rjust(w) for cell, w, name in zip(row, widths, _COLUMNS, strict=True)).rstrip()
        for row in rows
    ]


def _range(low: int | None, high: int | None) -> str:
    return "-" if low is None or high is None else str(low) if low == high else f"{low}..{high}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in _UNITS:
        if size < 1000 or unit == _UNITS[-1]:
            break
        size /= 1000
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
