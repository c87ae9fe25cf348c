"""A learner gives a sign of life with each batch, of any stage (`runtime.life_signs`); the supervisor looks for them (`hang_watch`).

It is a layer of its own under `OutOfMemoryGuard`, because Lightning brings every batch to its device through the strategy. A step that
fetches its batches itself (``dataloader_iter``) is seen when it begins.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_diloco.runtime.life_signs import give_sign
from lightning_diloco.strategy.no_collectives import NoCollectives

__all__ = ["Signing"]


class Signing(NoCollectives):
    """Gives signs of life."""

    @override
    def batch_to_device(self, *args: Any, **kwargs: Any) -> Any:
        give_sign()
        return super().batch_to_device(*args, **kwargs)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        give_sign()
        return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        give_sign()
        return super().validation_step(*args, **kwargs)
