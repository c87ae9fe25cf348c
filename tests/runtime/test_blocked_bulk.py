"""A firewall that lets control through and payloads not: a join says so and ends, a member says so and goes on; slow is not shut."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from lightning_diloco.errors import SyncerUnavailableError
from lightning_diloco.protocol.messages import ShardAddress
from lightning_diloco.runtime.service import SyncerService
from tests.runtime.job_helpers import CONFIG, Background, Job, make_module, running_job, train, until
from tests.runtime.test_client_links import behind_proxies, resend_soon
from tests.runtime.transport_proxy import TransportProxy

RULE = "A learner needs both ports of its syncer"


@contextmanager
def shut_port(kind: str) -> Iterator[socket.socket]:
    """A port at which connections are "refused" (nobody listens) or "dropped" (no answer at all: the queue of the listener is full)."""
    with socket.socket() as port, socket.socket() as first, socket.socket() as second:
        port.bind(("127.0.0.1", 0))
        if kind == "dropped":
            port.listen(0)
            for filler in (first, second):
                filler.setblocking(False)
                filler.connect_ex(port.getsockname())
            time.sleep(0.05)
        yield port


def tell_bulk(service: SyncerService, port: int) -> None:
    """Let the syncer tell those who join that payloads go to another port of this machine."""
    shards = (ShardAddress(bulk_endpoint=f"tcp://127.0.0.1:{port}"),)
    told = service._machine.job
    told.options = dataclasses.replace(told.options, shards=shards)


def bulk_port(job: Job) -> int:
    port = urlsplit(job.service.bulk_endpoint).port
    assert port is not None
    return port


def said(caplog: Any, words: str = "No connection for payloads") -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


@pytest.mark.parametrize(("kind", "learner_id"), [("refused", 0), ("dropped", 0), ("refused", 1)])
def test_a_join_without_a_way_for_payloads_says_so_once_and_ends_with_the_same_sentence(tmp_path, monkeypatch, caplog, kind, learner_id):
    """Learner 0 founds, the other one waits for it: neither can become a member."""
    monkeypatch.setattr("lightning_diloco.runtime.link_care.SAY_S", 0.5)
    with running_job(tmp_path, "tcp") as job, shut_port(kind) as shut:
        tell_bulk(job.service, shut.getsockname()[1])
        number, start_s = shut.getsockname()[1], time.monotonic()
        with pytest.raises(SyncerUnavailableError) as caught:
            job.client(learner_id, join_timeout_s=2.0).join()
        assert 2.0 <= time.monotonic() - start_s < 8.0
        assert not job.machine.job.is_founded
    (line,) = said(caplog)
    for text in (line, str(caught.value)):
        assert f"Nothing answers at tcp://127.0.0.1:{number}, and {job.endpoint} does. {RULE}" in text
        assert f"let TCP port {number} through the firewall" in text
    assert "There was no connection for payloads for 2 s" in str(caught.value)


def test_what_listens_there_and_hangs_up_is_told_apart(tmp_path, caplog):
    with running_job(tmp_path, "tcp") as job, behind_proxies(job) as (control, bulk):
        bulk.cut(stay_closed=True)
        with pytest.raises(SyncerUnavailableError, match=rf"What answers at tcp://127\.0\.0\.1:{bulk.port} hangs up .*{RULE}"):
            job.client(0, endpoint=f"tcp://127.0.0.1:{control.port}", join_timeout_s=1.5).join()
    assert said(caplog) == [], "the patience was shorter than the time after which it is said"


@pytest.mark.parametrize("kind", ["refused", "dropped"])
def test_a_way_for_payloads_that_opens_later_is_used(tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setattr("lightning_diloco.runtime.link_care.SAY_S", 0.5)
    with running_job(tmp_path, "tcp") as job, shut_port(kind) as port:
        tell_bulk(job.service, port.getsockname()[1])
        client = job.client(0)
        join = Background(client.join)
        until(lambda: bool(said(caplog)))
        assert not join.is_done
        with TransportProxy(bulk_port(job), listener=port.dup()):
            assert join.result().role == "member"
            train(client, 20)
            client.leave("limit")
            client.close()
        summary = job.finish()
    assert summary["tokens_merged"] == 20 * 16
    assert len(said(caplog)) == len(said(caplog, "There is a connection to ")) == 1


def test_a_slow_way_for_payloads_is_no_shut_one(tmp_path, monkeypatch, caplog):
    """The founding and the reception each take longer than the patience, at a few KB/s behind a latency."""
    monkeypatch.setattr("lightning_diloco.runtime.link_care.SAY_S", 1.0)
    with running_job(tmp_path, "tcp") as job, behind_proxies(job) as (control, bulk):
        bulk.bytes_per_s, bulk.delay_s = 30_000.0, 0.1
        for learner_id in range(2):
            start_s = time.monotonic()
            client = job.client(learner_id, make_module(0, width=120), endpoint=f"tcp://127.0.0.1:{control.port}", join_timeout_s=1.5)
            client.join()
            assert time.monotonic() - start_s > 1.5, "the link was too quick to show anything"
    assert said(caplog) == []


def test_a_way_for_payloads_that_was_there_is_waited_for_longer_than_the_patience(tmp_path):
    with running_job(tmp_path, "tcp") as job, behind_proxies(job) as (control, bulk):
        bulk.bytes_per_s = 30_000.0
        client = job.client(0, make_module(0, width=120), endpoint=f"tcp://127.0.0.1:{control.port}", join_timeout_s=1.5)
        resend_soon(client._transport)
        join = Background(client.join)
        until(lambda: client._transport.bulk_link.is_up and client.figures.bytes_up > 0)
        bulk.cut(stay_closed=True)
        time.sleep(2.5)
        assert not join.is_done and not client._transport.bulk_link.is_up
        bulk.reopen()
        assert join.result().role == "member"


def test_a_member_without_a_way_for_payloads_says_so_once_and_trains_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lightning_diloco.runtime.link_care.SAY_LATER_S", 1.0)
    with running_job(tmp_path, "tcp") as job, behind_proxies(job) as (control, bulk):
        client = job.client(0, endpoint=f"tcp://127.0.0.1:{control.port}")
        client.join()
        train(client, 20)
        bulk.cut(stay_closed=True)
        end_s = time.monotonic() + 20
        while not said(caplog):
            assert time.monotonic() < end_s
            train(client, 5)
        train(client, 300, sleep_s=0.005)
        assert len(said(caplog)) == 1 and f"tcp://127.0.0.1:{bulk.port}" in said(caplog)[0]
        assert client.fenced is None and client.stop_reason is None and not client.lost_syncer
        bulk.reopen()
        until(lambda: bool(said(caplog, "There is a connection to ")))
        client.leave("limit")
        summary = job.finish()
    assert summary["tokens"] == summary["tokens_merged"] == client.figures.tokens


def test_a_syncer_that_is_away_altogether_is_no_shut_way_for_payloads(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lightning_diloco.runtime.link_care.SAY_LATER_S", 1.0)
    monkeypatch.setattr("lightning_diloco.runtime.link_care.SILENT_S", 0.4)
    monkeypatch.setattr("lightning_diloco.runtime.link_care.SILENT_HEARTBEATS", 2)
    with running_job(tmp_path, "tcp") as job, behind_proxies(job) as proxies:
        client = job.client(0, endpoint=f"tcp://127.0.0.1:{proxies[0].port}")
        client.join()
        for proxy in proxies:
            proxy.cut(stay_closed=True)
        time.sleep(2.5)
        for proxy in proxies:
            proxy.reopen()
        heard_s = client._loop.reports.heard_s
        until(lambda: client._loop.reports.heard_s > heard_s and client._transport.bulk_link.is_up)
        client.leave("limit")
    assert said(caplog) == []


@pytest.mark.slow
def test_the_real_times(tmp_path, caplog):
    """One line within ten seconds, and the end after a minute, as with a syncer that is silent."""
    with running_job(tmp_path, "tcp", CONFIG) as job, shut_port("dropped") as shut:
        tell_bulk(job.service, shut.getsockname()[1])
        start_s = time.monotonic()
        join = Background(job.client(0).join)
        until(lambda: bool(said(caplog)))
        assert 7.0 < time.monotonic() - start_s < 10.0
        with pytest.raises(SyncerUnavailableError, match="There was no connection for payloads for 60 s"):
            join.result(100)
        assert 60.0 <= time.monotonic() - start_s < 66.0
    assert len(said(caplog)) == 1
