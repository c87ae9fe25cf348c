"""A syncer that nobody supervises: it keeps `summary.json` itself, and says how its run ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.protocol.records import JoinRecord, RunRecord, TapeLine
from lightning_diloco.runtime.live_summary import LiveSummary
from lightning_diloco.runtime.service import ServiceOptions, SyncerService
from lightning_diloco.runtime.summary import SUMMARY_PERIOD_S, SummaryKeeper
from lightning_diloco.runtime.tape import TAPE_NAME, append_run_record

if TYPE_CHECKING:
    from lightning_diloco.runtime.metrics_endpoint import MetricsEndpoint

__all__ = ["LoneSyncer", "open_metrics"]

_log = logging.getLogger(__name__)


class LoneSyncer:
    """A service, and the supervisor's part of its run directory.

    Args:
        options: of the service.
        started_s: monotonic time at which the process started: `startup_s` counts from here to the first join.
        metrics: host and port to serve figures for Prometheus at (None: nowhere).
        shown: the figures that observers are told (None: those of this run directory).
    """

    def __init__(
        self, options: ServiceOptions, started_s: float, metrics: tuple[str, int] | None = None, shown: LiveSummary | None = None
    ) -> None:
        self._live = LiveSummary(options.run_dir)
        self.service = SyncerService(options, on_line=self._note_join, live=self._live if shown is None else shown)
        self._metrics_at = metrics
        self._metrics: MetricsEndpoint | None = None
        self._run_dir: Path = options.run_dir
        self._started_s = started_s
        self._startup_s: float | None = None
        self._has_begun = options.resume or options.rebuild
        self._has_ended = False

    def bind(self) -> str:
        """Open the metrics endpoint, and bind the service; returns the control endpoint with its real port.

        Raises:
            ConfigurationError: an address cannot be bound, or the folder belongs to another syncer or to an earlier job, or
                figures are wanted and `prometheus_client` is not installed.
        """
        # The endpoint first: a port that is taken must not leave a job in the folder.
        if self._metrics_at is not None:
            self._metrics = open_metrics(self._metrics_at, self._live, self.service.drops)
        try:
            return self.service.bind()
        except BaseException:
            self._close_metrics(linger=False)
            raise

    def abandon(self) -> None:
        """Let go of what `bind` has opened; nothing was served."""
        self._close_metrics(linger=False)
        self.service.abandon()

    @property
    def metrics_url(self) -> str:
        """Where the figures are ("": nowhere)."""
        return "" if self._metrics is None else self._metrics.url

    def run(self) -> Literal["finished", "stopped", "failed"]:
        """Serve on this thread until the job ends, then write the last summary; `bind` comes first.

        Returns:
            How the run ended; an error of the service is logged.
        """
        try:
            return self._run()
        finally:
            self._has_ended = True
            self._close_metrics(linger=True)

    def stop(self) -> None:
        """End the job or, if it has ended, the wait for the last scrape; from any thread."""
        if not self._has_ended:
            self.service.finish("stopped")
        elif self._metrics is not None:
            self._metrics.hurry()

    def _close_metrics(self, *, linger: bool) -> None:
        if self._metrics is not None:
            self._metrics.close(linger=linger)

    def _run(self) -> Literal["finished", "stopped", "failed"]:
        keeper = SummaryKeeper(self._run_dir, live=self._live)
        stop = threading.Event()

        def keep() -> None:
            """Keep the summary up to date."""
            while not stop.wait(SUMMARY_PERIOD_S):
                keeper.known = {} if self._startup_s is None else {"startup_s": self._startup_s}
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
        record = RunRecord(status=status, startup_s=self._startup_s, restarts={"learners": 0, "syncer": 0}, val=None)
        try:
            append_run_record(self._run_dir / TAPE_NAME, record)
        except OSError as error:
            _log.error("The end of the run could not be written to the tape: %s", error)
        keeper.finish()
        return status

    def _note_join(self, line: TapeLine) -> None:
        if self._startup_s is None and not self._has_begun and isinstance(line.record, JoinRecord):
            self._startup_s = time.monotonic() - self._started_s


def open_metrics(address: tuple[str, int], live: LiveSummary, drops: Callable[[], Mapping[str, int]] | None = None) -> MetricsEndpoint:
    """Serve figures for Prometheus.

    Args:
        address: host and port.
        live: the figures.
        drops: what the syncer's sockets have dropped so far, by reason.

    Raises:
        ConfigurationError: the address cannot be bound, or `prometheus_client` is not installed.
    """
    # Imported late: a syncer without an endpoint needs no package for one.
    try:
        from lightning_diloco.runtime.metrics_endpoint import MetricsEndpoint
    except ImportError as error:
        raise ConfigurationError(f"--metrics-port needs prometheus_client ({error}). Install it: pip install prometheus_client.") from error
    return MetricsEndpoint(address, live, drops)
