"""Checksums without copies; static state as one payload."""

import gc
import hashlib
import struct

import pytest
import torch
from torch import nn

from lightning_diloco.errors import ConfigurationError, LocalProtocolError, RemoteProtocolError
from lightning_diloco.outer import buffer_of, load_static, pack_static, plan_layout, sha256_of, static_bytes

# --- checksums ----------------------------------------------------------------------------------------------------------------------


def test_a_buffer_is_the_tensor_and_not_a_copy():
    tensor = torch.zeros(3)
    view = buffer_of(tensor)
    tensor[1] = 1.0
    assert bytes(view) == struct.pack("<3f", 0.0, 1.0, 0.0)
    view[:4] = struct.pack("<f", 5.0)
    assert tensor.tolist() == [5.0, 1.0, 0.0]


def test_a_buffer_keeps_its_tensor_alive():
    view = buffer_of(torch.full((100_000,), 2.0))
    gc.collect()
    others = [torch.zeros(100_000) for _ in range(4)]
    assert bytes(view) == struct.pack("<f", 2.0) * 100_000
    assert len(others) == 4


@pytest.mark.parametrize("tensor", [torch.zeros(4)[::2], torch.zeros(2, device="meta")])
def test_only_contiguous_host_memory_has_bytes(tensor):
    with pytest.raises(LocalProtocolError, match="only contiguous host memory"):
        buffer_of(tensor)


def test_the_digest_is_over_float32_values_in_order():
    parts = [
        torch.tensor([1.0, 2.0]),
        torch.tensor([[3.0, 4.0], [5.0, 6.0]]).T,
        torch.tensor([7.0], dtype=torch.bfloat16, requires_grad=True),
    ]
    expected = hashlib.sha256(struct.pack("<7f", 1, 2, 3, 5, 4, 6, 7)).hexdigest()
    assert sha256_of(iter(parts)) == expected
    assert sha256_of(parts[::-1]) != expected
    assert sha256_of([]) == hashlib.sha256().hexdigest()


# --- static state -------------------------------------------------------------------------------------------------------------------


def model(fill):
    torch.manual_seed(fill)
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3), "frozen": nn.Linear(2, 5)})
    net["frozen"].requires_grad_(False)
    net["frozen"].weight.data = torch.randn(2, 5).T
    net.register_buffer("mask", torch.tensor([fill % 2 == 0, True, False]))
    net.register_buffer("low", torch.full((3,), float(fill), dtype=torch.bfloat16))
    net.register_buffer("phase", torch.full((2,), complex(fill, -fill)))
    net.register_buffer("empty", torch.zeros(0, 4))
    net.register_buffer("local", torch.full((2,), float(fill)), persistent=False)
    net["norm"].num_batches_tracked.fill_(1000 + fill)
    return net


def layout_of(net):
    return plan_layout(net, num_fragments=2, merge="rda", mean_patterns=())


def test_static_state_arrives_bit_for_bit_and_nothing_else_does():
    source, target = model(4), model(7)
    layout = layout_of(source)
    assert layout == layout_of(target)
    payload = pack_static(source, layout)
    assert (payload.dtype, payload.numel()) == (torch.uint8, static_bytes(layout))
    trainable = target["a"].weight.clone()
    load_static(target, layout, payload)
    assert torch.equal(pack_static(target, layout), payload)
    assert torch.equal(target["frozen"].weight, source["frozen"].weight)
    assert target["norm"].num_batches_tracked.item() == 1004
    assert target.mask.tolist() == [True, True, False]
    assert target.phase.tolist() == [4 - 4j, 4 - 4j]
    assert target.local.tolist() == [7.0, 7.0]
    assert torch.equal(target["a"].weight, trainable)


def test_a_module_without_static_state_has_an_empty_payload():
    net = nn.Linear(2, 2)
    layout = layout_of(net)
    payload = pack_static(net, layout)
    assert payload.numel() == static_bytes(layout) == 0
    load_static(net, layout, payload)


def test_any_byte_but_zero_is_true():
    net = model(4)
    layout = layout_of(net)
    payload = pack_static(net, layout)
    at = sum(spec.num_bytes for spec in layout.static[: [spec.name for spec in layout.static].index("mask")])
    payload[at : at + 3] = torch.tensor([255, 0, 2], dtype=torch.uint8)
    load_static(net, layout, payload)
    assert net.mask.tolist() == [True, False, True]
    assert net.mask.view(torch.uint8).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: p[:-1], "wrong_layout"),
        (lambda p: torch.cat([p, p[:1]]), "oversized"),
        (lambda p: p.to(torch.int8), "wrong_layout"),
        (lambda p: p.view(1, -1), "wrong_layout"),
    ],
)
def test_a_damaged_payload_is_refused_and_changes_nothing(damage, reason):
    source, target = model(4), model(7)
    layout = layout_of(source)
    before = pack_static(target, layout)
    with pytest.raises(RemoteProtocolError) as caught:
        load_static(target, layout, damage(pack_static(source, layout)))
    assert caught.value.reason == reason
    assert torch.equal(pack_static(target, layout), before)


def test_another_module_is_refused_with_the_name_of_the_tensor():
    layout = layout_of(model(4))
    missing, cast = model(4), model(4)
    del missing.low
    cast["norm"].num_batches_tracked = cast["norm"].num_batches_tracked.double()
    with pytest.raises(ConfigurationError, match=r"'low'.*nothing"):
        pack_static(missing, layout)
    with pytest.raises(ConfigurationError, match=r"'norm\.num_batches_tracked'.*float64"):
        load_static(cast, layout, pack_static(model(4), layout))
