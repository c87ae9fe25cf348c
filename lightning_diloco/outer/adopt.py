"""Adoption by rebase: a learner takes a published fragment and keeps the steps it did meanwhile.

    theta <- theta + (published - reference)         reference = base - d^   if the published version contains the contribution d^
                                                     reference = base        otherwise

d^ is the contribution *as decoded by the syncer*. So the rounding error of a compressed contribution, (base - theta) - d^, stays in the
local parameters and is part of the next contribution: error feedback without a residual buffer. With one learner, outer lr 1,
momentum 0 and float32 the published fragment is base - d^, and the added difference is exactly 0.

Overwriting, the paper's rule, is `FragmentView.copy_from` of the published fragment.

References:
    Decoupled DiLoCo, arXiv 2604.21428, Algorithm 1 (overwrite). Rebase is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_diloco.outer._checks import require_flat
from lightning_diloco.outer.memory import blocks

__all__ = ["rebase_delta", "reference"]


def reference(base: Tensor, merged_decoded: Tensor | None) -> Tensor:
    """What the published fragment is compared with.

    Args:
        base: the fragment as last adopted, flat float32 [N].
        merged_decoded: d^, this learner's contribution as decoded, float32 [N], if the new version contains it; None if it does not.

    Returns:
        base - d^, or `base` itself (not a copy), flat float32 [N].

    Raises:
        LocalProtocolError: the two are not flat float32 of one size.
    """
    require_flat(base, None, "base")
    if merged_decoded is None:
        return base
    require_flat(merged_decoded, base.numel(), "merged_decoded")
    return torch.sub(base, merged_decoded)


def rebase_delta(published: Tensor, base: Tensor, merged_decoded: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """What has to be added to the local parameters.

    Args:
        published: the new version's shadow, flat float32 [N].
        base: the fragment as last adopted, flat float32 [N].
        merged_decoded: d^ if the new version contains it, float32 [N], else None.
        out: where to put the result, float32 [N]; may be `merged_decoded`, but not one of the other two. None allocates.

    Returns:
        published - reference, flat float32 [N], with memory of its own.

    Raises:
        LocalProtocolError: the tensors are not flat float32 of one size.
    """
    require_flat(base, None, "base")
    require_flat(published, base.numel(), "published")
    if merged_decoded is not None:
        require_flat(merged_decoded, base.numel(), "merged_decoded")
    delta = torch.empty_like(published) if out is None else out
    for part in blocks(base.numel()):
        # The reference lies where the result is to be: memory of its own for it costs more than the subtraction.
        before = base[part] if merged_decoded is None else torch.sub(base[part], merged_decoded[part], out=delta[part])
        torch.sub(published[part], before, out=delta[part])
    return delta
