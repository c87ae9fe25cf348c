"""Codecs against their stated bounds; publications keep every holder of the shadow bit-identical."""

import math
import struct
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diloco.errors import ConfigurationError, LocalProtocolError, RemoteProtocolError
from lightning_diloco.outer import (
    bytes_of,
    check_payload,
    decode,
    decode_full,
    decode_publication,
    encode,
    encode_full,
    encode_in_place,
    encode_publication,
    payload_bytes,
)

BF16_MAX = (2 - 2**-7) * 2.0**127
FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)
WIRES = ("fp32", "bf16", "int4")


def bits(tensor):
    return tensor.view(torch.int32)


def random(seed, size=500, scale=1.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


# --- encode and decode --------------------------------------------------------------------------------------------------------------


def test_payloads_have_the_stated_size():
    assert [payload_bytes(10, wire) for wire in WIRES] == [40, 20, 2 + 5] and [payload_bytes(0, wire) for wire in WIRES] == [0, 0, 0]
    assert payload_bytes(129, "int4") == 3 * 2 + 65
    for wire in WIRES:
        payload = encode(random(1), wire)
        assert (payload.dtype, payload.numel(), payload.is_contiguous()) == (torch.uint8, payload_bytes(500, wire), True)


def test_bytes_are_little_endian():
    assert bytes(encode(torch.tensor([1.0, -2.5]), "fp32").tolist()) == struct.pack("<2f", 1.0, -2.5)
    assert bytes(encode(torch.tensor([1.0]), "bf16").tolist()) == b"\x80\x3f"


@given(st.binary(min_size=4, max_size=80).filter(lambda b: len(b) % 4 == 0))
def test_fp32_is_exact_for_every_bit_pattern(data):
    assert bytes(encode(decode(data, len(data) // 4, "fp32"), "fp32").tolist()) == data


@given(FLOATS)
@settings(max_examples=300, deadline=None)
def test_bf16_keeps_its_stated_bounds(values):
    x = torch.tensor(values, dtype=torch.float32)
    for before, after in zip(x.tolist(), decode(encode(x, "bf16"), len(values), "bf16").tolist(), strict=True):
        if abs(before) > BF16_MAX:
            assert after == math.copysign(BF16_MAX, before)
        elif abs(before) >= 2.0**-126:
            assert abs(after - before) <= 2.0**-8 * abs(before)
        else:
            assert abs(after - before) <= 2.0**-134


def test_bf16_rounds_ties_to_even():
    x = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20])
    assert decode(encode(x, "bf16"), 3, "bf16").tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7]


@pytest.mark.parametrize("company", [[], [3.4e38], [math.nan]])
def test_bf16_keeps_what_is_not_finite_visible(company):
    x = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, 1.0, *company])
    y = decode(encode(x, "bf16"), x.numel(), "bf16")
    assert y[0] == math.inf
    assert y[1] == -math.inf
    assert y[2].isnan()
    assert y[3:5].tolist() == [BF16_MAX, 1.0]


@given(FLOATS)
def test_a_decoded_bf16_value_is_a_fixed_point(values):
    once = decode(encode(torch.tensor(values, dtype=torch.float32), "bf16"), len(values), "bf16")
    assert torch.equal(bits(decode(encode(once, "bf16"), len(values), "bf16")), bits(once))


@pytest.mark.parametrize("wire", WIRES)
def test_neither_direction_shares_memory_with_its_input(wire):
    x = random(2)
    payload = encode(x, wire)
    y = decode(payload, 500, wire)
    before = y.clone()
    x.zero_()
    assert torch.equal(decode(payload, 500, wire), before)
    payload.zero_()
    assert torch.equal(y, before)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("size", [0, 1, 500, (1 << 18) - 1, (1 << 18) + 3, 3 << 18])
def test_encoding_in_place_gives_the_same_bytes(wire, size):
    x = random(4, size)
    if size > 1:
        x[[0, size // 2, -1]] = torch.tensor([3.4e38, math.inf, -3.4e38])
    payload = encode(x, wire)
    address = x.data_ptr()
    in_place = encode_in_place(x, wire)
    assert torch.equal(in_place, payload)
    assert in_place.data_ptr() == address


@pytest.mark.parametrize("wire", WIRES)
def test_a_payload_may_lie_at_any_address(wire):
    payload = encode(random(5), wire)
    odd = torch.cat((torch.zeros(1, dtype=torch.uint8), payload))[1:]
    assert odd.data_ptr() % 2 == 1 and check_payload(odd, 500, wire).data_ptr() == odd.data_ptr()
    assert torch.equal(decode(odd, 500, wire), decode(payload, 500, wire))


def test_a_part_must_begin_where_a_block_begins():
    assert bytes_of(slice(1 << 18, (1 << 18) + 3), "bf16") == slice(1 << 19, (1 << 19) + 6)
    with pytest.raises(LocalProtocolError, match="multiple of 262144"):
        bytes_of(slice(64, 128), "bf16")


@pytest.mark.parametrize("wire", WIRES)
def test_results_can_be_put_into_memory_that_is_there(wire):
    payload, shadow, out = encode(random(6), wire), random(7), torch.full((500,), math.nan)
    assert decode(payload, 500, wire, out=out) is out
    assert torch.equal(out, decode(payload, 500, wire))
    assert decode_publication(payload, shadow, 500, wire, out=out) is out
    assert torch.equal(out, decode_publication(payload, shadow, 500, wire))
    theta, memory = random(8), (torch.empty(payload_bytes(500, wire), dtype=torch.uint8), torch.empty(500))
    for fresh, put in zip(encode_publication(theta, shadow, wire), encode_publication(theta, shadow, wire, out=memory), strict=True):
        assert torch.equal(fresh, put)


@pytest.mark.parametrize("wire", WIRES)
def test_a_publication_in_several_blocks_is_one_difference(wire):
    theta, shadow = random(9, (1 << 18) + 7), random(10, (1 << 18) + 7)
    payload, new_shadow = encode_publication(theta, shadow, wire)
    assert torch.equal(payload, encode(theta if wire == "fp32" else theta - shadow, wire))
    assert torch.equal(new_shadow, decode_publication(payload, shadow, theta.numel(), wire))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("kind", [bytes, bytearray, lambda b: memoryview(b"x" + b)[1:]])
def test_every_kind_of_buffer_is_read_without_a_warning(wire, kind):
    x = random(3)
    payload = encode(x, wire)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = decode(kind(bytes(payload.tolist())), 500, wire)
    assert torch.equal(y, decode(payload, 500, wire))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(("extra", "reason"), [(1, "oversized"), (-1, "wrong_layout"), (-200, "wrong_layout")])
def test_a_payload_of_another_length_is_refused(wire, extra, reason):
    data = bytes(payload_bytes(500, wire) + extra)
    with pytest.raises(RemoteProtocolError) as caught:
        decode(data, 500, wire)
    assert caught.value.reason == reason


@pytest.mark.parametrize("wire", WIRES)
def test_no_elements_are_no_bytes(wire):
    assert encode(torch.zeros(0), wire).numel() == 0
    assert decode(b"", 0, wire).shape == (0,)
    with pytest.raises(RemoteProtocolError, match="wrong_layout"):
        decode(b"", 1, wire)


@pytest.mark.parametrize("wire", ["int8", "fp16", ""])
def test_unknown_wire_dtypes_are_refused(wire):
    for call in (lambda: payload_bytes(1, wire), lambda: encode(torch.zeros(1), wire), lambda: decode(b"", 0, wire)):
        with pytest.raises(ConfigurationError, match="wire_dtype"):
            call()


@pytest.mark.parametrize("payload", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)])
def test_tensors_that_are_not_payloads_are_refused(payload):
    with pytest.raises(LocalProtocolError, match="flat uint8"):
        decode(payload, 1, "fp32")


# --- publications -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
def test_encoder_and_decoder_of_a_publication_get_the_same_bits(wire):
    theta, shadow = random(4), random(5)
    payload, new_shadow = encode_publication(theta, shadow, wire)
    assert torch.equal(bits(decode_publication(payload, shadow.clone(), 500, wire)), bits(new_shadow))
    assert torch.equal(bits(decode_publication(bytes(payload.tolist()), shadow, 500, wire)), bits(new_shadow))
    assert torch.equal(shadow, random(5))


def test_fp32_publishes_values_whatever_the_shadow_is():
    theta = random(6)
    payload, new_shadow = encode_publication(theta, random(7, scale=1e6), "fp32")
    assert torch.equal(bits(new_shadow), bits(theta))
    assert torch.equal(bits(decode_publication(payload, torch.zeros(500), 500, "fp32")), bits(theta))


def largest_of_group(x):
    """For every element the largest of the 64 that share a scale, float64."""
    groups = torch.nn.functional.pad(x, (0, -x.numel() % 64)).view(-1, 64)
    return groups.abs().amax(1).double().repeat_interleave(64)[: x.numel()]


@pytest.mark.parametrize("wire", ["bf16", "int4"])
def test_the_rounding_error_of_a_chain_of_publications_does_not_grow(wire):
    theta = random(8)
    shadow = theta
    held = theta.clone()
    errors = []
    for version in range(400):
        difference = (theta := theta + random(100 + version, scale=1e-3)) - shadow
        payload, shadow = encode_publication(theta, shadow, wire)
        held = decode_publication(payload, held, 500, wire)
        assert torch.equal(bits(held), bits(shadow))
        # One rounding of the difference, and one of the sum to float32.
        one = 2.0**-8 * difference.abs().double() if wire == "bf16" else (1 + 2.0**-7) / 14 * largest_of_group(difference)
        bound = one + 2.0**-24 * shadow.abs().double() + 2.0**-24 * theta.abs().double()
        assert bool(((theta.double() - shadow.double()).abs() <= bound).all())
        errors.append(float((theta - shadow).norm()))
    assert max(errors[-100:]) < 1.5 * max(errors[:100]), "what one rounding leaves, not what all have left"


@pytest.mark.parametrize(("wire", "rounds"), [("bf16", 8), ("int4", 16)])
def test_a_resting_theta_is_reached(wire, rounds):
    theta, shadow = random(9), random(10)
    for _ in range(rounds):
        _, shadow = encode_publication(theta, shadow, wire)
    assert torch.equal(shadow, theta)


def test_a_difference_beyond_the_range_of_bf16_is_sent_in_parts():
    theta, shadow = torch.tensor([3.4e38]), torch.tensor([0.0])
    for _ in range(3):
        _, shadow = encode_publication(theta, shadow, "bf16")
    assert torch.equal(shadow, theta)


def test_full_transfers_are_the_float32_shadow():
    shadow = random(11)
    assert torch.equal(bits(decode_full(encode_full(shadow), 500)), bits(shadow))
    with pytest.raises(RemoteProtocolError, match="wrong_layout"):
        decode_full(encode(shadow, "bf16"), 500)


def test_sizes_of_publications_are_checked():
    with pytest.raises(LocalProtocolError, match="shadow is a"):
        encode_publication(torch.zeros(3), torch.zeros(1), "bf16")
    with pytest.raises(LocalProtocolError, match="shadow is a"):
        decode_publication(bytes(6), torch.zeros(1), 3, "bf16")
    with pytest.raises(LocalProtocolError, match="Memory of 5 bytes for a payload: 3 elements in bf16 are 6"):
        encode_publication(torch.zeros(3), torch.zeros(3), "bf16", out=(torch.zeros(5, dtype=torch.uint8), torch.zeros(3)))
