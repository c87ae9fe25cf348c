"""What learners have said, recorded and played back without keys while the job runs: a ROUTER takes it for them, and nothing changes.

Whoever plays it back has a member's name, so that member's connection is cut (ROUTER_HANDOVER). It finds that out by ZeroMQ's heartbeats
(control after 17 s, bulk after up to 80), and dials again; here they are quicker. With keys nobody gets so far (`test_keyed_links.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import socket
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning_diloco.runtime.client import LearnerClient
from lightning_diloco.runtime.transport.options import TransportOptions
from tests.runtime.job_helpers import CONFIG, Background, Job, running_job, train, until
from tests.runtime.test_client_links import behind_proxies, resend_soon
from tests.tape_checker import load_tape

GREETING_BYTES = 64
"""ZeroMQ answers the greeting before it reads on; who sends all in one piece is hung up on."""

HEARD_S = 0.5
"""So long whoever plays a record back stays."""


def play(job: Job, records: Iterable[tuple[str, bytes]]) -> None:
    """Say it all again, over a connection for each record, to the syncer itself."""
    for endpoint, record in records:
        with socket.create_connection(("127.0.0.1", urlsplit(endpoint).port), timeout=10) as line:
            line.settimeout(HEARD_S)
            try:
                line.sendall(record[:GREETING_BYTES])
                assert line.recv(GREETING_BYTES)
                line.sendall(record[GREETING_BYTES:])
                end_s = time.monotonic() + HEARD_S
                while line.recv(65536) and time.monotonic() < end_s:
                    pass
            except (TimeoutError, ConnectionError):
                continue  # nothing more is said to it, or its name's owner is back


def train_until(client: LearnerClient, *, num_merges: int) -> None:
    until(lambda: train(client, 10) or client.figures.merges >= num_merges, 60)


def state(job: Job) -> dict[str, Any]:
    """Accounts, members and versions, as the rules have them."""
    rules = job.machine.job
    accounts = {
        (m, f.fragment_id): (rules.ledger.tokens(m), rules.ledger.merged(m, f.fragment_id), rules.ledger.discarded(m, f.fragment_id))
        for m in rules.ledger.learners()
        for f in rules.fragments
    }
    members = [(m.learner_id, m.incarnation, m.session, m.inner_step, m.tokens) for m in rules.members.present()]
    return {"accounts": accounts, "members": members, "versions": [c.version for c in rules.currents]}


def is_quiet(job: Job, client: LearnerClient) -> bool:
    """Whether all is told, and nothing on its way: nobody takes a step meanwhile."""
    before = state(job)
    time.sleep(0.5)
    fragments = client._machine.state.fragments
    return state(job) == before and all(f.held == c.version for f, c in zip(fragments, job.machine.job.currents, strict=True))


def has_told_all(job: Job, client: LearnerClient) -> bool:
    """Whether the syncer hears it again."""
    time.sleep(0.3)
    return job.machine.job.ledger.tokens(0) == 16 * client.figures.inner_steps


def lines(run_dir: Path) -> Counter[str]:
    return Counter(line["event"] for line in load_tape(run_dir / "tape.jsonl"))


def test_what_a_member_and_one_that_has_left_have_said_changes_nothing_when_it_is_played_back(run_dir, monkeypatch):
    quick = functools.partial(TransportOptions, heartbeat_interval_s=0.2, heartbeat_timeout_s=1.0)
    monkeypatch.setattr("lightning_diloco.runtime.transport.base.TransportOptions", quick)
    # The gate has its own tests: a toy that comes to rest and then moves again is no fault here.
    config = dataclasses.replace(CONFIG, norm_gate=None)
    with running_job(run_dir, "tcp", config) as job, behind_proxies(job) as (control, bulk):
        stays, leaves = (job.client(i, endpoint=f"tcp://127.0.0.1:{control.port}") for i in range(2))
        for client in (stays, leaves):
            client.join()
            resend_soon(client._loop._transport)
        resend_soon(job.service._transport)
        runs = [Background(lambda c=client: train_until(c, num_merges=40)) for client in (stays, leaves)]
        for run in runs:
            run.result()
        leaves.leave("limit")
        left_at = leaves.figures.inner_steps
        leaves.close()
        until(lambda: is_quiet(job, stays))
        endpoints = (job.endpoint, job.service.bulk_endpoint)
        records = [(e, bytes(r)) for e, proxy in zip(endpoints, (control, bulk), strict=True) for r in proxy.recorded]
        assert len(records) == 4
        before, told, stats = state(job), lines(run_dir), job.service._transport.stats
        heard, repeated = stats.control_received, stats.drops.get("duplicate_begin", 0)
        assert [m[0] for m in before["members"]] == [0] and before["accounts"][1, 0][0] == left_at * 16
        play(job, records)
        until(lambda: stats.control_received > heard + 50)  # the syncer took it for them
        until(lambda: stats.drops.get("duplicate_begin", 0) > repeated + 20)  # and knew their contributions
        until(lambda: job.machine.job.members.by_id(0).stage == "joined")
        until(lambda: is_quiet(job, stays))
        assert state(job) == before
        assert set(lines(run_dir) - told) <= {"progress", "publish"}, "no other line is written"
        until(lambda: train(stays, 10) or has_told_all(job, stays))
        # And while it trains: its own words come between.
        again = Background(lambda: [play(job, records) for _ in range(2)])
        while not again.is_done:
            train(stays, 10)
        again.result()
        until(lambda: train(stays, 10) or has_told_all(job, stays))
        train_until(stays, num_merges=stays.figures.merges + 8)  # payloads pass again too
        train(stays, 60)
        steps = stays.figures.inner_steps
        stays.leave("limit")
        summary = job.finish()
    assert [(x["tokens"], x["incarnations"]) for x in summary["learners"]] == [(steps * 16, 1), (left_at * 16, 1)]
    assert summary["tokens_merged"] == summary["tokens"] and summary["tokens_discarded"] == summary["tokens_pending"] == 0
