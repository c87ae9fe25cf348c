"""Weights that a callback has put into the module at the end of a fit, on purpose: an average (EMA, SWA), masks made permanent (pruning).

``on_train_end`` of `OuterSync` comes first and leaves the published weights in the module. What differs from them after the other
callbacks' hooks is theirs, and the user asked for it: `fit` returns learner 0's module as it is then, ``last.ckpt`` holds it and the
last validation is of it. ``global.safetensors`` is the published model in any case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.outer import FragmentView, Layout
from lightning_diloco.runtime.checksum import crc32

__all__ = ["OWN_WEIGHTS", "all_close", "checksums", "take_own_weights"]

OWN_WEIGHTS = "decoupled_diloco_own_weights"
"""Key of the training state that learner 0 leaves, if its ``state_dict`` is what `fit` is to return; never in a checkpoint."""


def checksums(module: nn.Module, layout: Layout) -> tuple[int, ...]:
    """One for each fragment of parameters, of what the module holds now; none if the module is not as it was planned any more.

    Running statistics are left out: a forward pass changes them, and means nothing by it.
    """
    sums = []
    try:
        for fragment in (f for f in layout.fragments if not f.holds_values):
            flat = torch.empty(fragment.num_params, dtype=torch.float32, device="cpu")
            FragmentView(module, fragment).copy_to(flat)
            sums.append(crc32(flat))
    except ConfigurationError:
        return ()
    return tuple(sums)


def all_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether tensors of equal names are equal up to what a difference in float32 loses."""
    return all(torch.allclose(value, second[name], rtol=1e-5, atol=1e-6) for name, value in first.items())


def take_own_weights(dump: dict[str, Any] | None) -> bool:
    """Whether the training state's ``state_dict`` is what `fit` is to return; the mark is taken out."""
    return bool(dump is not None and dump.pop(OWN_WEIGHTS, False))
