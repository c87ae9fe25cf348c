"""The pseudo-gradient: base minus local, so that the outer optimizer *descends* it.

A learner that moved from its base to its local parameters contributes base - local; outer SGD with learning rate 1 and no momentum,
on that contribution alone, then lands on the local parameters. This is the only place that fixes the sign.

References:
    DiLoCo, arXiv 2311.08105, and Decoupled DiLoCo, arXiv 2604.21428: outer gradients. Anchoring on the learner's own base is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_diloco.outer._checks import require_flat

__all__ = ["pseudo_gradient"]


def pseudo_gradient(base: Tensor, local: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Subtract a learner's local fragment from its base.

    Args:
        base: the fragment as last adopted, flat float32 [N].
        local: the learner's present fragment, flat float32 [N].
        out: where to put the result; may be `local`. None allocates.

    Returns:
        base - local, flat float32 [N].

    Raises:
        LocalProtocolError: the two are not flat float32 of one size.
    """
    require_flat(base, None, "base")
    require_flat(local, base.numel(), "local")
    return torch.sub(base, local) if out is None else torch.sub(base, local, out=out)
