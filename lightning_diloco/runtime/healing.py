"""What the training thread looks at when the syncer refused values that are not finite.

One refusal names one fragment. But one step after a parameter has become NaN every gradient is NaN, and so are all fragments: mended one
by one, each would be poisoned again by those that are not. So while such a heal is due, every fragment is looked at, and the rules heal
all that are poisoned at one boundary. It costs a pass over the parameters, in a step that was lost anyway.
"""

from __future__ import annotations

import torch
from torch import nn

from lightning_diloco.outer import FragmentView

__all__ = ["is_finite", "parameters_of"]


def is_finite(module: nn.Module, view: FragmentView) -> bool:
    """Whether all parameters of a fragment are finite."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters_of(module, view))


def parameters_of(module: nn.Module, view: FragmentView) -> list[nn.Parameter]:
    """The parameters of a fragment."""
    return [module.get_parameter(part.name) for part in view.fragment.slices]
