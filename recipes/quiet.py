"""Silence, by name, for the messages of the host framework that do not apply to recipes; all others are shown."""

from __future__ import annotations

import logging
import warnings

__all__ = ["quiet"]


def quiet() -> None:
    """Turn these off, in this process (each learner calls it again).

    * "does not have many workers": the text is one tensor in memory, and a worker process would only copy it.
    * "isinstance(treespec, LeafSpec) is deprecated": how Lightning 2.6 asks torch 2.13; no script can change it.
    * what Lightning says about devices that are not there, tips, and "stopped: max_steps reached": INFO of one logger. Its
      warnings stay.
    """
    warnings.filterwarnings("ignore", message=r".*does not have many workers which may be a bottleneck", category=UserWarning)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
