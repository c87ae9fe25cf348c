"""`summary.json`: written atomically while a job runs, and once more at its end.

The keeper folds the tape (`LiveSummary`), so the figures of a running job and of a finished one come from the same lines. It owns no
thread: the supervisor's loop (inline: the syncer's) calls `tick`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, Final

from lightning_diloco.errors import DiLoCoError
from lightning_diloco.metrics import LedgerError
from lightning_diloco.runtime.live_summary import LiveSummary

__all__ = ["SUMMARY_NAME", "SUMMARY_PERIOD_S", "SummaryKeeper", "write_summary"]

SUMMARY_NAME: Final = "summary.json"
"""Name of the summary inside a run directory."""
SUMMARY_PERIOD_S: Final = 5.0
"""Seconds between two summaries of a running job."""

_log = logging.getLogger(__name__)


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Replace `summary.json` in one step; a reader sees the old one or the new one. Numbers that are not finite become null.

    Raises:
        OSError: the disk failed; the old summary is still there.
    """
    path = run_dir / SUMMARY_NAME
    temporary = run_dir / f".{SUMMARY_NAME}.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(_finite(summary), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class SummaryKeeper:
    """Keeps `summary.json` in step with the tape.

    Args:
        run_dir: the run directory; its tape need not exist yet.
        period_s: seconds between two writings.
        live: a fold over the same tape that others read too (None: one of its own).
    """

    def __init__(self, run_dir: Path, period_s: float = SUMMARY_PERIOD_S, live: LiveSummary | None = None) -> None:
        self.run_dir = run_dir
        self.error: Exception | None = None
        """The first error (disk, tape or ledger), or None. It never ends a run; it is logged once."""
        self.known: dict[str, Any] = {}
        """What only the supervisor knows (`startup_s`, `restarts`): overrides the running job's figures, not those of a run record."""
        self._period_s = period_s
        self._due_s: float | None = None
        self._live = LiveSummary(run_dir) if live is None else live

    def tick(self, now_s: float) -> bool:
        """Read what is new and write the summary if it is due; never raises for the disk, the tape or the ledger.

        Args:
            now_s: any monotonic clock.

        Returns:
            Whether a summary was written.
        """
        if self._due_s is not None and now_s < self._due_s:
            return False
        self._due_s = now_s + self._period_s
        try:
            self._live.feed()
            write_summary(self.run_dir, self._live.result("running", is_strict=False) | self.known)
        except (OSError, DiLoCoError) as error:
            self._note(error)
            return False
        return True

    def finish(self) -> dict[str, Any]:
        """Fold the rest of the tape, write the last summary and return it.

        The ledger is checked. A violation is logged and kept as `error`, and the summary is written as for a running job, in which a
        learner has trained at least what is accounted for: the run's result is not withheld for it.
        """
        try:
            self._live.feed()
        except (OSError, DiLoCoError) as error:
            self._note(error)
        try:
            summary = self._live.result()
        except LedgerError as error:
            self._note(error)
            summary = self._live.result(is_strict=False)
        if not self._live.has_run_record:
            summary |= self.known
        self._live.settle(summary)
        try:
            write_summary(self.run_dir, summary)
        except OSError as error:
            self._note(error)
        return summary

    def _note(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            _log.error("The summary of %s is incomplete: %s", self.run_dir, error)


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
