"""A syncer that nobody supervises: it keeps `summary.json` itself, and says how its run ended."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Literal

from lightning_diloco.protocol.records import JoinRecord, RunRecord, TapeLine
from lightning_diloco.runtime.service import ServiceOptions, SyncerService
from lightning_diloco.runtime.summary import SUMMARY_PERIOD_S, SummaryKeeper
from lightning_diloco.runtime.tape import TAPE_NAME, append_run_record

__all__ = ["LoneSyncer"]

_log = logging.getLogger(__name__)


class LoneSyncer:
    """A service, and the supervisor's part of its run directory.

    Args:
        options: of the service.
        started_s: monotonic time at which the process started: `startup_s` counts from here to the first join.
    """

    def __init__(self, options: ServiceOptions, started_s: float) -> None:
        self.service = SyncerService(options, on_line=self._note_join)
        self._run_dir: Path = options.run_dir
        self._started_s = started_s
        self._startup_s: float | None = None

    def run(self) -> Literal["finished", "stopped", "failed"]:
        """Serve on this thread until the job ends, then write the last summary; the service has been bound.

        Returns:
            How the run ended; an error of the service is logged.
        """
        keeper = SummaryKeeper(self._run_dir)
        stop = threading.Event()

        def keep() -> None:
            """Keep the summary up to date."""
            while not stop.wait(SUMMARY_PERIOD_S):
                keeper.tick(time.monotonic())

        thread = threading.Thread(target=keep, name="diloco-summary", daemon=True)
        thread.start()
        try:
            self.service.run()
        except Exception:  # the service has logged it; what is on the tape is still worth a summary
            _log.error("The job ends with an error; %s holds what was merged until then.", self._run_dir)
        finally:
            stop.set()
            thread.join()
        status = self.service.status or "failed"
        record = RunRecord(status=status, startup_s=self._startup_s or 0.0, restarts={"learners": 0, "syncer": 0}, val=None)
        try:
            append_run_record(self._run_dir / TAPE_NAME, record)
        except OSError as error:
            _log.error("The end of the run could not be written to the tape: %s", error)
        keeper.finish()
        return status

    def _note_join(self, line: TapeLine) -> None:
        if self._startup_s is None and isinstance(line.record, JoinRecord):
            self._startup_s = time.monotonic() - self._started_s
