"""Collectives of a learner: it stands alone, so each is the identity, or nothing."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from typing_extensions import override

__all__ = ["NoCollectives"]

_T = TypeVar("_T")


class NoCollectives(DDPStrategy):
    """`DDPStrategy`'s place in Lightning, without its process group."""

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Nobody to wait for."""

    @override
    def broadcast(self, obj: _T, src: int = 0) -> _T:
        return obj

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision
