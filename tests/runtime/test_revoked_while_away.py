"""A site whose key is revoked while its link or its syncer is away: nobody can tell it, and it ends by what it finds at the door."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lightning_diloco.errors import CannotListenError
from lightning_diloco.runtime.keys import SyncerKeys, admit
from lightning_diloco.runtime.service import SyncerService
from lightning_diloco.runtime.sharded_client import AnyClient
from lightning_diloco.runtime.transport import ControlReceived, SyncerTransport
from tests.runtime.job_helpers import running_job, train, until
from tests.runtime.test_client_links import behind_proxies

REVOKED = "key_revoked: The key of this site was revoked"


@pytest.fixture
def _soon(monkeypatch) -> None:
    """Not after half a minute."""
    monkeypatch.setattr("lightning_diloco.runtime.link_care.REFUSED_S", 2.0)


def train_until_fenced(client: AnyClient, step: Callable[[], None], limit_s: float = 20.0) -> float:
    """Seconds until the learner has to end."""
    start_s = time.monotonic()
    while client.fenced is None:
        assert time.monotonic() < start_s + limit_s, "it trains on"
        step()
    return time.monotonic() - start_s


def end_without_a_word(service: SyncerService) -> None:
    """To its learners as if it were killed."""
    service.finish("failed")
    assert service.join(20)


@contextmanager
def in_place_of(service: SyncerService, keys: SyncerKeys) -> Iterator[list[ControlReceived]]:
    """Listen at the addresses of a syncer that has ended, as one does that is started again; gives what it hears."""
    heard: list[ControlReceived] = []
    endpoint = service._transport.control_endpoint
    again = SyncerTransport(endpoint, service.bulk_endpoint, accept=lambda *_: True, keys=keys)
    until(lambda: binds(again))
    is_over = threading.Event()

    def listen() -> None:
        while not is_over.is_set():
            heard.extend(event for event in again.poll(0.05) if isinstance(event, ControlReceived))

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield heard
    finally:
        is_over.set()
        thread.join()
        again.close()


def binds(transport: SyncerTransport) -> bool:
    """Whether the addresses are free again: ZeroMQ lets go of them a moment after the sockets were closed."""
    try:
        transport.bind()
    except CannotListenError:
        return False
    return True


@pytest.mark.usefixtures("_soon")
def test_a_site_that_is_revoked_while_its_syncer_is_down_ends_when_it_is_back(keys, run_dir):
    site = keys.site("oslo")
    with running_job(run_dir, "tcp", keys=keys.syncer) as job:
        client = job.client(0, keys=site)
        client.join()
        train(client, 10)
        end_without_a_word(job.service)
        keys.revoke("oslo")
        with in_place_of(job.service, keys.syncer) as heard:
            assert train_until_fenced(client, lambda: train(client, 1, sleep_s=0.01)) >= 2.0
            assert REVOKED in str(client.fenced) and "has refused it for" in str(client.fenced)
            start_s = time.monotonic()
            client.leave("limit")
            assert time.monotonic() - start_s < 2.0, "there is nobody to wait for"
            client.close()
        assert heard == []


@pytest.mark.usefixtures("_soon")
def test_a_site_that_is_revoked_while_its_link_is_down_ends_when_it_is_up(keys, run_dir):
    site = keys.site("oslo")
    with running_job(run_dir, "tcp", keys=keys.syncer) as job, behind_proxies(job) as proxies:
        client = job.client(0, keys=site, endpoint=f"tcp://127.0.0.1:{proxies[0].port}")
        client.join()
        train(client, 10)
        for proxy in proxies:
            proxy.cut(stay_closed=True)
        keys.revoke("oslo")
        until(lambda: job.machine.job.members.by_id(0) is None)
        assert client.fenced is None, "the word that it is revoked went nowhere"
        for proxy in proxies:
            proxy.reopen()
        train_until_fenced(client, lambda: train(client, 1, sleep_s=0.01))
        assert REVOKED in str(client.fenced) and "has refused it for" in str(client.fenced)


@pytest.mark.usefixtures("_soon")
def test_a_syncer_that_cannot_read_who_is_admitted_refuses_nobody_until_it_can(keys, run_dir):
    """A start while the folder cannot be read: nobody comes in, nobody is told that his key is unknown, and nobody ends."""
    site = keys.site("oslo")
    with running_job(run_dir, "tcp", keys=keys.syncer) as job:
        client = job.client(0, keys=site)
        client.join()
        syncer_keys = keys.syncer
        folder = syncer_keys.admitted
        end_without_a_word(job.service)
        folder.rename(aside := folder.with_name("aside"))
        folder.symlink_to(folder)  # a loop: opening it is an error, as of a disk that does not answer
        with in_place_of(job.service, syncer_keys) as heard:
            end_s = time.monotonic() + 4.0
            while time.monotonic() < end_s:
                train(client, 1, sleep_s=0.01)
            assert client.fenced is None and "unknown_key" not in client._transport.failed_handshakes and heard == []
            folder.unlink()
            aside.rename(folder)
            until(lambda: bool(heard))
            assert client.fenced is None


@pytest.mark.slow
def test_a_key_that_is_admitted_again_in_time_ends_nobody(keys, run_dir):
    """With the real times: refused for twenty seconds, and then a word of the syncer."""
    site = keys.site("oslo")
    with running_job(run_dir, "tcp", keys=keys.syncer) as job:
        client = job.client(0, keys=site)
        client.join()
        end_without_a_word(job.service)
        keys.revoke("oslo")
        with in_place_of(job.service, keys.syncer) as heard:
            until(lambda: client._transport.control_link.refused_s > 20.0, 60)
            admit(keys.folder, "oslo", site.public.hex())
            until(lambda: bool(heard))
            until(lambda: client._transport.control_link.is_up)
            end_s = time.monotonic() + 15.0
            while time.monotonic() < end_s:
                train(client, 1, sleep_s=0.01)
            assert client.fenced is None and client._transport.control_link.refused_s == 0.0
