"""Staging buffers: a fragment may get one that a smaller one has used, and its payload is that of a fresh one."""

from __future__ import annotations

import torch
from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import plan_layout
from lightning_diloco.runtime.global_state import MomentumTracker
from lightning_diloco.runtime.learner_store import LearnerStore


def store_of(module: nn.Module, config: SyncConfig) -> LearnerStore:
    layout = plan_layout(module, num_fragments=config.num_fragments, merge="mean", mean_patterns=())
    return LearnerStore(module, layout, config, momentum=MomentumTracker(layout, config, is_on=False))


def contribution(store: LearnerStore, fragment_id: int) -> bytes:
    local = store.stage(fragment_id)
    store.views[fragment_id].copy_to(local)
    store.encode(fragment_id, 1, store.base(fragment_id), local, 0)
    return bytes(store.payload(fragment_id, 1))


def test_a_buffer_serves_fragments_of_all_sizes():
    torch.manual_seed(0)
    module, config = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 40), nn.Linear(40, 2)), SyncConfig(num_fragments=3, wire_dtype="fp32")
    shared = store_of(module, config)
    count = len(shared.views)
    assert len({view.num_params for view in shared.views}) > 1
    for fragment_id in range(count):
        shared.found(fragment_id, 0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    smallest_first = sorted(range(count), key=lambda i: shared.views[i].num_params)
    for fragment_id in smallest_first:
        fresh = store_of(module, config)
        fresh._base = list(shared._base)
        assert contribution(shared, fragment_id) == contribution(fresh, fragment_id)
        assert len(shared._staging) == 1, "one buffer, used again"


def test_as_many_buffers_are_kept_as_fragments_are_copied_aside_in_a_step():
    module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)])
    for interval, kept in ((6, 2), (3, 3), (100, 2)):
        store = store_of(module, SyncConfig(num_fragments=6, sync_interval_steps=interval))
        assert len(store.views) == 6
        for fragment_id in range(6):
            store.found(fragment_id, 0)
        for fragment_id, local in [(i, store.stage(i)) for i in range(6)]:
            store.encode(fragment_id, 1, store.base(fragment_id), local, 0)
        assert len(store._staging) == kept
