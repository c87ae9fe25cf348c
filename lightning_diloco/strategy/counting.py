"""How many tokens a batch has: the unit in which work is weighed, accounted and reported.

The order, most explicit first: the strategy's ``token_counter`` option; a method ``diloco_tokens(batch)`` of the module; well-known
keys of a language-model batch (the sum of ``attention_mask``, or the elements of ``input_ids``); the batch size, so a token is a sample;
1, so a token is a batch. What counts is that learners of one job count alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_diloco.errors import ConfigurationError

__all__ = ["count_tokens"]


def count_tokens(batch: Any, module: object, token_counter: Callable[[Any], int] | None = None) -> int:
    """Tokens of one batch.

    Args:
        batch: what the DataLoader gave; None (a ``dataloader_iter`` step) counts as 1.
        module: the LightningModule; its method ``diloco_tokens(batch)`` is used if there is one.
        token_counter: the user's function, which has the first word.

    Returns:
        A whole number, at least 0.

    Raises:
        ConfigurationError: the user's function or method returned something else.
    """
    if token_counter is not None:
        return _checked(token_counter(batch), "token_counter")
    method = getattr(module, "diloco_tokens", None)
    if callable(method):
        return _checked(method(batch), "diloco_tokens")
    if isinstance(batch, Mapping):
        mask, ids = batch.get("attention_mask"), batch.get("input_ids")
        if isinstance(mask, Tensor):
            return int(mask.sum())
        if isinstance(ids, Tensor):
            return ids.numel()
    return _batch_size(batch)


def _checked(value: Any, source: str) -> int:
    if isinstance(value, Tensor) and value.numel() == 1 and not torch.is_floating_point(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(f"{source} returned {value!r}: it must return the tokens of a batch as a whole number of at least 0.")
    return value


def _batch_size(batch: Any) -> int:
    if batch is None:
        return 1
    try:
        with warnings.catch_warnings():
            # Lightning warns when the tensors of a batch disagree; for weighing work the first one is good enough.
            warnings.simplefilter("ignore")
            return max(1, int(extract_batch_size(batch)))
    except (MisconfigurationException, RecursionError):
        return 1
