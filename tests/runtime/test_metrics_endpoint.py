"""The metrics endpoint by itself: what it tells is what the summary says, whoever connects, and its thread ends."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.live_summary import LiveSummary
from lightning_diloco.runtime.metrics_endpoint import LINGER_S, MetricsEndpoint
from lightning_diloco.runtime.summary import SummaryKeeper
from tests.metrics.tape_builder import two_learner_run
from tests.runtime.job_helpers import Background, until
from tests.runtime.metrics_reading import assert_equals_summary, samples_of, scrape

LOOPBACK = ("127.0.0.1", 0)


@pytest.fixture
def live(tmp_path: Path) -> LiveSummary:
    two_learner_run().write(tmp_path)
    return LiveSummary(tmp_path)


@pytest.fixture
def endpoint(live: LiveSummary) -> Iterator[MetricsEndpoint]:
    endpoint = MetricsEndpoint(LOOPBACK, live)
    yield endpoint
    endpoint.close(linger=False)


def test_what_is_scraped_is_the_summary(endpoint, live, tmp_path):
    assert samples_of(scrape(endpoint.url))["diloco_job_status", "status=running"] == 1.0
    summary = SummaryKeeper(tmp_path, live=live).finish()
    text = scrape(endpoint.url)
    assert_equals_summary(text, summary)
    samples = samples_of(text)
    assert samples["diloco_contributions_refused_total", "reason=overlap"] == 1.0
    assert samples["diloco_members", ""] == 0.0 and samples["diloco_job_info", "epoch=0,job_id=j1"] == 1.0
    assert samples["diloco_learner_staleness_versions", "learner=0"] == 0.0


def test_what_the_sockets_dropped_is_told_as_it_is_at_the_scrape(live):
    drops = {"revoked_key": 2}
    endpoint = MetricsEndpoint(LOOPBACK, live, lambda: drops)
    try:
        assert samples_of(scrape(endpoint.url))["diloco_messages_dropped_total", "reason=revoked_key"] == 2.0
        drops["revoked_key"] = 3
        assert samples_of(scrape(endpoint.url))["diloco_messages_dropped_total", "reason=revoked_key"] == 3.0
    finally:
        endpoint.close(linger=False)


def test_a_job_that_has_not_begun_has_no_samples_of_what_is_undefined(tmp_path):
    endpoint = MetricsEndpoint(LOOPBACK, LiveSummary(tmp_path))
    try:
        samples = samples_of(scrape(endpoint.url))
        assert samples["diloco_tokens_total", ""] == 0.0
        assert not [name for name, _ in samples if name in ("diloco_uptime_ratio", "diloco_goodput_ratio", "diloco_wall_seconds")]
    finally:
        endpoint.close(linger=False)


def test_names_are_prometheus_names_with_help_and_type(endpoint):
    families = list(text_string_to_metric_families(scrape(endpoint.url)))
    assert len({family.name for family in families}) == len(families) > 20
    for family in families:
        assert family.name.startswith("diloco_") and family.documentation.endswith(".") and family.type in ("counter", "gauge")
        assert all(sample.name == family.name + ("_total" if family.type == "counter" else "") for sample in family.samples)


def test_the_global_registry_is_left_alone(endpoint):
    scrape(endpoint.url)
    assert REGISTRY.get_sample_value("diloco_merges_total") is None


def test_peers_that_say_nothing_or_nonsense_or_one_byte_at_a_time_do_not_stop_it(endpoint, monkeypatch):
    monkeypatch.setattr("lightning_diloco.runtime.metrics_endpoint.PATIENCE_S", 1.0)
    address = ("127.0.0.1", int(endpoint.url.rpartition(":")[2].partition("/")[0]))
    for data in (
        b"\x00\xff" * 100 + b"\r\n\r\n",
        b"GET " + b"/" * 70_000 + b" HTTP/1.0\r\n\r\n",
        b"BREW /metrics HTTP/9.9\r\n\r\n",
        b"GET /\r\n",
    ):
        with socket.create_connection(address, timeout=5) as peer:
            peer.sendall(data)
    with socket.create_connection(address, timeout=5) as mute:
        assert "diloco_tokens_total" in scrape(endpoint.url)
        mute.settimeout(10)
        assert mute.recv(1) == b"", "it is hung up on"
    with socket.create_connection(address, timeout=5) as dripping:
        with pytest.raises(OSError):
            for _ in range(100):
                dripping.sendall(b"G")
                time.sleep(0.1)
    assert "diloco_tokens_total" in scrape(endpoint.url)


def test_a_port_that_is_taken_is_a_sentence(live):
    with socket.socket() as taken:
        taken.bind(LOOPBACK)
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*Choose a free port"):
            MetricsEndpoint(("127.0.0.1", port), live)


def test_it_waits_for_the_last_scrape_of_one_that_scrapes(endpoint, live, tmp_path):
    scrape(endpoint.url)
    SummaryKeeper(tmp_path, live=live).finish()
    closing = Background(lambda: endpoint.close(linger=True))
    time.sleep(0.3)
    assert not closing.is_done
    assert samples_of(scrape(endpoint.url))["diloco_job_status", "status=finished"] == 1.0
    closing.result(LINGER_S / 2)
    with pytest.raises(OSError):
        urllib.request.urlopen(endpoint.url, timeout=5)


def test_the_wait_for_the_last_scrape_is_said_and_can_be_ended(endpoint, live, tmp_path, caplog):
    scrape(endpoint.url)
    SummaryKeeper(tmp_path, live=live).finish()
    closing = Background(lambda: endpoint.close(linger=True))
    until(lambda: "Waiting up to 20 s for the last scrape" in caplog.text)
    assert not closing.is_done
    endpoint.hurry()
    closing.result(LINGER_S / 2)
    assert closing.is_done


def test_where_nobody_scrapes_nobody_is_waited_for(live, tmp_path):
    endpoint = MetricsEndpoint(LOOPBACK, live)
    SummaryKeeper(tmp_path, live=live).finish()
    Background(lambda: endpoint.close(linger=True)).result(LINGER_S / 2)
    endpoint.close(linger=True)
    assert "diloco-metrics" not in {thread.name for thread in threading.enumerate()}
