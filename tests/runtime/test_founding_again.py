"""A founder that dies at the worst moment, between its last payload and the founding."""

from __future__ import annotations

import threading

import torch
from torch import nn

from lightning_diloco.outer import buffer_of
from lightning_diloco.protocol.identity import FragmentInfo
from lightning_diloco.protocol.messages import Found, FoundingFragment, SendState, Welcome
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.store import SyncerStore
from tests.runtime.job_helpers import CONFIG, Background, running_job, train, until
from tests.runtime.job_raw_peer import RawPeer


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 2))


def send_founding_state(peer: RawPeer) -> None:
    """All that a founder sends; its module has no static state."""
    peer.hello(learner_id=0)
    assert peer.hear(Welcome).role == "founder"
    infos = tuple(FragmentInfo(fragment_id=f.fragment_id, num_params=f.num_params, kind=f.kind) for f in peer.layout.fragments)
    peer.say(Found(layout=peer.layout.to_bytes(), fragments=infos, static_bytes=0, static_crc=0))
    peer.hear(SendState)
    for info in infos:
        values = torch.zeros(info.num_params)
        assert peer.end_of(peer.offer(FoundingFragment(fragment_id=info.fragment_id, crc=crc32(values)), buffer_of(values))) is None


def test_the_next_life_of_a_founder_that_died_while_its_state_was_being_stored_founds_the_job(tmp_path, monkeypatch):
    may_store, store, stored = threading.Event(), SyncerStore.found_fragment, []

    def slowly(self: SyncerStore, fragment_id: int, *payload: object) -> None:
        assert may_store.wait(20)
        store(self, fragment_id, *payload)
        stored.append(fragment_id)

    monkeypatch.setattr(SyncerStore, "found_fragment", slowly)
    with running_job(tmp_path) as job:
        with RawPeer(job.endpoint, make(), CONFIG, job.context) as first:
            send_founding_state(first)
        job.service.learner_lost(0)
        until(lambda: job.machine.job.members.by_id(0) is None)
        may_store.set()
        until(lambda: stored == [0, 1, 2, 3])
        second = job.client(0, make())
        joining = Background(second.join)
        until(lambda: joining.is_done)
        assert joining.result().role == "member" and joining.result().incarnation == 1
        until(lambda: train(second, 1) or second.figures.merges > 4)
        second.leave("limit")
        summary = job.finish()
    assert summary["tokens"] == summary["tokens_merged"] > 0 and summary["status"] == "finished"
