"""The merge: properties of RDA and the mean, edge cases, replay from recorded reductions."""

import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.outer import BLOCK_ELEMENTS, Encoded, Fragment, MergeAccumulator, TensorSlice, blocks, decode, encode

BOUND = 1e-6
NORM_BOUND = 130 * 2.0**-24
"""That of `outer.norms`: rows of float32 squares."""


def fragment_of(*tensors):
    """Tensors as (elements, rule)."""
    slices = (
        TensorSlice(name=f"t{i}", dtype="float32", global_shape=(n,), offset=0, length=n, merge=rule) for i, (n, rule) in enumerate(tensors)
    )
    return Fragment(fragment_id=0, kind="parameters", slices=tuple(slices))


MIXED = fragment_of((24, "rda"), (24, "mean"), (19, "rda"))
ONE = fragment_of((64, "rda"))


def contributions(seed, count, size=67, scale=1e-3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) * scale for _ in range(count)]


def merged(fragment, ds, weights):
    accumulator = MergeAccumulator(fragment)
    for d, weight in zip(ds, weights, strict=True):
        accumulator.fold(d, weight)
    return accumulator.result()[0]


def reference(fragment, ds, weights):
    """The formulas, in float64."""
    total = sum(weights)
    parts = []
    for part, *slices in zip(fragment.slices, *(d.double().split([s.length for s in fragment.slices]) for d in ds), strict=True):
        mean = sum(w * x for w, x in zip(weights, slices, strict=True)) / total
        if part.merge == "rda":
            norm = sum(w * x.norm() for w, x in zip(weights, slices, strict=True)) / total
            direction = sum(w * (x / x.norm() if x.norm() else x) for w, x in zip(weights, slices, strict=True)) / total
            mean = norm * direction / direction.norm()
        parts.append(mean)
    return torch.cat(parts)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


weights_of = st.floats(1e-3, 1e9)
seeds = st.integers(0, 2**31)


@given(seeds, st.lists(weights_of, min_size=2, max_size=8))
@settings(deadline=None)
def test_the_fold_is_the_formula(seed, weights):
    ds = contributions(seed, len(weights))
    expected = reference(MIXED, ds, weights)
    for found, exact in zip(merged(MIXED, ds, weights).split([24, 24, 19]), expected.split([24, 24, 19]), strict=True):
        assert relative(found, exact) < BOUND


@given(seeds, st.lists(weights_of, min_size=2, max_size=5), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_arrival_does_not_matter(seed, weights, random):
    pairs = list(zip(contributions(seed, len(weights)), weights, strict=True))
    before = merged(MIXED, *zip(*pairs, strict=True))
    random.shuffle(pairs)
    assert relative(merged(MIXED, *zip(*pairs, strict=True)), before) < BOUND


@given(seeds, st.lists(weights_of, min_size=2, max_size=16))
@settings(deadline=None)
def test_equal_contributions_give_themselves(seed, weights):
    (d,) = contributions(seed, 1)
    assert relative(merged(MIXED, [d] * len(weights), weights), d) < BOUND


@given(seeds, st.integers(2, 16), st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_equal_norms_give_that_norm(seed, count, norm):
    ds = [d * (norm / d.norm()) for d in contributions(seed, count, size=64)]
    found = float(merged(ONE, ds, [1.0 + i for i in range(count)]).double().norm())
    assert abs(found / norm - 1.0) < BOUND


def test_the_mean_shrinks_orthogonal_contributions_and_rda_does_not():
    ds = list(torch.eye(16)[:, :16].clone())
    assert float(merged(fragment_of((16, "mean")), ds, [1.0] * 16).norm()) == pytest.approx(0.25, rel=BOUND)
    assert float(merged(fragment_of((16, "rda")), ds, [1.0] * 16).norm()) == pytest.approx(1.0, rel=BOUND)


@given(seeds, weights_of, st.sampled_from([1e-42, 1e-30, 1.0, 1e30]))
@settings(deadline=None)
def test_one_contribution_alone_is_returned_bit_for_bit(seed, weight, scale):
    (d,) = contributions(seed, 1, scale=scale)
    accumulator = MergeAccumulator(MIXED)
    accumulator.fold(torch.full_like(d, 5.0), 0.0)
    accumulator.fold(d.clone(), weight)
    found, record = accumulator.result()
    assert torch.equal(found.view(torch.int32), d.view(torch.int32))
    assert record.scales == (1.0, 1.0, 1.0)
    assert (record.count, record.total_weight) == (1, weight)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 3.0), (7e11, 7e11)])
def test_opposite_contributions_give_zero(weights):
    (d,) = contributions(3, 1)
    found = merged(MIXED, [d, -d], weights)
    assert torch.equal(found, torch.zeros(67))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_cancellation_is_zero_also_when_rounding_leaves_noise(order):
    (d,) = contributions(4, 1, size=64)
    pairs = [(d, 1.0), (d, 2.0), (-d, 3.0)]
    found = merged(ONE, *zip(*(pairs[i] for i in order), strict=True))
    assert torch.equal(found, torch.zeros(64))


def test_directions_that_nearly_cancel_keep_their_norm():
    (d,) = contributions(5, 1, size=64)
    tilted = -d.clone()
    tilted[0] += 0.01 * d.norm()
    found = merged(ONE, [d, tilted], [1.0, 1.0])
    assert float(found.norm()) == pytest.approx(float(d.norm() + tilted.norm()) / 2, rel=1e-5)


def test_a_zero_contribution_counts_in_the_length_and_not_in_the_direction():
    (d,) = contributions(6, 1, size=64)
    assert relative(merged(ONE, [d, torch.zeros(64)], [1.0, 3.0]), d / 4) < BOUND
    assert torch.equal(merged(ONE, [torch.zeros(64), torch.zeros(64)], [1.0, 3.0]), torch.zeros(64))


@pytest.mark.parametrize("weights", [(1e-30, 1e-30, 1e-30), (1e300, 1e300, 1e300), (1e-9, 1.0, 1e9), (1e40, 1e20, 1.0)])
@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e35])
def test_extreme_weights_and_norms_stay_in_range(weights, scale):
    ds = contributions(7, 3, scale=scale)
    found = merged(MIXED, ds, weights)
    expected = reference(MIXED, [d.double() / scale for d in ds], [w / max(weights) for w in weights]) * scale
    assert relative(found, expected) < BOUND


def test_subnormal_contributions_are_merged_and_not_lost():
    ds = [torch.full((64,), 1e-40), torch.full((64,), 1e-40)]
    assert relative(merged(ONE, ds, [1.0, 2.0]), ds[0]) < 1e-4


def test_slices_of_one_tensor_share_the_norm_of_the_whole():
    parts = [TensorSlice(name="t", dtype="float32", global_shape=(8, 8), offset=o, length=n) for o, n in ((0, 10), (10, 54))]
    split = Fragment(fragment_id=0, kind="parameters", slices=tuple(parts))
    ds = contributions(8, 3, size=64)
    record = MergeAccumulator(split).fold(ds[0], 1.0)
    assert record.norms[0] == record.norms[1] == pytest.approx(float(ds[0].double().norm()), rel=NORM_BOUND)
    assert relative(merged(split, ds, [1.0, 2.0, 3.0]), merged(ONE, ds, [1.0, 2.0, 3.0])) < BOUND


def test_a_fold_larger_than_its_scratch_is_complete():
    size = (1 << 18) + 5
    ds = contributions(9, 2, size=size)
    fragment = fragment_of((size, "rda"))
    assert relative(merged(fragment, ds, [1.0, 3.0]), reference(fragment, ds, [1.0, 3.0])) < BOUND


def test_contributions_are_not_written_to():
    ds = contributions(10, 3)
    copies = [d.clone() for d in ds]
    merged(MIXED, ds, [1.0, 2.0, 3.0])
    assert all(torch.equal(d, copy) for d, copy in zip(ds, copies, strict=True))


def test_weight_zero_does_not_count():
    ds = contributions(11, 3)
    accumulator = MergeAccumulator(MIXED)
    records = [accumulator.fold(d, w) for d, w in zip(ds, (2.0, 0.0, 3.0), strict=True)]
    assert [record.is_counted for record in records] == [True, False, True]
    assert (accumulator.count, accumulator.total_weight) == (2, 5.0)
    assert torch.equal(accumulator.result()[0], merged(MIXED, [ds[0], ds[2]], [2.0, 3.0]))


def test_total_weight_zero_has_no_result():
    accumulator = MergeAccumulator(MIXED)
    with pytest.raises(LocalProtocolError, match="cancel the round"):
        accumulator.result()
    accumulator.fold(contributions(12, 1)[0], 0.0)
    with pytest.raises(LocalProtocolError, match="cancel the round"):
        accumulator.result()


def test_a_closed_merge_is_closed():
    accumulator = MergeAccumulator(MIXED)
    (d,) = contributions(13, 1)
    accumulator.fold(d, 1.0)
    accumulator.result()
    for again in (accumulator.result, lambda: accumulator.fold(d, 1.0)):
        with pytest.raises(LocalProtocolError, match="closed"):
            again()


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_impossible_weights_are_refused_and_change_nothing(weight):
    accumulator = MergeAccumulator(MIXED)
    with pytest.raises(LocalProtocolError, match="weight"):
        accumulator.fold(contributions(14, 1)[0], weight)
    assert (accumulator.count, accumulator.total_weight) == (0, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_contribution_that_is_not_finite_is_never_folded_in(value):
    accumulator = MergeAccumulator(MIXED)
    (d,) = contributions(15, 1)
    d[50] = value
    with pytest.raises(LocalProtocolError, match="not finite"):
        accumulator.fold(d, 1.0)
    assert accumulator.count == 0


@pytest.mark.parametrize("d", [torch.zeros(66), torch.zeros(67, dtype=torch.float64), torch.zeros(67, 1), torch.zeros(134)[::2]])
def test_tensors_that_are_not_flat_fragments_are_refused(d):
    with pytest.raises(LocalProtocolError, match="flat, contiguous float32"):
        MergeAccumulator(MIXED).fold(d, 1.0)


def test_recorded_reductions_are_used_instead_of_computed_ones():
    ds, weights = contributions(16, 3), (1.0, 5.0, 2.0)
    original = MergeAccumulator(MIXED)
    records = [original.fold(d, w) for d, w in zip(ds, weights, strict=True)]
    expected, end = original.result()
    replay = MergeAccumulator(MIXED)
    for d, record in zip(ds, records, strict=True):
        assert replay.fold(d, record.weight, norms=record.norms) == record
    found, again = replay.result(scales=end.scales)
    assert torch.equal(found, expected)
    assert again == end
    other = MergeAccumulator(MIXED)
    for d, record in zip(ds, records, strict=True):
        other.fold(d, record.weight, norms=record.norms)
    doubled = other.result(scales=[2 * scale for scale in end.scales])[0]
    assert torch.equal(doubled, 2 * expected)


def test_one_flipped_bit_in_one_contribution_changes_the_result():
    ds, weights = contributions(17, 3), (1.0, 1.0, 1.0)
    before = merged(MIXED, ds, weights)
    ds[1].view(torch.int32)[9] ^= 1 << 20
    assert not torch.equal(merged(MIXED, ds, weights), before)


def test_recorded_values_of_another_fragment_are_refused():
    accumulator = MergeAccumulator(MIXED)
    (d,) = contributions(18, 1)
    with pytest.raises(LocalProtocolError, match="2 recorded norms"):
        accumulator.fold(d, 1.0, norms=(1.0, 2.0))
    accumulator.fold(d, 1.0)
    with pytest.raises(LocalProtocolError, match="4 recorded scales"):
        accumulator.result(scales=(1.0,) * 4)


LARGE = fragment_of((BLOCK_ELEMENTS - 9, "rda"), (300, "mean"), (BLOCK_ELEMENTS // 2, "rda"))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("wire", ["fp32", "bf16", "int4"])
def test_payloads_that_wait_give_the_same_bits_as_contributions_that_are_added_at_once(wire, count):
    size = LARGE.num_params
    payloads = [encode(d, wire) for d in contributions(19, count, size=size)]
    waiting, at_once = MergeAccumulator(LARGE), MergeAccumulator(LARGE)
    for i, payload in enumerate(payloads):
        weight = 10.0 ** (i % 5)
        record = waiting.fold(Encoded.of(payload, size, wire), weight)
        assert at_once.fold(decode(payload, size, wire), weight) == record
    (found, record), (expected, same) = waiting.close(), at_once.result()
    assert record == same
    scratch = torch.empty(BLOCK_ELEMENTS)
    parts = torch.cat([found.part(part, scratch).clone() for part in blocks(size)])
    assert torch.equal(parts.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(found.whole().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(("wire", "most"), [("fp32", 1), ("bf16", 1), ("int4", 7)])
def test_no_more_than_four_bytes_an_element_wait(wire, most):
    size, accumulator, held = LARGE.num_params, MergeAccumulator(LARGE), []
    for d in contributions(20, 18, size=size):
        payload = encode(d, wire)
        accumulator.fold(Encoded.of(payload, size, wire), 1.0)
        held.append(weakref.ref(payload))
        del payload
    assert sum(payload() is not None for payload in held) <= most
    assert all(payload() is None for payload in held[: -most or None])


def test_a_payload_of_another_fragment_is_refused():
    with pytest.raises(LocalProtocolError, match="66 elements"):
        MergeAccumulator(MIXED).fold(Encoded.of(encode(torch.zeros(66), "bf16"), 66, "bf16"), 1.0)
