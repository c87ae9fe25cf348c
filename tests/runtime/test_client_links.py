"""Bad links: answers half a second late, and connections that break again and again. Training goes on; nothing is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from torch import nn

from lightning_diloco.protocol.messages import ShardAddress
from lightning_diloco.runtime.client import LearnerClient
from tests.runtime.job_helpers import CONFIG, Background, Job, make_module, running_job, train, until
from tests.runtime.transport_proxy import TransportProxy

SLOW_STEP_S = 0.05


@contextlib.contextmanager
def behind_proxies(job: Job, **numbers: Any) -> Iterator[tuple[TransportProxy, TransportProxy]]:
    """Proxies before the syncer's control and bulk sockets; whoever dials the first one is told the second."""
    control, bulk = (urlsplit(e).port for e in (job.endpoint, job.service._transport.bulk_endpoint))
    with TransportProxy(control, **numbers) as control_proxy, TransportProxy(bulk, **numbers) as bulk_proxy:
        shards = (ShardAddress(bulk_endpoint=f"tcp://127.0.0.1:{bulk_proxy.port}"),)
        job.machine.job.options = dataclasses.replace(job.machine.job.options, shards=shards)
        yield control_proxy, bulk_proxy
        for client in job.clients:
            client.close()


def _gaps(is_over: Callable[[int], bool], client: LearnerClient | None) -> list[float]:
    gaps: list[float] = []
    while not is_over(len(gaps)):
        start_s = time.perf_counter()
        time.sleep(SLOW_STEP_S)
        if client is not None:
            client.boundary(tokens=1)
        gaps.append(time.perf_counter() - start_s)
    return gaps


def test_a_syncer_that_answers_half_a_second_late_makes_no_step_longer_than_one_and_a_half_medians(tmp_path):
    """The noise of the machine is measured by the same loop without a client on another thread, at the same time, and is allowed for."""
    module = nn.Sequential(*(nn.Linear(450, 450) for _ in range(3)))
    config = dataclasses.replace(CONFIG, num_fragments=3, sync_interval_steps=6, heartbeat_s=1.0)
    with running_job(tmp_path, "tcp", config) as job, behind_proxies(job) as proxies:
        client = job.client(0, module, endpoint=f"tcp://127.0.0.1:{proxies[0].port}")
        client.join()
        train_once(client, module)
        for proxy in proxies:
            proxy.delay_s = 0.5
        done = threading.Event()
        reference = Background(lambda: _gaps(lambda count: done.is_set(), None))
        gaps = _gaps(lambda count: count >= 300 or (count >= 110 and client.figures.merges >= 2), client)
        done.set()
        noise = reference.result()
        assert client.figures.merges >= 2, "the syncer took part"
    allowed_s = max(noise) - statistics.median(noise)
    assert max(gaps) <= 1.5 * statistics.median(gaps) + allowed_s, (max(gaps), statistics.median(gaps), max(noise))


def train_once(client: LearnerClient, module: nn.Module) -> None:
    """One step with its allocations, before anything is measured."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.999)
    client.boundary(tokens=1)


@pytest.mark.slow
def test_connections_that_break_again_and_again_lose_nothing_and_stop_nobody(tmp_path):
    config = dataclasses.replace(CONFIG, min_quorum=2)
    with running_job(tmp_path, "tcp", config) as job, behind_proxies(job) as proxies:
        clients = [job.client(i, make_module(i), endpoint=f"tcp://127.0.0.1:{proxies[0].port}") for i in range(2)]
        for client in clients:
            resend_soon(client._loop._transport)
        resend_soon(job.service._transport)
        for join in [Background(client.join) for client in clients]:
            join.result()
        runs = [Background(lambda c=client: train(c, 500, sleep_s=0.006)) for client in clients]
        num_cuts = 0
        while not all(run.is_done for run in runs):
            # By steps, not by time: on a slow machine there would be more cuts and fewer merges.
            until = clients[0].figures.inner_steps + 60
            while clients[0].figures.inner_steps < until and not all(run.is_done for run in runs):
                time.sleep(0.01)
            for proxy in proxies:
                proxy.cut()
            num_cuts += 1
        for run in runs:
            run.result()
        leaves = [Background(lambda c=client: c.leave("limit")) for client in clients]
        time.sleep(0.02)
        for proxy in proxies:
            proxy.cut()
        for leave in leaves:
            leave.result()
        summary = job.finish()
    assert num_cuts >= 6 and proxies[0].num_connections > 12
    assert summary["tokens"] == summary["tokens_merged"] == 2 * 500 * 16
    assert all(fragment["pending"] == fragment["discarded"] == 0 for fragment in summary["fragments"])
    assert all(learner["incarnations"] == 1 for learner in summary["learners"])
    assert summary["merges"] > 50


def resend_soon(transport: Any) -> None:
    """What was lost is offered again after half a second instead of five."""
    options = transport._options
    for target in (options, *(p for p in transport._outgoing.values())):
        name = "resend_after_s" if target is options else "_resend_after_s"
        object.__setattr__(target, name, 0.5)


def test_a_learner_without_its_syncer_goes_on_says_so_and_is_back_when_the_link_is(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_diloco.runtime.reporting.SILENT_S", 0.5)
    config = dataclasses.replace(CONFIG, heartbeat_s=0.05)
    with running_job(tmp_path, "tcp", config) as job, behind_proxies(job) as proxies:
        client = job.client(0, endpoint=f"tcp://127.0.0.1:{proxies[0].port}")
        client.join()
        resend_soon(client._loop._transport)
        train(client, 20)
        for proxy in proxies:
            proxy.cut(stay_closed=True)
        end_s = time.monotonic() + 10
        while not client.lost_syncer:
            assert time.monotonic() < end_s
            train(client, 5)
        before = client.figures.inner_steps
        train(client, 50)
        assert client.figures.inner_steps == before + 50
        for proxy in proxies:
            proxy.reopen()
        while client.lost_syncer:
            assert time.monotonic() < end_s + 10
            train(client, 5)
        until(lambda: job.machine.job.members.by_id(0) is not None)
        client.leave("limit")
        summary = job.finish()
    assert summary["tokens"] == summary["tokens_merged"] == client.figures.tokens
