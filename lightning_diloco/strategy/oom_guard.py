"""A training step that does not fit into memory costs its batch and not the run (``batch_sizing="auto"``).

Where an error of memory comes out of a forward or backward pass, what was accumulated for the present inner step is dropped, the batch
sizing learns of it (`BatchSizing.on_out_of_memory`), and Lightning is told that this batch has no loss, nor any other one of its window of
accumulation. The optimizer is then asked to step with no gradients, which changes nothing; the inner step is not counted (`OuterSync`),
and its samples are drawn again in smaller batches. Under manual optimization, where an optimizer may have stepped already, errors pass.

It is a layer of its own under `DecoupledDiLoCoStrategy`, because Lightning routes all three passes through the strategy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from lightning_diloco.strategy.memory_probe import free_memory, is_out_of_memory
from lightning_diloco.strategy.signing import Signing

if TYPE_CHECKING:
    from lightning_diloco.strategy.batching import BatchSizing

__all__ = ["OutOfMemoryGuard"]


class OutOfMemoryGuard(Signing):
    """Catches errors of memory in the passes of a training step."""

    batching: BatchSizing | None = None
    """That of the running fit; None: errors go where they always go."""

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.batching is not None and self.batching.has_failed:
            return None  # the rest of a window whose beginning is lost comes again with it
        done, output = self._guarded(lambda: super(OutOfMemoryGuard, self).training_step(*args, **kwargs))
        return output if done else None

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        done, loss = self._guarded(lambda: super(OutOfMemoryGuard, self).backward(closure_loss, *args, **kwargs))
        return loss if done else closure_loss.detach()

    @override
    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        batching = self.batching
        if batching is None or not batching.is_guarding:
            return super().optimizer_step(optimizer, closure, *args, **kwargs)

        def guarded() -> Any:
            """No loss for a batch without gradients: a GradScaler would ask for them."""
            loss = closure()
            return None if batching.has_failed else loss

        return super().optimizer_step(optimizer, guarded, *args, **kwargs)

    def _guarded(self, work: Callable[[], Any]) -> tuple[bool, Any]:
        batching = self.batching
        if batching is None or not batching.is_guarding:
            return True, work()
        try:
            return True, work()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not batching.may_shrink:
                raise
        # After the handler: the error holds the frames of the pass, and with them its memory.
        module = self.lightning_module
        if module is not None:
            module.zero_grad(set_to_none=True)
        free_memory()
        batching.on_out_of_memory()
        return False, None
