"""The four-bit format: its bound, its bytes, and what it does at the ends of float32's range."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diloco.config import INT4_GROUP, payload_bytes
from lightning_diloco.outer import Encoded, Fragment, TensorSlice, blocks, bytes_of, decode, encode, encode_in_place, measure
from lightning_diloco.outer.int4 import SECTION_ELEMENTS
from lightning_diloco.outer.memory import BLOCK_ELEMENTS

FLOAT_MAX = (2 - 2.0**-23) * 2.0**127
MAX_SCALE = (2 - 2.0**-7) * 2.0**124
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
NEAR_ONE = st.floats(-1.0, 1.0, width=32)
"""Values of one size: those of all of float32 leave one level of a group for all but the largest."""
SIZES = [1, 2, 3, 63, 64, 65, 127, 128, 1000, SECTION_ELEMENTS - 1, SECTION_ELEMENTS + 1, SECTION_ELEMENTS + 66, 2 * SECTION_ELEMENTS]


def norm_of(values):
    size = values.numel()
    part = TensorSlice(name="t", dtype="float32", global_shape=(size,), offset=0, length=size)
    return measure(Fragment(fragment_id=0, kind="parameters", slices=(part,)), Encoded.plain(values)).whole


def bits(tensor):
    return tensor.view(torch.int32)


def random(size, seed=1, scale=1.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def there_and_back(x):
    return decode(encode(x, "int4"), x.numel(), "int4")


def scales_of(payload, size):
    """The scale of every element of a fragment of one section, float64."""
    count = math.ceil(size / INT4_GROUP)
    return payload[: 2 * count].clone().view(torch.bfloat16).double().repeat_interleave(INT4_GROUP)[:size]


def keeps_bound(x):
    """Whether what the module's docstring says of every element and of every scale holds; fails where it does not."""
    payload = encode(x, "int4")
    y, scales = decode(payload, x.numel(), "int4"), scales_of(payload, x.numel()).abs()
    groups = torch.nn.functional.pad(x, (0, -x.numel() % INT4_GROUP)).view(-1, INT4_GROUP)
    largest = groups.abs().amax(1).double().repeat_interleave(INT4_GROUP)[: x.numel()]
    assert bool(torch.isfinite(y).all())
    assert bool((largest[scales == 0] < 2.0**-123).all()) and bool((y[scales == 0] == 0).all())
    assert bool((scales <= (1 + 2.0**-8) * largest / 7.4).all())
    x, y, scales, largest = (t[scales > 0] for t in (x, y, scales, largest))
    is_large = largest > 7.4 * MAX_SCALE
    assert bool((scales >= (1 - 2.0**-8) * largest / 8)[~is_large].all())
    error = (y.double() - x.double()).abs()
    assert bool((error <= (1 + 2.0**-20) * scales / 2)[~is_large].all())
    return bool((error <= 1.04 * scales)[is_large].all())


@given(st.one_of(st.lists(FINITE, min_size=1, max_size=200), st.lists(NEAR_ONE, min_size=1, max_size=200)))
@settings(max_examples=300, deadline=None)
def test_it_keeps_its_stated_bound(values):
    assert keeps_bound(torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-37, 1e-38, 2.0**-126, 1e-41, 1e30, 3e37])
def test_the_bound_holds_at_every_size_of_values(scale):
    assert keeps_bound(random(5000, scale=scale))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_encoded_in_place_and_block_by_block_as_in_one_piece(size):
    x = random(size)
    payload = encode(x, "int4")
    y = decode(payload, size, "int4")
    assert payload.numel() == payload_bytes(size, "int4") == 2 * math.ceil(size / 64) + math.ceil(size / 2)
    assert float((y - x).norm() / x.norm()) < 0.15
    parts = [decode(payload[bytes_of(part, "int4")], part.stop - part.start, "int4") for part in blocks(size)]
    assert torch.equal(bits(torch.cat(parts)), bits(y))
    assert torch.equal(encode_in_place(x, "int4"), payload)


def test_a_block_is_a_number_of_sections():
    assert BLOCK_ELEMENTS % SECTION_ELEMENTS == 0 and SECTION_ELEMENTS % INT4_GROUP == 0


def test_the_bytes_are_those_of_the_stated_layout():
    x = torch.zeros(67)
    x[0], x[1], x[33], x[34], x[66] = -8.0, 7.0, 1.4, -3.6, 0.25
    payload = bytes(encode(x, "int4").tolist())
    codes = [0x08] * 34
    codes[0] = (16 - 4) << 4 | (8 - 8)
    codes[1] = 8 + 7
    codes[32] = (16 - 8) << 4 | 8
    codes[33] = 8 + 1
    assert payload == struct.pack("<HH", 0x3F80, 0xBD00) + bytes(codes), "scales of 1 and -1/32"
    assert there_and_back(x)[[0, 1, 33, 34, 66]].tolist() == [-8.0, 7.0, 1.0, -4.0, 0.25]


def test_ties_go_to_the_even_number():
    x = torch.tensor([-8.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    for sign in (1, -1):
        assert (sign * there_and_back(sign * x)).tolist() == [-8.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_longer_side_has_one_level_more_and_the_other_one_reaches_beyond_its_last(sign):
    scales = [float(scales_of(encode(sign * torch.tensor([-8.0, x]), "int4"), 2)[0]) for x in (0.0, 7.4, 7.5, 8.0)]
    assert [sign * scale for scale in scales[:3]] == [1.0, 1.0, 1.015625] and scales[3] == 1.078125


def test_a_group_of_zeros_is_exact_and_disturbs_no_other():
    x = random(300)
    x[64:128] = 0.0
    x[130] = -0.0
    y = there_and_back(x)
    assert bool((y[64:128] == 0).all()) and float(y[130]) == 0.0
    assert torch.equal(y[:64], there_and_back(x[:64])) and bool((y[:64] != 0).any())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 70, 199])
def test_a_value_that_is_not_finite_makes_its_group_nan_and_no_other(bad, place):
    x = random(200)
    clean = there_and_back(x)
    x[place] = bad
    y = there_and_back(x)
    group = slice(place // 64 * 64, place // 64 * 64 + 64)
    assert bool(y[group].isnan().all()) and not math.isfinite(norm_of(y))
    clean[group] = math.nan
    assert torch.equal(bits(y[~y.isnan()]), bits(clean[~clean.isnan()]))


def test_the_largest_values_stay_finite():
    x = torch.tensor([FLOAT_MAX, -FLOAT_MAX, FLOAT_MAX / 2, 0.0])
    assert keeps_bound(x)
    assert sorted((there_and_back(x) / MAX_SCALE).tolist()) == [-8.0, 0.0, 4.0, 7.0]


def test_what_strangers_send_is_decoded_without_an_error_and_found_if_it_is_not_finite():
    codes = torch.arange(256, dtype=torch.uint8)
    for scale, is_finite in ((1.0, True), (-1.0, True), (0.0, True), (1e-40, True), (3e38, False), (math.inf, False), (math.nan, False)):
        scales = torch.full((8,), scale, dtype=torch.bfloat16).view(torch.uint8)
        y = decode(torch.cat((scales, codes)), 512, "int4")
        assert math.isfinite(norm_of(y)) is is_finite
        if scale == 1.0:
            assert y[:16].tolist() == list(range(-8, 8))
            assert y[256:].tolist() == [i // 16 - (16 if i >= 128 else 0) for i in range(256)]


@pytest.mark.parametrize("size", [1000, SECTION_ELEMENTS + 67])
def test_the_number_of_threads_does_not_matter(size):
    x, before, found = random(size), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            payload = encode(x, "int4")
            found.append((payload, decode(payload, size, "int4")))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(bits(found[0][1]), bits(found[1][1]))


def test_subnormal_numbers_that_are_flushed_change_nothing_of_what_is_decoded():
    x = torch.cat([random(640, seed=i, scale=scale) for i, scale in enumerate((1.0, 1e-37, 2.0**-124, 2.0**-126, 1e-40))])
    payload = encode(x, "int4")
    expected = decode(payload, x.numel(), "int4")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no such mode")
    try:
        found = decode(payload, x.numel(), "int4")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(found), bits(expected))
