"""Pseudo-gradient and outer optimizer, against torch's own SGD."""

import math

import pytest
import torch

from lightning_diloco.errors import ConfigurationError, LocalProtocolError
from lightning_diloco.outer import FragmentState, last_step, momentum_at, outer_step, pseudo_gradient


def random(seed, size=1000):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# --- pseudo-gradient ----------------------------------------------------------------------------------------------------------------


def test_the_pseudo_gradient_is_base_minus_local():
    assert pseudo_gradient(torch.tensor([3.0]), torch.tensor([1.0])).item() == 2.0


def test_descending_it_with_rate_one_arrives_at_the_local_parameters():
    base, local = torch.tensor([0.5, -2.0, 8.0]), torch.tensor([0.25, -3.0, 1.0])
    state = outer_step(FragmentState.founded(base), pseudo_gradient(base, local), lr=1.0, momentum=0.0)
    assert torch.equal(state.theta, local)


def test_it_can_be_written_over_the_snapshot():
    base, local = random(1), random(2)
    expected = base - local
    assert pseudo_gradient(base, local, out=local) is local
    assert torch.equal(local, expected)


def test_two_sizes_are_refused():
    with pytest.raises(LocalProtocolError, match="local is a"):
        pseudo_gradient(torch.zeros(3), torch.zeros(1))


# --- momentum -----------------------------------------------------------------------------------------------------------------------


def test_the_momentum_warms_up_with_the_merges_of_the_fragment():
    assert [momentum_at(v, 0.9, 5) for v in (1, 5, 20, 45, 46, 1000)] == [1 / 6, 0.5, 0.8, 0.9, 0.9, 0.9]
    assert [momentum_at(v, 0.6, 0) for v in (1, 100)] == [0.6, 0.6]
    with pytest.raises(LocalProtocolError, match="number 1"):
        momentum_at(0, 0.9, 5)


# --- outer step ---------------------------------------------------------------------------------------------------------------------


def torch_sgd(theta, gradients, *, lr, momenta):
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=momenta[0], nesterov=momenta[0] > 0)
    for gradient, momentum in zip(gradients, momenta, strict=True):
        optimizer.param_groups[0]["momentum"] = momentum
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def ours(theta, gradients, *, lr, momenta):
    state = FragmentState.founded(theta)
    for gradient, momentum in zip(gradients, momenta, strict=True):
        state = outer_step(state, gradient, lr=lr, momentum=momentum)
    return state


@pytest.mark.parametrize("lr", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_many_steps_are_those_of_torch_sgd_with_nesterov(lr, momentum):
    theta, gradients = random(5), [random(10 + i) * 0.01 for i in range(60)]
    state = ours(theta, gradients, lr=lr, momenta=[momentum] * 60)
    assert state.merge_index == 60
    torch.testing.assert_close(state.theta, torch_sgd(theta, gradients, lr=lr, momenta=[momentum] * 60), rtol=1e-6, atol=5e-6)
    exact = torch_sgd(theta.double(), gradients, lr=lr, momenta=[momentum] * 60)
    torch.testing.assert_close(state.theta.double(), exact, rtol=1e-6, atol=5e-6)


def test_a_momentum_that_warms_up_is_that_of_torch_too():
    theta, gradients = random(6), [random(100 + i) * 0.01 for i in range(60)]
    momenta = [momentum_at(v, 0.9, 5) for v in range(1, 61)]
    expected = torch_sgd(theta, gradients, lr=0.7, momenta=momenta)
    torch.testing.assert_close(ours(theta, gradients, lr=0.7, momenta=momenta).theta, expected, rtol=1e-6, atol=5e-6)


def test_without_momentum_and_with_rate_one_it_is_one_subtraction_bit_for_bit():
    theta = torch.cat([random(7), torch.tensor([-0.0, 0.0, -0.0])])
    g = torch.cat([random(8), torch.tensor([-0.0, 0.0, 0.0])])
    state = outer_step(FragmentState.founded(theta), g, lr=1.0, momentum=0.0)
    assert torch.equal(state.theta.view(torch.int32), (theta - g).view(torch.int32))
    assert torch.equal(state.momentum, g)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_changes_nothing_that_it_was_given(momentum):
    theta, g = random(9), random(10)
    state = ours(theta, [random(11)], lr=0.7, momenta=[0.5])
    copies = [t.clone() for t in (state.theta, state.momentum, state.shadow, g)]
    after = outer_step(state, g, lr=0.7, momentum=momentum)
    assert all(torch.equal(a, b) for a, b in zip(copies, (state.theta, state.momentum, state.shadow, g), strict=True))
    after.momentum.zero_()
    assert torch.equal(g, copies[3])
    assert after.shadow is state.shadow
    assert (state.merge_index, after.merge_index) == (1, 2)


@pytest.mark.parametrize(
    ("lr", "momentum"), [(0.0, 0.5), (-1.0, 0.5), (math.inf, 0.5), (math.nan, 0.5), (0.7, 1.0), (0.7, -0.1), (0.7, math.nan)]
)
def test_rates_outside_their_range_are_refused(lr, momentum):
    with pytest.raises(ConfigurationError, match="lr must be finite"):
        outer_step(FragmentState.founded(torch.zeros(2)), torch.zeros(2), lr=lr, momentum=momentum)


def test_a_state_validates_itself():
    good = torch.zeros(4)
    with pytest.raises(LocalProtocolError, match="momentum is a"):
        FragmentState(theta=good, momentum=torch.zeros(3), shadow=good)
    with pytest.raises(LocalProtocolError, match="shadow is a"):
        FragmentState(theta=good, momentum=good, shadow=good.double())
    with pytest.raises(LocalProtocolError, match="merge_index=-1"):
        FragmentState(theta=good, momentum=good, shadow=good, merge_index=-1)
    with pytest.raises(LocalProtocolError, match="pseudo_gradient is a"):
        outer_step(FragmentState.founded(good), torch.zeros(1), lr=0.7, momentum=0.5)


# --- the last step ------------------------------------------------------------------------------------------------------------------


def _nesterov(mu, lr, merges):
    """The method as x and v (float64) and ours, after some merges with other gradients each: v' = mu v - lr g(x + mu v), x' = x + v'."""
    x, v = random(1).double(), torch.zeros(1000, dtype=torch.float64)
    state = FragmentState.founded(x.float())
    for seed in range(2, 2 + merges):
        g = random(seed)
        before, state = state, outer_step(state, g, lr=lr, momentum=mu)
        v = mu * v - lr * g.double()
        x = x + v
    return x, v, before, state, g


def test_a_last_step_of_a_whole_interval_ends_at_the_iterate_of_nesterovs_method_and_keeps_the_momentum():
    x, v, before, state, g = _nesterov(0.75, 0.5, merges=4)
    last = last_step(before, g, lr=0.5, share=1.0)
    torch.testing.assert_close(state.theta.double(), x + 0.75 * v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.theta.double(), x, rtol=1e-5, atol=1e-5)
    assert last.momentum is before.momentum
    assert last.merge_index == state.merge_index
    assert last.ahead == 0.0


def test_a_last_step_of_which_nothing_was_trained_goes_back_to_the_iterate():
    x, v, _, state, _ = _nesterov(0.75, 0.5, merges=4)
    zero = torch.zeros(1000)
    torch.testing.assert_close(last_step(state, zero, lr=0.5, share=0.0).theta.double(), x, rtol=1e-5, atol=1e-5)
    half = last_step(state, zero, lr=0.5, share=0.5)
    torch.testing.assert_close(half.theta.double(), x + 0.375 * v, rtol=1e-5, atol=1e-5)
    assert torch.equal(last_step(half, zero, lr=0.5, share=0.0).theta, half.theta), "it is not ahead any more"


def test_without_momentum_the_last_step_is_as_any():
    state, g = FragmentState.founded(random(1)), random(2)
    assert torch.equal(last_step(state, g, lr=1.0, share=0.3).theta, outer_step(state, g, lr=1.0, momentum=0.0).theta)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_outside_of_an_interval_is_refused(share):
    with pytest.raises(LocalProtocolError, match="share="):
        last_step(FragmentState.founded(random(1)), random(2), lr=1.0, share=share)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_in_several_blocks_is_one_step(momentum):
    size = (1 << 18) + 7
    theta, buffer, g = torch.randn(3, size, generator=torch.Generator().manual_seed(3)).unbind()
    state = FragmentState(theta=theta, momentum=buffer, shadow=theta, ahead=0.5)
    new = outer_step(state, g, lr=0.7, momentum=momentum)
    direction = g if momentum == 0.0 else momentum * buffer + g
    step = g if momentum == 0.0 else momentum * direction + g
    assert torch.equal(new.momentum, direction)
    assert torch.equal(new.theta, theta - 0.7 * step)
    last = last_step(state, g, lr=0.7, share=0.25)
    assert torch.equal(last.theta, (theta - 0.7 * g) + (0.75 * 0.7 * 0.5) * buffer)
