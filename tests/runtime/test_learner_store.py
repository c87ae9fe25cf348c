"""A learner's memory: a fragment may get a block that another one has used, and all its bytes are those of a fresh store."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.outer import buffer_of, decode, encode, encode_full, momentum_at, plan_layout, recovered_momentum
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.global_state import MomentumTracker
from lightning_diloco.runtime.learner_store import LearnerStore, Receive


def store_of(module: nn.Module, config: SyncConfig, *, is_on: bool = False) -> LearnerStore:
    layout = plan_layout(module, num_fragments=config.num_fragments, merge="mean", mean_patterns=())
    return LearnerStore(module, layout, config, momentum=MomentumTracker(layout, config, is_on=is_on))


def contribution(store: LearnerStore, fragment_id: int) -> bytes:
    local = store.stage(fragment_id)
    store.views[fragment_id].copy_to(local)
    store.encode(fragment_id, 1, store.base(fragment_id), local, 0)
    del local
    payload = bytes(store.payload(fragment_id, 1))
    store.forget(fragment_id, 1)
    return payload


def test_a_block_serves_fragments_of_about_its_size():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(40, 10), nn.Linear(11, 36), nn.Linear(40, 10), nn.Linear(2, 2))
    config = SyncConfig(num_fragments=4, wire_dtype="fp32")
    shared = store_of(module, config)
    count = len(shared.views)
    assert len({view.num_params for view in shared.views}) > 1
    for fragment_id in range(count):
        shared.found(fragment_id, 0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    largest_first = sorted(range(count), key=lambda i: -shared.views[i].num_params)
    for fragment_id in largest_first:
        fresh = store_of(module, config)
        fresh._base = list(shared._base)
        assert contribution(shared, fragment_id) == contribution(fresh, fragment_id)
    sizes = sorted({view.num_params for view in shared.views})
    assert shared._memory.free_bytes == 4 * (sizes[0] + sizes[-1]), f"one block of each kind, used again: {sizes}"


def test_what_is_kept_is_twice_what_the_fragments_due_in_one_step_need():
    module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)])
    for interval, kept in ((6, 8), (3, 16), (100, 8)):
        store = store_of(module, SyncConfig(num_fragments=6, sync_interval_steps=interval))
        blocks = [store.stage(i % 6) for i in range(24)]
        assert store._memory.free_bytes == 0
        blocks.clear()
        assert store._memory.free_bytes == kept * 4 * 6


def test_a_payload_that_is_not_acknowledged_outlives_its_snapshot():
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    store = store_of(module, SyncConfig(num_fragments=1, wire_dtype="bf16"))
    store.found(0, 0)
    with torch.no_grad():
        module.weight.add_(1.0)
    local = store.stage(0)
    store.views[0].copy_to(local)
    store.encode(0, 1, store.base(0), local, 0)
    del local
    before = bytes(store.payload(0, 1))
    view = store.payload(0, 1)
    store.forget(0, 1)
    other = store.stage(0)
    other.fill_(7.0)
    assert bytes(view) == before, "a transfer that still reads it is not disturbed"
    del view
    assert store._memory.free_bytes == 4 * 20


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("is_full", [True, False])
def test_what_arrives_is_computed_block_by_block_as_in_one_piece(wire_dtype, is_full):
    size = (1 << 18) + 12  # more than one block
    torch.manual_seed(0)
    module, config = nn.Linear(size // 4, 4, bias=False), SyncConfig(num_fragments=1, wire_dtype=wire_dtype)
    store = store_of(module, config, is_on=True)
    base = store.found(0, 2)
    local = store.stage(0).copy_(base + 0.1 * torch.randn(size))
    store.encode(0, 1, base, local, 0)
    sent = decode(store.payload(0, 1), size, wire_dtype)
    target = base + torch.randn(size)
    if is_full or wire_dtype == "fp32":
        payload, expected = encode_full(target), target
    else:
        payload = encode(target - base, wire_dtype)
        expected = base + decode(payload, size, wire_dtype)
    job = Receive(fragment_id=0, n=4, crc=crc32(expected), is_full=is_full, base=base, with_contribution=1)
    assert store.receive(dataclasses.replace(job, crc=job.crc ^ 1), buffer_of(payload)) is None
    with pytest.raises(RemoteProtocolError, match="elements in"):
        store.receive(job, buffer_of(payload)[:-1])
    received = store.receive(job, buffer_of(payload))
    assert torch.equal(received.adoption.published, expected)
    delta = torch.cat([view.reshape(-1) for view in received.adoption.delta_views])
    assert torch.equal(delta, expected - (base - sent))
    momenta = [momentum_at(n, config.outer_momentum, config.outer_momentum_warmup) for n in (3, 4)]
    momentum = recovered_momentum(torch.zeros(size), base, expected, lr=config.outer_lr, momenta=momenta)
    torch.testing.assert_close(received.momentum, momentum)


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16", "int4"])
def test_what_follows_a_contribution_is_relative_to_it_as_it_was_decoded(wire_dtype):
    size = (1 << 18) + 12
    torch.manual_seed(0)
    store = store_of(nn.Linear(size // 4, 4, bias=False), SyncConfig(num_fragments=1, wire_dtype=wire_dtype))
    base = store.found(0, 0)
    first, second = base + 0.1 * torch.randn(size), base + 0.1 * torch.randn(size)
    assert store.encode(0, 1, base, store.stage(0).copy_(first), 0) == crc32(store.payload(0, 1))
    sent = decode(store.payload(0, 1), size, wire_dtype)
    store.encode(0, 2, base, store.stage(0).copy_(second), 1)
    assert bytes(store.payload(0, 1)) == bytes(buffer_of(encode(base - first, wire_dtype)))
    assert bytes(store.payload(0, 2)) == bytes(buffer_of(encode((base - sent) - second, wire_dtype)))


def test_while_joining_nothing_is_prepared():
    module, config = nn.Linear(3, 3), SyncConfig(num_fragments=1)
    store = store_of(module, config, is_on=True)
    values = torch.randn(12)
    job = Receive(fragment_id=0, n=7, crc=crc32(values), is_full=True, base=None, with_contribution=0)
    received = store.receive(job, buffer_of(values))
    assert torch.equal(received.adoption.published, values)
    assert received.adoption.delta_views is None and received.momentum is None


def test_torchs_default_dtype_is_not_asked():
    module, config = nn.Linear(3, 3), SyncConfig(num_fragments=1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        store = store_of(module, config, is_on=True)
        base = store.found(0, 0)
        store.encode(0, 1, base, store.stage(0).copy_(base + 1e-3), 0)
        values = base + 1e-3
        job = Receive(fragment_id=0, n=1, crc=crc32(values), is_full=True, base=base, with_contribution=1)
        received = store.receive(job, buffer_of(values))
    finally:
        torch.set_default_dtype(torch.float32)
    found = (base, received.adoption.published, received.momentum, *received.adoption.delta_views, *store.momentum.buffers)
    assert {tensor.dtype for tensor in found} == {torch.float32}
