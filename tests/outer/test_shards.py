"""Cutting a layout into the parts of shards, and putting it together again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_diloco.errors import ConfigurationError, RemoteProtocolError
from lightning_diloco.outer import Layout, global_id, part_of, parts_of, plan_layout, whole
from lightning_diloco.protocol.pace import Pace


def plan(num_layers, num_fragments, *, has_statistics=False):
    layers = [nn.Linear(2 + i % 5, 3, bias=i % 2 == 0) for i in range(num_layers)]
    module = nn.Sequential(*layers, *([nn.BatchNorm1d(3)] if has_statistics else []))
    module.register_buffer("static", nn.Parameter(layers[0].weight.new_zeros(2), requires_grad=False).data)
    return plan_layout(module, num_fragments=num_fragments, merge="rda", mean_patterns=())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.booleans(), st.data())
def test_parts_are_disjoint_complete_and_put_together_the_whole(num_layers, num_fragments, has_statistics, data):
    layout = plan(num_layers, num_fragments, has_statistics=has_statistics)
    count = sum(not f.holds_values for f in layout.fragments)
    num_shards = data.draw(st.integers(1, count))
    parts = parts_of(layout, num_shards)
    found = {global_id(f.fragment_id, k, num_shards): f.slices for k, part in enumerate(parts) for f in part.fragments}
    assert found == {f.fragment_id: f.slices for f in layout.fragments}
    assert sum(part.num_params for part in parts) == layout.num_params
    assert all(any(not f.holds_values for f in part.fragments) for part in parts)
    assert max(len(p.fragments) for p in parts) - min(len(p.fragments) for p in parts) <= 1
    assert parts[0].static == layout.static and all(not part.static for part in parts[1:])
    assert whole(parts) == layout
    assert [part_of(part.fingerprint()) for part in parts] == [(k, num_shards) for k in range(num_shards)]
    assert len({part.fingerprint() for part in parts}) == num_shards
    for part in parts:
        assert Layout.from_bytes(part.to_bytes(), max_bytes=1 << 20) == part


def test_the_only_part_of_one_is_the_layout_itself_to_the_byte():
    layout = plan(5, 3)
    (only,) = parts_of(layout, 1)
    assert only is layout and whole([only]) == layout
    assert b"[" + str(layout.num_shards).encode() + b"]" not in layout.to_bytes()
    assert len(layout.fingerprint()) == 64 and layout.to_bytes().startswith(b"[1,[") and part_of(layout.fingerprint()) == (0, 1)


@pytest.mark.parametrize("num_shards", [0, -1, 4, 65])
def test_a_shard_without_a_fragment_is_refused_with_the_rule(num_shards):
    with pytest.raises(ConfigurationError, match=f"--shards {num_shards}: each shard .* this model has 3 .* at most 3 shards, or raise"):
        parts_of(plan(3, 3), num_shards)


def test_what_is_no_part_is_no_part():
    for text in ("", "0/2", "1/2/" + "g" * 64, "1/2/" + "a" * 63, "1/2/" + "a" * 64 + "\n", "x" * 200, "a" * 64):
        assert part_of(text) == (0, 1)


def test_parts_of_different_layouts_are_not_put_together():
    parts, others = parts_of(plan(6, 6), 2), parts_of(plan(6, 6), 3)
    for wrong in (parts[:1], parts[::-1], (parts[0], others[1]), ()):
        with pytest.raises(ConfigurationError):
            whole(wrong)


@pytest.mark.parametrize("part", ["[0,1]", "[2,2]", "[-1,2]", "[0,true]", "[0]", "7", "[0,2],[0,2]"])
def test_a_part_that_is_none_is_refused_in_what_a_peer_sends(part):
    data = plan(2, 2).to_bytes()[:-1] + b"," + part.encode() + b"]"
    with pytest.raises(RemoteProtocolError) as caught:
        Layout.from_bytes(data, max_bytes=1 << 20)
    assert caught.value.reason == "wrong_layout"


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))
def test_first_rounds_of_all_shards_take_turns_over_the_interval(per_shard, interval, num_shards):
    paces = [Pace(num_fragments=per_shard, sync_interval_steps=interval, shard=k, num_shards=num_shards) for k in range(num_shards)]
    alone = Pace(num_fragments=per_shard * num_shards, sync_interval_steps=interval)
    for shard, pace in enumerate(paces):
        assert pace._offsets == alone._offsets[shard::num_shards]
