"""Norms: the bound of their rounding, float32's whole range, what is not finite, and that threads do not matter."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.outer import Encoded, Fragment, TensorSlice, blocks, decode, encode, measure
from lightning_diloco.outer.memory import BLOCK_ELEMENTS
from lightning_diloco.outer.norms import Meter, cut, sum_of_squares

BOUND = 130 * 2.0**-24


def fragment_of(*lengths):
    slices = (TensorSlice(name=f"t{i}", dtype="float32", global_shape=(n,), offset=0, length=n) for i, n in enumerate(lengths))
    return Fragment(fragment_id=0, kind="parameters", slices=tuple(slices))


def random(size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def exact(values):
    """The formula, in float64 and in one piece."""
    return math.sqrt(math.fsum(x * x for x in values.double().tolist()))


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=6), st.integers(0, 2**31), st.sampled_from([1e-42, 1e-30, 1e-20, 1.0, 1e25, 1e37])
)
@settings(deadline=None)
def test_norms_are_those_of_the_tensors_and_of_the_whole(lengths, seed, scale):
    values = random(sum(lengths), seed) * scale
    found = measure(fragment_of(*lengths), Encoded.plain(values))
    assert found.whole == pytest.approx(exact(values), rel=BOUND)
    assert found.of_slices == pytest.approx([exact(part) for part in values.split(lengths)], rel=BOUND)


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int4"])
def test_blocks_cut_tensors_and_the_payload_is_measured_as_it_is_decoded(wire):
    lengths = [7, BLOCK_ELEMENTS + 300, 1, 255, BLOCK_ELEMENTS]
    size, fragment, seen = sum(lengths), fragment_of(*lengths), []
    payload = encode(random(size), wire)
    found = measure(fragment, Encoded.of(payload, size, wire), look=seen.append)
    parts = decode(payload, size, wire).split(lengths)
    assert found.of_slices == pytest.approx([float(part.double().norm()) for part in parts], rel=1e-7)
    assert [where.start for where in seen[1:]] == [where.stop for where in seen[:-1]]
    assert (seen[0].start, seen[-1].stop) == (0, payload.numel())


def test_the_bound_holds_where_every_sum_is_rounded_in_the_same_direction():
    for value in (1.1, 1.0 + 2**-12 + 2**-23, 1.3333):
        values = torch.full((BLOCK_ELEMENTS,), value)
        assert math.sqrt(sum_of_squares(values)) == pytest.approx(float(values[0].double()) * math.sqrt(BLOCK_ELEMENTS), rel=BOUND)


@pytest.mark.parametrize("size", [1, 255, 256, 70_001])
@pytest.mark.parametrize("value", [3.4e38, 2.0**64, 1e-45, 2.0**-75, 2.0**-126, 0.0])
def test_squares_outside_of_float32_are_neither_overflow_nor_lost(size, value):
    values = torch.zeros(size)
    values[-1] = value
    assert math.sqrt(sum_of_squares(values)) == pytest.approx(float(values[-1].double()), rel=BOUND, abs=0)
    values.fill_(value)
    assert math.sqrt(sum_of_squares(values)) == pytest.approx(float(values[0].double()) * math.sqrt(size), rel=BOUND, abs=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 300, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 299])
def test_a_norm_is_finite_exactly_when_every_element_is(value, position):
    fragment = fragment_of(300, BLOCK_ELEMENTS)
    d = random(BLOCK_ELEMENTS + 300) * 3e37
    d[position - 1] = 3.4e38
    assert math.isfinite(measure(fragment, Encoded.plain(d)).whole)
    d[position] = value
    found = measure(fragment, Encoded.plain(d))
    assert not math.isfinite(found.whole)
    assert [math.isfinite(norm) for norm in found.of_slices] == [position >= 300, position < 300]


def test_a_block_has_its_pieces_without_gaps():
    fragment = fragment_of(5, BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS)
    pieces = cut(fragment)
    assert len(pieces) == len(list(blocks(fragment.num_params))) == 4
    for block, of_block in zip(blocks(fragment.num_params), pieces, strict=True):
        ends = [0, *(piece.where.stop for piece in of_block)]
        assert [piece.where.start for piece in of_block] == ends[:-1] and ends[-1] == block.stop - block.start
    assert [[piece.slice_index for piece in of_block] for of_block in pieces] == [[0, 1], [1, 2], [2], [2]]


def test_half_a_contribution_has_no_norm():
    fragment = fragment_of(BLOCK_ELEMENTS, 1)
    meter = Meter(fragment)
    meter.add(torch.ones(BLOCK_ELEMENTS))
    with pytest.raises(LocalProtocolError, match="1 of 2 blocks"):
        meter.norms()
    with pytest.raises(LocalProtocolError, match="7 elements"):
        measure(fragment, Encoded.plain(torch.zeros(7)))


_PROGRAM = """
import sys, torch
from tests.outer.test_norms import *
torch.set_num_threads(int(sys.argv[1]))
fragment = fragment_of(3, 700_001, 12_345)
print(*measure(fragment, Encoded.plain(random(712_349))).of_slices, *measure(fragment, Encoded.plain(random(712_349) * 1e30)).of_slices)
"""


@pytest.mark.process
def test_the_number_of_threads_changes_no_bit():
    found = {
        subprocess.run([sys.executable, "-c", _PROGRAM, threads], capture_output=True, text=True, check=True, timeout=100).stdout
        for threads in ("1", "2", "3")
    }
    assert len(found) == 1 and len(next(iter(found)).split()) == 6
