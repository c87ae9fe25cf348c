"""Parameters that nobody would merge: unfrozen or added after the job had begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_diloco.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_diloco.runtime.sharded_client import AnyClient

__all__ = ["check_unfrozen"]


def check_unfrozen(client: AnyClient | None) -> None:
    """Check that all trainable parameters are merged; without a client there is no job yet.

    Raises:
        ConfigurationError: one was made trainable, or added, after the job had begun.
    """
    if client is None:
        return
    names, known = client.weights.unmerged_parameters(), {tensor.name for tensor in client.layout.static}
    if added := [name for name in names if name not in known]:
        raise ConfigurationError(
            f"{added[0]} (and {len(added) - 1} more) was added to the module after the job had begun: it is not merged, and every "
            "learner would train its own. Make all parameters before training starts (in __init__, setup or configure_model)."
        )
    if names:
        raise ConfigurationError(
            f"{names[0]} (and {len(names) - 1} more) became trainable after the job had begun, but what is frozen at its beginning is "
            "not merged, and every learner would train its own. Pass DecoupledDiLoCoStrategy(include_frozen=True)."
        )
