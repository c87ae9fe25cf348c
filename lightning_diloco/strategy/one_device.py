"""Lightning's question whether a strategy is distributed, answered for the inline mode.

Lightning decides by the strategy's class, and every `DDPStrategy` counts as several processes in step. Inline there is one process and one
learner: batch sizes can be tried, and no sampler needs a share. There is no hook for the answer, so the property is replaced, once, when
the first inline strategy is made; for all other strategies it answers as before.
"""

from __future__ import annotations

from typing import cast

from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

__all__ = ["count_inline_as_one_device"]

_lightnings = cast(property, _AcceleratorConnector.is_distributed)


def count_inline_as_one_device() -> None:
    """Let ``is_distributed`` be False for an inline strategy; idempotent."""
    _AcceleratorConnector.is_distributed = property(_is_distributed)  # type: ignore[assignment, method-assign]


def _is_distributed(connector: _AcceleratorConnector) -> bool:
    options = getattr(connector.strategy, "process_options", None)
    if options is not None and getattr(options, "launch", None) == "inline":
        return False
    assert _lightnings.fget is not None
    return bool(_lightnings.fget(connector))
