"""The outer optimizer: SGD with Nesterov momentum as a pure function on one fragment's state.

With mu the momentum of this merge, g the merged pseudo-gradient, b the momentum buffer:

    b'     = mu b + g
    step   = g + mu b'
    theta' = theta - lr step

These are the three lines of ``torch.optim.SGD(nesterov=True)`` with g as ``.grad`` (torch starts its buffer as g, which is
mu 0 + g). Each product and each sum is its own kernel: fused multiply-add rounds differently on different CPUs, and a replay has to
reproduce every bit (`recovered_momentum` is no part of one). A function never changes the state that it is given, so a state can be
written to disk while the next one is computed.

References:
    Decoupled DiLoCo, arXiv 2604.21428: Nesterov SGD on the syncer, state per fragment. Learning rate, momentum and the warm-up of the
    momentum are not published there: our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_diloco.errors import ConfigurationError, LocalProtocolError
from lightning_diloco.outer._checks import require_flat
from lightning_diloco.outer.memory import blocks, flat

__all__ = ["FragmentState", "last_step", "momentum_at", "new_step", "outer_step", "recovered_momentum", "step_block"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FragmentState:
    """All that the syncer keeps of one fragment's numerics; one object that can be written alone.

    Its tensors are never changed in place: a new state has new tensors, or shares those that did not change.

    Raises:
        LocalProtocolError: the three are not flat float32 of one size, or the index is negative.
    """

    theta: Tensor
    """Theta: the global parameters, flat float32 [N]."""
    momentum: Tensor
    """The outer momentum buffer, flat float32 [N]."""
    shadow: Tensor
    """What every learner holds as its base after the last publication, flat float32 [N]."""
    ahead: float = 0.0
    """mu of the step that made theta, by which it lies ahead of the iterate; 0 at a founding and after a last step."""
    merge_index: int = 0
    """Merges done so far."""

    def __post_init__(self) -> None:
        """Check sizes and index."""
        require_flat(self.theta, None, "theta")
        require_flat(self.momentum, self.theta.numel(), "momentum")
        require_flat(self.shadow, self.theta.numel(), "shadow")
        if self.merge_index < 0:
            raise LocalProtocolError(f"merge_index={self.merge_index}: the number of merges done, so at least 0.")

    @classmethod
    def founded(cls, theta: Tensor) -> FragmentState:
        """The state at founding: no momentum, and learners hold exactly theta.

        Args:
            theta: flat float32 [N]; must not be changed afterwards.
        """
        return cls(theta=theta, momentum=torch.zeros_like(theta), shadow=theta)

    @classmethod
    def recalled(cls, values: Tensor, before: FragmentState | None, merge_index: int) -> FragmentState:
        """The state of a version whose published values are all that is left of it.

        Args:
            values: the shadow, flat float32 [N]; must not be changed afterwards.
            before: an earlier state of the fragment, whose momentum goes on; None: it begins at zero.
            merge_index: merges in the values.
        """
        state = replace(cls.founded(values), merge_index=merge_index)
        return state if before is None else replace(state, momentum=before.momentum, ahead=before.ahead)


def momentum_at(merge_index_from_1: int, outer_momentum: float, warmup: int) -> float:
    """The momentum of a fragment's v-th merge: min(outer_momentum, v / (v + warmup)).

    Args:
        merge_index_from_1: v, from 1.
        outer_momentum: the momentum after the warm-up, in [0, 1).
        warmup: merges after which v / (v + warmup) is one half; 0 means constant.

    Raises:
        LocalProtocolError: v is below 1.
    """
    if merge_index_from_1 < 1:
        raise LocalProtocolError(f"merge_index_from_1={merge_index_from_1}: the first merge of a fragment is number 1.")
    if warmup == 0:
        return outer_momentum
    return min(outer_momentum, merge_index_from_1 / (merge_index_from_1 + warmup))


def outer_step(
    state: FragmentState,
    pseudo_gradient: Tensor,
    *,
    lr: float,
    momentum: float,
    allocate: Callable[[int], Tensor] = flat,
) -> FragmentState:
    """One step of the outer optimizer.

    With momentum 0 it is plain SGD, and with lr 1 beside it exactly theta - g, bit for bit.

    Args:
        state: the fragment's state; stays as it is.
        pseudo_gradient: the merged g, flat float32 [N].
        lr: outer learning rate, above 0.
        momentum: mu of this merge, in [0, 1); see `momentum_at`.
        allocate: where the new tensors' memory comes from, float32 of so many elements.

    Returns:
        The new state: theta and momentum new, shadow shared (publishing moves it), merge_index one more.

    Raises:
        ConfigurationError: lr or momentum is outside its range.
        LocalProtocolError: the pseudo-gradient is not flat float32 of the fragment's size.
    """
    size = state.theta.numel()
    require_flat(pseudo_gradient, size, "pseudo_gradient")
    stepped = new_step(state, lr=lr, momentum=momentum, allocate=allocate)
    for part in blocks(size):
        step_block(state, stepped, pseudo_gradient[part], part, lr=lr)
    return stepped


def new_step(state: FragmentState, *, lr: float, momentum: float, allocate: Callable[[int], Tensor] = flat) -> FragmentState:
    """The state that `step_block` fills: its theta and momentum are not set yet. Arguments and errors as in `outer_step`."""
    if not (0.0 < lr < math.inf and 0.0 <= momentum < 1.0):
        raise ConfigurationError(f"lr={lr!r}, momentum={momentum!r}: lr must be finite and above 0, momentum in [0, 1).")
    size = state.theta.numel()
    return replace(state, theta=allocate(size), momentum=allocate(size), ahead=momentum, merge_index=state.merge_index + 1)


def step_block(before: FragmentState, after: FragmentState, g: Tensor, part: slice, *, lr: float) -> None:
    """One block of an outer step.

    Args:
        before: the fragment's state; stays as it is.
        after: what `new_step` made of it.
        g: the block of the merged pseudo-gradient, flat float32; stays as it is.
        part: where it stands in the fragment.
        lr: outer learning rate.
    """
    b, theta, momentum = after.momentum[part], after.theta[part], after.ahead
    # The step lies where theta' is to be: it is read once more, by the last kernel, which writes there.
    if momentum == 0.0:
        # 0 * b + g would turn -0.0 into 0.0: without momentum the direction is g itself.
        b.copy_(g)
        torch.mul(g, lr, out=theta)
    else:
        torch.mul(before.momentum[part], momentum, out=b).add_(g)
        torch.mul(b, momentum, out=theta).add_(g).mul_(lr)
    torch.sub(before.theta[part], theta, out=theta)


def last_step(
    state: FragmentState, pseudo_gradient: Tensor, *, lr: float, share: float, allocate: Callable[[int], Tensor] = flat
) -> FragmentState:
    """The step of a merge from which nobody trains on; the momentum buffer stays as it was, for whoever resumes.

    With x the iterate of Nesterov's method and v = -lr b its velocity, `outer_step` returns theta = x + mu v, a point ahead of the iterate:
    learners are to measure the next g there, and H steps of theirs will correct it. What a run returns is the iterate, and only as much of
    the way ahead as was trained. With f the share of H steps that were:

        theta' = x + f mu v - lr g = theta - lr g + (1 - f) lr mu b

    f = 1 is x' of the method, and f = 0 with g = 0 goes back to x. Without momentum it is `outer_step`, bit for bit.

    Args:
        state: the fragment's state; stays as it is.
        pseudo_gradient: the merged g, flat float32 [N].
        lr: outer learning rate, above 0.
        share: f, in [0, 1].
        allocate: see `outer_step`.

    Returns:
        The new state: theta new and not ahead, momentum and shadow shared, merge_index one more.

    Raises:
        ConfigurationError: lr is outside its range.
        LocalProtocolError: the pseudo-gradient is not flat float32 of the fragment's size, or the share is outside [0, 1].

    References:
        Sutskever et al., *On the importance of initialization and momentum in deep learning* (2013): Nesterov's method as x and v.
        Decoupled DiLoCo does not say how a run ends: our choice, measured in ``docs/lab-notes.md``.
    """
    if not 0.0 <= share <= 1.0:
        raise LocalProtocolError(f"share={share!r}: the part of an interval that was trained, so in [0, 1].")
    theta = outer_step(state, pseudo_gradient, lr=lr, momentum=0.0, allocate=allocate).theta
    back = (1.0 - share) * lr * state.ahead
    if back > 0.0:
        theta = theta.add_(torch.mul(state.momentum, back))
    return replace(state, theta=theta, ahead=0.0, merge_index=state.merge_index + 1)


def recovered_momentum(
    buffer: Tensor, before: Tensor, after: Tensor, *, lr: float, momenta: Sequence[float], out: Tensor | None = None
) -> Tensor:
    """The momentum buffer after outer steps of which only their effect is known.

    With s = (theta - theta') / lr, the lines above give s = g + mu b' and b' = mu b + g, so b' = (mu b + s) / (1 + mu). An error in b
    shrinks by mu / (1 + mu), below one half, at every step: whoever starts from zero knows the buffer to a thousandth after ten steps. So
    a learner can keep the syncer's momentum for its checkpoints without a byte of traffic. Of several steps only the sum is known: each
    counts for an equal share of it.

    Args:
        buffer: b, flat float32 [N]; stays as it is.
        before: theta, flat float32 [N]; stays as it is.
        after: theta after all steps, flat float32 [N]; stays as it is.
        lr: outer learning rate of the steps, above 0.
        momenta: mu of each step, in [0, 1); at least one.
        out: where to put the result, other memory than the three above; None allocates.

    Returns:
        b', flat float32 [N], up to the rounding of the difference (that of the wire dtype, where it came over the wire).
    """
    require_flat(before, buffer.numel(), "before")
    require_flat(after, buffer.numel(), "after")
    new = torch.empty_like(buffer) if out is None else out
    # Of one step the difference lies where the result is to be: memory of its own for it costs more than the arithmetic.
    step = torch.sub(before, after, out=new if len(momenta) == 1 else None).mul_(1.0 / (lr * len(momenta)))
    for momentum in momenta:
        torch.lerp(buffer, step, 1.0 / (1.0 + momentum), out=new)
        buffer = new
    return new
