"""How large a micro-batch may be before the memory of an accelerator is full, found by real forward and backward passes.

Sizes double from the user's own until one does not fit; then the half of the rest is tried. An optimizer that has not stepped yet gets a
place of the size of AdamW's moments kept free for it, and a tenth of what fits is left to what a longer run needs. The probe leaves
no trace: parameters are only read, gradients are dropped, running statistics, metrics and random generators are put back, and nothing
that the module logs in it is kept. Samples are the first of the data set, put together by the loader's own function.

What the probe cannot do: streams (a sample that was read is gone) and manual optimization (a training step would step the optimizers).
There the size only grows while nothing fails, and falls when something does.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.data import has_iterable_dataset
from torch import Tensor
from torchmetrics import Metric

__all__ = ["OutOfMemory", "free_memory", "is_out_of_memory", "largest_that_fits", "make_batch", "probe_step"]

OutOfMemory = torch.OutOfMemoryError
KEPT_FREE = 0.9
MAX_SIZE = 1 << 20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full: torch's own, and what some backends raise instead."""
    if isinstance(error, OutOfMemory):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return "out of memory" in text or "can't allocate memory" in text


def free_memory() -> None:
    """Give back what an attempt that failed has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_that_fits(fits: Callable[[int], bool], start: int) -> int:
    """The largest size that was seen to fit, less a tenth; at least 1.

    Args:
        fits: tries one size.
        start: to begin with, at least 1.
    """
    good, bad, size = 0, 0, start
    while not bad and size <= MAX_SIZE:
        if fits(size):
            good, size = size, 2 * size
        else:
            bad = size
    while not good and bad > 1:
        bad //= 2
        good = bad if fits(bad) else 0
    middle = (good + bad) // 2
    if good >= start and bad and middle > good and fits(middle):
        good = middle
    return max(1, int(good * KEPT_FREE) if good > start else good)


def make_batch(loader: Any, size: int) -> Any:
    """A batch of the first `size` samples of a loader's data set, repeated if there are fewer; None for a stream.

    Random generators are as they were afterwards.
    """
    if has_iterable_dataset(loader) or not len(loader.dataset):
        return None
    with _same_random():
        count = min(size, len(loader.dataset))
        samples = [loader.dataset[i] for i in range(count)]
        return loader.collate_fn([samples[i % count] for i in range(size)])


def probe_step(trainer: pl.Trainer, batch: Any) -> bool:
    """Whether a forward and a backward pass of this batch fit, with room for the optimizer's state.

    Args:
        trainer: in ``on_train_start``, with automatic optimization.
        batch: on the host.
    """
    module = trainer.lightning_module
    with _same_random(), _same_state(module), _silent(module):
        try:
            room: Any = _room_for_moments(trainer)
            moved = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            with torch.enable_grad(), trainer.precision_plugin.train_step_context():
                output = module.training_step(*_arguments(module, moved))
            loss = output["loss"] if isinstance(output, dict) else output
            if isinstance(loss, Tensor):
                torch.autograd.backward(loss)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            room = loss = output = moved = None  # noqa: F841 - what holds memory must go before the next attempt
            module.zero_grad(set_to_none=True)
            free_memory()
    return True


def _arguments(module: pl.LightningModule, batch: Any) -> tuple[Any, ...]:
    from inspect import signature

    return (batch, 0)[: max(1, len(signature(module.training_step).parameters))]


def _room_for_moments(trainer: pl.Trainer) -> list[Tensor]:
    """As much memory as two moments of every parameter whose optimizer has no state yet."""
    fresh = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"] if not o.state.get(p)]
    return [torch.empty_like(p) for p in fresh for _ in range(2)]


@contextmanager
def _same_random() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@contextmanager
def _same_state(module: pl.LightningModule) -> Iterator[None]:
    """Running statistics and metrics as they were."""
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    metrics = [(metric, metric._copy_state_dict(), metric._update_count) for metric in module.modules() if isinstance(metric, Metric)]
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        for metric, state, count in metrics:
            for key, value in state.items():
                setattr(metric, key, value)
            metric._update_count, metric._computed = count, None


@contextmanager
def _silent(module: pl.LightningModule) -> Iterator[None]:
    """What the module logs goes nowhere."""
    for name in ("log", "log_dict"):
        vars(module)[name] = _nothing
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            vars(module).pop(name, None)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
