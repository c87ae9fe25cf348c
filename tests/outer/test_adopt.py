"""Adoption by rebase: nothing that was done meanwhile is lost, and rounding errors are fed back."""

import pytest
import torch

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.outer import (
    Fragment,
    FragmentState,
    MergeAccumulator,
    TensorSlice,
    decode,
    encode,
    encode_publication,
    outer_step,
    pseudo_gradient,
    rebase_delta,
    reference,
)

N = 300
FRAGMENT = Fragment(
    fragment_id=0,
    kind="parameters",
    slices=(TensorSlice(name="w", dtype="float32", global_shape=(N,), offset=0, length=N),),
)


def random(seed, scale=1.0):
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * scale


def merge_round(state, contributions, *, lr=1.0, momentum=0.0, wire="fp32"):
    """One round on the syncer: the new state, with the shadow that every learner adopts."""
    accumulator = MergeAccumulator(FRAGMENT)
    for d in contributions:
        accumulator.fold(d, 1.0)
    state = outer_step(state, accumulator.result()[0], lr=lr, momentum=momentum)
    _, shadow = encode_publication(state.theta, state.shadow, wire)
    return FragmentState(theta=state.theta, momentum=state.momentum, shadow=shadow, merge_index=state.merge_index)


def test_the_reference_is_the_base_less_what_was_merged():
    base, d = random(1), random(2)
    assert reference(base, None) is base
    assert torch.equal(reference(base, d), base - d)
    assert torch.equal(rebase_delta(random(3), base, d), random(3) - (base - d))
    assert torch.equal(rebase_delta(random(3), base, None), random(3) - base)


def test_a_fragment_of_several_blocks_is_adopted_as_in_one_piece():
    size = (1 << 18) + 5
    published, base, d = torch.randn(3, size).unbind()
    expected = published - (base - d)
    assert torch.equal(rebase_delta(published, base, d), expected)
    assert rebase_delta(published, base, d, out=d) is d
    assert torch.equal(d, expected)


def test_sizes_are_checked():
    for call in (
        lambda: reference(random(1), torch.zeros(1)),
        lambda: rebase_delta(torch.zeros(1), random(1), None),
        lambda: rebase_delta(random(1), random(1).double(), None),
        lambda: rebase_delta(random(1), random(1), torch.zeros(1)),
        lambda: rebase_delta(random(1), random(1), random(1).bfloat16()),
        lambda: rebase_delta(random(1).bfloat16(), random(1), None),
    ):
        with pytest.raises(LocalProtocolError, match="flat, contiguous float32"):
            call()


def test_one_learner_with_plain_outer_sgd_gets_exactly_zero():
    base = random(4)
    state = FragmentState.founded(base)
    theta = base.clone()
    for version in range(50):
        theta = theta + random(100 + version, scale=1e-2)
        d = decode(encode(pseudo_gradient(base, theta), "fp32"), N, "fp32")
        state = merge_round(state, [d])
        delta = rebase_delta(state.shadow, base, d)
        assert torch.equal(delta.view(torch.int32), torch.zeros(N, dtype=torch.int32))
        before, base, theta = theta, state.shadow, theta + delta
        assert torch.equal(theta, before)
        # The published values are the local ones to within rounding of base - (base - theta).
        assert bool(((base - theta).abs() <= 2.0**-23 * (base.abs() + theta.abs())).all())


def test_steps_done_while_the_fragment_was_in_flight_stay():
    base, work, later = random(5), random(6, scale=1e-2), random(7, scale=1e-2)
    snapshot = base + work
    d = pseudo_gradient(base, snapshot)
    state = merge_round(FragmentState.founded(base), [d])
    adopted = (snapshot + later) + rebase_delta(state.shadow, base, d)
    torch.testing.assert_close(adopted - state.shadow, later, rtol=0, atol=1e-6)


def test_work_that_missed_a_round_is_still_all_local_progress():
    base, work = random(8), random(9, scale=1e-2)
    other = pseudo_gradient(base, base + random(10, scale=1e-2))
    state = merge_round(FragmentState.founded(base), [other])
    adopted = (base + work) + rebase_delta(state.shadow, base, None)
    torch.testing.assert_close(pseudo_gradient(state.shadow, adopted), -work, rtol=0, atol=1e-6)


def train(rounds, *, wire, adopt):
    """One learner, the same inner steps whatever its parameters are: the distance from where exact arithmetic would be."""
    base = random(11)
    exact = base.double()
    state, theta = FragmentState.founded(base), base.clone()
    distances = []
    for version in range(rounds):
        step = random(1000 + version, scale=1e-2)
        exact, theta = exact + step.double(), theta + step
        d = decode(encode(pseudo_gradient(base, theta), wire), N, wire)
        state = merge_round(state, [d], wire="fp32")
        theta = state.shadow.clone() if adopt == "overwrite" else theta + rebase_delta(state.shadow, base, d)
        base = state.shadow
        distances.append(float((state.theta.double() - exact).norm()))
    return distances


# One rounding: at most 2^-8 of a value in bf16, and half a level, 1/14 of its group's largest value, in int4. Values are below 0.06.
@pytest.mark.parametrize(("wire", "one_rounding"), [("bf16", 2.0**-8 * 0.01), ("int4", 0.06 / 14)])
def test_rebase_feeds_the_rounding_error_of_contributions_back(wire, one_rounding):
    rebased = train(300, wire=wire, adopt="rebase")
    overwritten = train(300, wire=wire, adopt="overwrite")
    # It does not grow. With overwrite it is a random walk.
    assert max(rebased) < one_rounding * N**0.5
    assert max(rebased[-50:]) < 1.5 * max(rebased[:50])
    assert overwritten[-1] > 5 * rebased[-1]


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int4"])
def test_parameters_are_base_plus_progress_that_is_not_merged(wire):
    state = FragmentState.founded(random(12))
    bases, thetas = [state.shadow] * 3, [state.shadow.clone() for _ in range(3)]
    for version in range(60):
        thetas = [t + random(10 * version + m, scale=1e-2) for m, t in enumerate(thetas)]
        members = [m for m in range(3) if (version + m) % 3]
        ds = {m: decode(encode(pseudo_gradient(bases[m], thetas[m]), wire), N, wire) for m in members}
        unmerged = [(thetas[m] - bases[m]) + ds.get(m, torch.zeros(N)) for m in range(3)]
        state = merge_round(state, list(ds.values()), lr=0.7, momentum=0.6, wire=wire)
        thetas = [t + rebase_delta(state.shadow, bases[m], ds.get(m)) for m, t in enumerate(thetas)]
        bases = [state.shadow] * 3
        for theta, rest in zip(thetas, unmerged, strict=True):
            torch.testing.assert_close(theta - state.shadow, rest, rtol=0, atol=2e-6)
