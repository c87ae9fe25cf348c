"""How large a learner's batches are, as the user asks for it: `batch_sizing`, `target_step_s`, `tokens_per_step`, `inner_lr_rule`.

| `batch_sizing` | size of a batch (a micro-batch where gradients are accumulated) |
|---|---|
| None | what the DataLoader says |
| ``"auto"``, ``"auto:N"`` | found while training (`strategy.size_search`); N is the ceiling on a CPU, where nothing says what fits (64) |
| ``{"NVIDIA H100": 32, "NVIDIA T4": 8}`` | by the name of the device: the longest key that the name begins with |
| ``{0: 32, 1: 8}`` | by learner |
| a function ``(device_name, learner_id) -> int`` | what it returns |

A device or learner that no key names keeps the DataLoader's size. Names: what ``torch.cuda.get_device_name`` says, and ``cpu``.

The **inner learning rate** follows the samples of an inner step by an explicit rule: with b samples in place of the b0 that loader and
``accumulate_grad_batches`` give, it is multiplied by 1 (``none``), sqrt(b / b0) (``sqrt``) or b / b0 (``linear``).

References:
    Goyal et al., arXiv 1706.02677 (linear); Krizhevsky, arXiv 1404.5997 (square root).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_diloco.config import need_int
from lightning_diloco.errors import ConfigurationError

__all__ = ["BatchOptions", "LrRule", "lr_factor"]

LrRule = Literal["none", "sqrt", "linear"]

CPU_CEILING = 64
"""Samples of a micro-batch on a CPU under ``auto``, unless said otherwise: its memory is the machine's, and more brings nothing there."""

_FORMS = "'auto', 'auto:N', a size by device name ({'NVIDIA T4': 8}), a size by learner ({0: 32}), or a function of both"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What was asked for.

    Raises:
        ConfigurationError: a value breaks a rule; the sentence names it and the remedy.
    """

    sizing: str | Mapping[Any, int] | Callable[[str, int], int] | None = None
    """`batch_sizing`."""
    target_step_s: float | None = None
    """Seconds of an inner step under ``auto``; None: the median of the job's learners."""
    tokens_per_step: int | None = None
    """Tokens of an inner step, by gradient accumulation; None: as many as there are in the loader's batches."""
    lr_rule: LrRule = "none"
    """`inner_lr_rule`."""

    def __post_init__(self) -> None:
        """Check each field, then what they say together."""
        self._check_sizing()
        if self.target_step_s is not None:
            value = self.target_step_s
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigurationError(f"target_step_s={value!r}: must be a finite number of seconds above 0.")
            if not self.is_auto:
                raise ConfigurationError(f"target_step_s={value!r} without batch_sizing='auto': nothing else goes by the time of a step.")
        if self.tokens_per_step is not None:
            need_int("tokens_per_step", self.tokens_per_step, 1)
            if self.target_step_s is not None:
                raise ConfigurationError(
                    f"tokens_per_step={self.tokens_per_step} with target_step_s={self.target_step_s!r}: of a step either the tokens "
                    "or the time is fixed. Leave out one of the two."
                )
        if self.lr_rule not in get_args(LrRule):
            raise ConfigurationError(f"inner_lr_rule={self.lr_rule!r}: must be one of 'none', 'sqrt', 'linear'.")
        if self.lr_rule != "none" and not self.is_active:
            raise ConfigurationError(
                f"inner_lr_rule={self.lr_rule!r} without batch_sizing= or tokens_per_step=: the batch is the loader's, and the rate the "
                "module's. Leave it 'none'."
            )

    @property
    def is_auto(self) -> bool:
        """Whether the size is found while training."""
        return isinstance(self.sizing, str)

    @property
    def is_active(self) -> bool:
        """Whether batches or steps are to be other than the loader makes them."""
        return self.sizing is not None or self.tokens_per_step is not None

    def cpu_ceiling(self, own: int) -> int:
        """Most samples of a micro-batch on a CPU under ``auto``, with a loader of size `own`."""
        said = self.sizing.partition(":")[2] if isinstance(self.sizing, str) else ""
        return int(said) if said else max(CPU_CEILING, own)

    def size_for(self, device_name: str, learner_id: int | None) -> int | None:
        """The size that was given for this device or learner; None: none was, the loader's holds (or ``auto`` will tell).

        Args:
            device_name: see the module's docstring.
            learner_id: None while it is not known.

        Raises:
            ConfigurationError: the user's function returned something else than a size.
        """
        if self.sizing is None or isinstance(self.sizing, str):
            return None
        if isinstance(self.sizing, Mapping):
            names = [key for key in self.sizing if isinstance(key, str) and device_name.startswith(key)]
            return self.sizing[max(names, key=len)] if names else self.sizing.get(learner_id)
        if learner_id is None:
            return None
        size = self.sizing(device_name, learner_id)
        need_int("the size that batch_sizing's function returned", size, 1)
        return size

    def _check_sizing(self) -> None:
        sizing = self.sizing
        if sizing is None or (callable(sizing) and not isinstance(sizing, Mapping)):
            return
        if isinstance(sizing, str):
            head, colon, number = sizing.partition(":")
            if head != "auto" or (colon and not (number.isdigit() and int(number))):
                raise ConfigurationError(f"batch_sizing={sizing!r}: must be {_FORMS}.")
            return
        if not isinstance(sizing, Mapping) or not sizing:
            raise ConfigurationError(f"batch_sizing={sizing!r}: must be {_FORMS}.")
        kinds = {type(key) for key in sizing}
        if kinds not in ({str}, {int}):
            raise ConfigurationError(f"batch_sizing={dict(sizing)!r}: the keys must be all device names or all learners' numbers.")
        for key, size in sizing.items():
            need_int(f"batch_sizing[{key!r}]", size, 1)
        object.__setattr__(self, "sizing", dict(sizing))


def lr_factor(rule: LrRule, samples: float, reference: float) -> float:
    """By what the inner learning rate is multiplied.

    Args:
        rule: of the job.
        samples: of an inner step now, above 0.
        reference: of an inner step as the user wrote it, above 0.
    """
    ratio = samples / reference
    return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[rule]
