"""The step and its publication in one pass: the same bits as step by step, the checksum of what was made, and what is not finite."""

import dataclasses
import zlib

import pytest
import torch

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.outer import (
    BLOCK_ELEMENTS,
    Encoded,
    Fragment,
    FragmentState,
    MergeAccumulator,
    OuterStep,
    TensorSlice,
    encode,
    encode_publication,
    is_finite,
    last_step,
    outer_step,
    take_step,
)
from lightning_diloco.outer.codec import decode_publication

SIZE = BLOCK_ELEMENTS + 77
PART = TensorSlice(name="t", dtype="float32", global_shape=(SIZE,), offset=0, length=SIZE)
FRAGMENT = Fragment(fragment_id=0, kind="parameters", slices=(PART,))


def random(seed, scale=1.0):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * scale


def state():
    return FragmentState(theta=random(1), momentum=random(2, 1e-3), shadow=random(1) + random(3, 1e-4), ahead=0.9)


def crc(tensor, before):
    return zlib.crc32(tensor.numpy().tobytes(), before)


def merged(count):
    accumulator = MergeAccumulator(FRAGMENT)
    for seed in range(count):
        accumulator.fold(Encoded.of(encode(random(10 + seed, 1e-3), "bf16"), SIZE, "bf16"), 1.0 + seed)
    return accumulator.close()[0]


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("count", [1, 3])
def test_one_pass_has_the_bits_of_its_steps(wire, share, momentum, count):
    before = state()
    found = take_step(
        FRAGMENT, before, merged(count), OuterStep(lr=0.7, momentum=momentum, last_share=share, wire_dtype=wire), 5, checksum=crc
    )
    g = merged(count).whole()
    if share is None:
        expected = outer_step(before, g, lr=0.7, momentum=momentum)
    else:
        expected = last_step(before, g, lr=0.7, share=share)
    payload, shadow = encode_publication(expected.theta, before.shadow, wire)
    assert torch.equal(found.difference, payload)
    for name in ("theta", "momentum"):
        assert torch.equal(getattr(found.state, name), getattr(expected, name)), name
    assert torch.equal(found.state.shadow, shadow) and torch.equal(decode_publication(payload, before.shadow, SIZE, wire), shadow)
    assert (found.crc, found.is_finite, found.state.merge_index) == (crc(shadow, 0), True, 5)


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("at", [0, SIZE - 1])
def test_a_step_that_is_not_finite_anywhere_is_not_taken(wire, at):
    before, g = state(), torch.zeros(SIZE)
    g[at] = 1e38
    step = OuterStep(lr=1e3, momentum=0.0, last_share=None, wire_dtype=wire)
    found = take_step(FRAGMENT, before, g, step, 6, checksum=crc)
    assert not found.is_finite and torch.equal(found.state.theta, before.theta) and not found.state.momentum.any()
    assert is_finite(found.state.shadow) and found.crc == crc(found.state.shadow, 0)
    assert torch.equal(decode_publication(found.difference, before.shadow, SIZE, wire), found.state.shadow)


def test_a_difference_that_saturates_is_taken_and_what_is_left_stays_in_theta():
    before = dataclasses.replace(state(), shadow=torch.zeros(SIZE))
    before.theta[[0, SIZE - 1]] = torch.tensor([3.4e38, -3.4e38])
    found = take_step(FRAGMENT, before, torch.zeros(SIZE), OuterStep(lr=1.0, momentum=0.0, last_share=None, wire_dtype="bf16"), 1)
    most = torch.finfo(torch.bfloat16).max
    assert found.is_finite and found.state.shadow[[0, SIZE - 1]].tolist() == [most, -most]
    assert torch.equal(found.state.theta, before.theta)


def test_a_merge_of_another_size_is_refused():
    with pytest.raises(LocalProtocolError, match="3 elements"):
        take_step(FRAGMENT, state(), torch.zeros(3), OuterStep(lr=1.0, momentum=0.0, last_share=None, wire_dtype="bf16"), 1)


@pytest.mark.parametrize(
    ("values", "expected"), [([3e38, 3e38], True), ([], True), ([float("inf"), -float("inf")], False), ([0.0, float("nan")], False)]
)
def test_finite_values_whose_sum_overflows_are_finite(values, expected):
    assert is_finite(torch.tensor(values)) is expected
