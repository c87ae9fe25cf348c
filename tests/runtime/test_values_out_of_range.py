"""Values that are finite and so large that arithmetic on them is not: they never reach the global model."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import Encoded, buffer_of, encode, plan_layout
from lightning_diloco.protocol.messages import Resolved
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.healing import MAX_NORM, Remedy
from lightning_diloco.runtime.store import SyncerStore
from tests.runtime.job_helpers import CONFIG, Background, make_module, running_job, train, until, whole_life
from tests.runtime.job_raw_peer import RawPeer


def test_finite_contributions_that_would_overflow_are_refused_and_the_honest_learner_goes_on(tmp_path):
    config = dataclasses.replace(CONFIG, num_fragments=1, sync_interval_steps=2)
    with running_job(tmp_path, config=config) as job:
        honest = job.client(0)
        honest.join()
        with RawPeer(job.endpoint, make_module(1), config, job.context) as peer:
            peer.join(1)
            d = torch.full((peer.layout.fragments[0].num_params,), 3e38)
            life = Background(lambda: train(honest, 120, sleep_s=0.004))
            for seq in (1, 2, 3):
                peer.step(seq, 8 * seq)
                peer.offer(*peer.contribution(0, seq, d, tokens=8 * seq, inner_step=seq, total_tokens=8 * seq))
                assert peer.hear(Resolved, fragment_id=0, seq=seq).reason == "nonfinite"
            merges = honest.figures.merges
            life.result()
            until(lambda: honest.figures.merges > merges)
            assert bool(torch.isfinite(job.service._performer.store.state(0).shadow).all())
        honest.leave("limit")
        honest.weights.load_global()
        assert all(bool(torch.isfinite(p).all()) for p in honest._module.parameters())
        summary = job.finish()
    assert summary["learners"][0]["discarded"] == 0 and summary["tokens_merged"] == 120 * 16
    assert summary["learners"][1]["rounds_merged"] == 0


def test_a_learner_whose_own_values_are_too_large_though_finite_heals_and_goes_on(tmp_path):
    with running_job(tmp_path) as job:
        sick, well = job.client(0), job.client(1)
        healed: list[int] = []
        sick.on_heal = lambda parameters: healed.append(len(parameters))
        sick.join()
        other = Background(lambda: whole_life(well, 150))
        train(sick, 20)
        with torch.no_grad():
            next(sick._module.parameters()).fill_(1e35)
        frozen = torch.optim.SGD(sick._module.parameters(), lr=0.0)
        for _ in range(300):
            if healed:
                break
            train(sick, 1, optimizer=frozen)
        train(sick, 50)
        assert healed and float(next(sick._module.parameters()).detach().abs().max()) < 1e3
        other.result()
        sick.leave("limit")
        summary = job.finish()
    assert [r for r, n in summary["discarded_by_reason"].items() if n] == ["nonfinite"] and summary["learners"][1]["discarded"] == 0
    assert all(fragment["pending"] == 0 for fragment in summary["fragments"])


def test_a_heal_keeps_what_is_on_its_way_only_if_the_syncer_will_take_it():
    fragment = plan_layout(nn.Linear(4, 1, bias=False), num_fragments=1, merge="mean", mean_patterns=()).fragments[0]
    base, sound = torch.ones(4), torch.full((4,), 0.25)
    assert torch.equal(Remedy(fragment, base, Encoded.of(encode(sound, "bf16"), 4, "bf16")).values(), base - sound)
    for refused in (float("nan"), float("inf"), MAX_NORM):
        assert torch.equal(Remedy(fragment, base, Encoded.plain(torch.full((4,), refused))).values(), base)
    assert torch.equal(Remedy(fragment, base, None).values(), base)


def test_an_outer_step_that_overflows_leaves_the_fragment_as_it_was_and_the_next_one_goes_on(caplog):
    layout = plan_layout(nn.Linear(4, 2, bias=False), num_fragments=1, merge="mean", mean_patterns=(), include_frozen=False)
    store = SyncerStore(layout, SyncConfig(num_fragments=1, merge="mean", outer_lr=1e12))
    founded = torch.linspace(-1.0, 1.0, 8)
    store.found_fragment(0, "values", buffer_of(founded), crc32(founded))
    store.fold(0, torch.full((8,), 1e29), 1.0)
    with caplog.at_level(logging.ERROR):
        closed = store.close(0, 1)
    assert "fragment 0 is not finite" in caplog.text
    assert torch.equal(closed.shadow, founded) and bool(torch.isfinite(closed.difference).all()) and closed.crc == crc32(founded)
    store.fold(0, torch.full((8,), 1e-13), 1.0)
    after = store.close(0, 2).shadow
    assert bool(torch.isfinite(after).all()) and 0 < float((founded - after).min()) <= float((founded - after).max()) < 1.0
