"""The syncer's figures for Prometheus, over HTTP at a port of its own.

A scrape reads `LiveSummary` on the endpoint's thread: the fold that `summary.json` is written from. So the two agree, and the syncer's loop
has no part in it. One request is served at a time, and a peer that says nothing is hung up on, so strangers cost one thread and one socket.
There is no authentication and no encryption; that is why a bare port listens on loopback.

After the job's end the endpoint stays until its last figures were fetched once, `LINGER_S` at most, if anybody has fetched any lately: a
scraper that comes every 15 s would hardly ever see how a job ended.

Names, types and what each is in `summary.json`: ``docs/watching.md``. A figure that is undefined (0/0) has no sample.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.live_summary import LiveSummary, Reading

__all__ = ["JobCollector", "MetricsEndpoint"]

_log = logging.getLogger(__name__)

LINGER_S: Final = 20.0
"""The longest stay after the job's end."""
LATELY_S: Final = 120.0
"""Who has fetched within so many seconds is waited for."""
PATIENCE_S: Final = 5.0
"""A request that takes longer, whoever is slow, is hung up on: nobody may hold up the others, or the end of the process."""
_Values = Mapping[Any, float | None]
"""By the tuple of the labels' values."""
_STATUSES: Final = ("running", "finished", "stopped", "failed")


class JobCollector(Collector):
    """Turns one reading into Prometheus' metric families.

    Args:
        live: the figures.
        drops: messages and connections that the syncer's sockets have dropped so far, by reason. None: they are another process's.
    """

    def __init__(self, live: LiveSummary, drops: Callable[[], Mapping[str, int]] | None = None) -> None:
        self._live, self._drops = live, drops
        self.collected_s: float | None = None
        """When figures were fetched last."""
        self.told_last = threading.Event()
        """Set once the final figures were fetched."""

    def collect(self) -> Iterator[Metric]:
        """All families, of one moment."""
        reading = self._live.read()
        self.collected_s = time.monotonic()
        yield from _job(reading)
        yield from _learners(reading)
        if self._drops is not None:
            dropped = {(reason,): float(count) for reason, count in self._drops().items()}
            yield _counter("messages_dropped", "Messages and connections that were not taken, by reason.", dropped, "reason")
        if reading.is_final:
            self.told_last.set()


class MetricsEndpoint:
    """Serves the figures of one job on a thread of its own.

    Args:
        address: host and port; port 0 takes a free one.
        live: the figures.
        drops: see `JobCollector`.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """

    def __init__(self, address: tuple[str, int], live: LiveSummary, drops: Callable[[], Mapping[str, int]] | None = None) -> None:
        self._collector = JobCollector(live, drops)
        # One of its own: what other code of this process has put into the global one is not about the job.
        registry = CollectorRegistry()
        registry.register(self._collector)
        host, port = address
        kind = _Server6 if ":" in host else _Server
        try:
            self._server = make_server(host, port, make_wsgi_app(registry), kind, handler_class=_Handler)
        except (OSError, OverflowError) as error:
            raise ConfigurationError(
                f"--metrics-port: cannot listen on {host}:{port} ({error}). Choose a free port of this machine."
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="diloco-metrics", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Wait for no scrape; from any thread."""
        self._collector.told_last.set()

    def close(self, *, linger: bool) -> None:
        """End the thread, after the request that it is serving; idempotent.

        Args:
            linger: wait for the last figures to be fetched; see the top of this file.
        """
        collected_s = self._collector.collected_s
        if linger and collected_s is not None and time.monotonic() - collected_s < LATELY_S:
            if not self._collector.told_last.is_set():
                _log.warning("Waiting up to %g s for the last scrape of the figures; Ctrl-C or SIGTERM ends the wait.", LINGER_S)
            self._collector.told_last.wait(LINGER_S)
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Requests are not logged."""


class _Server(WSGIServer):
    def server_bind(self) -> None:
        """Bind as the base class does, without its question for this machine's full name, which the DNS may answer late."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve one request, as long as patience lasts. A socket's own timeout would begin anew with every byte."""
        watchdog = threading.Timer(PATIENCE_S, _hang_up, (request,))
        watchdog.daemon = True
        watchdog.start()
        try:
            super().finish_request(request, client_address)
        finally:
            watchdog.cancel()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that hangs up is no error of ours."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def _hang_up(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)


def _job(reading: Reading) -> Iterator[Metric]:
    summary = reading.summary
    yield _gauge("job_info", "The job.", {(summary["job_id"] or "", str(reading.epoch)): 1.0}, "job_id", "epoch")
    yield _gauge("job_status", "1 for the job's status.", {(s,): float(s == summary["status"]) for s in _STATUSES}, "status")
    yield _gauge("members", "Learners that have joined and not left.", {(): reading.num_members})
    yield _gauge("wall_seconds", "Time since the first join.", {(): summary["wall_s"]})
    yield _gauge("goodput_ratio", "Useful step time over the time of all slots.", {(): summary["goodput"]})
    yield _gauge("goodput_alive_ratio", "Useful step time over the time of joined slots.", {(): summary["goodput_alive"]})
    yield _gauge("uptime_ratio", "Share of the time in which at least one learner stepped.", {(): summary["uptime"]})
    yield _gauge("merge_members_mean", "Learners per merge.", {(): summary["mean_members"]})
    yield _counter("merges", "Merges of fragments of parameters.", {(): summary["merges"]})
    yield _counter("tokens", "Tokens trained.", {(): summary["tokens"]})
    yield _counter("tokens_merged", "Tokens in the global model, weighted by parameters.", {(): summary["tokens_merged"]})
    yield _gauge("tokens_pending", "Tokens whose fate is open.", {(): summary["tokens_pending"]})
    discarded = {(reason,): tokens for reason, tokens in summary["discarded_by_reason"].items()}
    yield _counter("tokens_discarded", "Tokens that will never be merged, by reason.", discarded, "reason")
    moved = {("up",): summary["bytes_up"], ("down",): summary["bytes_down"]}
    yield _counter("payload_bytes", "Payload bytes from learners (up) and to them (down).", moved, "direction")
    yield _counter("contributions_refused", "Contributions refused, by reason.", {(r,): n for r, n in reading.refused.items()}, "reason")
    versions = {(str(f["fragment_id"]),): f["version"] for f in summary["fragments"]}
    yield _gauge("fragment_version", "n of the published version.", versions, "fragment")


def _learners(reading: Reading) -> Iterator[Metric]:
    rows = reading.summary["learners"]
    for name, figure, text in (
        ("inner_steps", "inner_steps", "Inner steps of all lives."),
        ("tokens", "tokens", "Tokens of all lives."),
        ("tokens_discarded", "discarded", "Tokens of it that will never be merged, weighted by parameters."),
        ("rounds_merged", "rounds_merged", "Merges that hold a contribution of it."),
        ("rounds_eligible", "rounds_eligible", "Merges that it could have been in."),
        ("stall_seconds", "stall_s", "Time of its training thread in outer-sync code."),
        ("incarnations", "incarnations", "Lives."),
    ):
        yield _counter(f"learner_{name}", text, {(str(x["learner_id"]),): x[figure] for x in rows}, "learner")
    members = {(str(m),): float(x.is_member) for m, x in reading.learners.items()}
    yield _gauge("learner_is_member", "Whether it has joined and not left.", members, "learner")
    staleness = {(str(m),): x.staleness_versions for m, x in reading.learners.items()}
    yield _gauge("learner_staleness_versions", "Mean over its last merged contributions.", staleness, "learner")


def _gauge(name: str, text: str, values: _Values, *labels: str) -> Metric:
    return _filled(GaugeMetricFamily(f"diloco_{name}", text, labels=labels), values)


def _counter(name: str, text: str, values: _Values, *labels: str) -> Metric:
    return _filled(CounterMetricFamily(f"diloco_{name}", text, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: _Values) -> Metric:
    for labels, value in values.items():
        if value is not None:
            family.add_metric(labels, value)
    return family
