"""Weights that a callback has put into the module at the end of a fit, on purpose: an average (EMA, SWA), masks made permanent (pruning).

``on_train_end`` of `OuterSync` comes first and leaves the published weights in the module. What differs from them after the other
callbacks' hooks is theirs, and the user asked for it: `fit` returns learner 0's module as it is then, ``last.ckpt`` holds it and the
last validation is of it. ``global.safetensors`` is the published model in any case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.outer import FragmentView, Layout, crc32

__all__ = ["OWN_WEIGHTS", "checksums", "take_own_weights"]

OWN_WEIGHTS = "decoupled_diloco_own_weights"
"""Key of the training state that learner 0 leaves, if its ``state_dict`` is what `fit` is to return; never in a checkpoint."""


def checksums(module: nn.Module, layout: Layout) -> tuple[int, ...]:
    """One for each fragment, of the values that the module holds now; none if the module is not as it was planned any more."""
    sums = []
    try:
        for fragment in layout.fragments:
            flat = torch.empty(fragment.num_params)
            FragmentView(module, fragment).copy_to(flat)
            sums.append(crc32(flat))
    except ConfigurationError:
        return ()
    return tuple(sums)


def take_own_weights(dump: dict[str, Any] | None) -> bool:
    """Whether the training state's ``state_dict`` is what `fit` is to return; the mark is taken out."""
    return bool(dump is not None and dump.pop(OWN_WEIGHTS, False))
