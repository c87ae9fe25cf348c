"""`LineProgress`: progress as lines, for logs, pipes and terminals that cannot redraw."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

__all__ = ["LineProgress"]


class LineProgress(ProgressBar):
    """Prints a line every few seconds: step, loss, and what was exchanged; the first one early, the last one at the end.

    With a strategy other than ``decoupled_diloco`` the exchange is left out.

    Args:
        period_s: seconds between two lines.
    """

    def __init__(self, period_s: float = 10.0) -> None:
        super().__init__()
        self._period_s = period_s
        self._is_enabled = True
        self._due_s = 0.0
        self._last: tuple[float, int] | None = None
        self._loss: float | None = None
        self._printed_step = -1

    def disable(self) -> None:
        """Print nothing; Lightning calls it in every learner but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Print lines."""
        self._is_enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the first line come early: it says that training goes on, and how fast."""
        now_s = time.monotonic()
        self._due_s = now_s + min(2.0, self._period_s)
        self._last = (now_s, self._tokens(trainer))
        self._printed_step = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Print a line if one is due."""
        if not self._is_enabled:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1 and time.monotonic() >= self._due_s:
            self._loss = float(loss.detach())
        if time.monotonic() >= self._due_s:
            self._print(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the last line."""
        if self._is_enabled and trainer.global_step != self._printed_step:
            loss = trainer.callback_metrics.get("train_loss", trainer.callback_metrics.get("loss"))
            if isinstance(loss, Tensor) and loss.numel() == 1 and torch.is_floating_point(loss):
                self._loss = float(loss)
            self._print(trainer)

    def _print(self, trainer: pl.Trainer) -> None:
        now_s = time.monotonic()
        self._due_s = now_s + self._period_s
        self._printed_step = trainer.global_step
        parts = [f"step {trainer.global_step}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        figures = getattr(trainer.strategy, "figures", None)
        if figures is not None:
            parts.append(f"merges {figures.merges}")
            if figures.participation is not None:
                parts.append(f"participation {figures.participation:.2f}")
            parts.append(f"staleness {figures.staleness_versions:.2f}")
            tokens = self._tokens(trainer)
            if self._last is not None and now_s > self._last[0] and tokens > self._last[1]:
                parts.append(f"{(tokens - self._last[1]) / (now_s - self._last[0]):,.0f} tokens/s")
            self._last = (now_s, tokens)
        sys.stdout.write("  ".join(parts) + "\n")
        sys.stdout.flush()

    @staticmethod
    def _tokens(trainer: pl.Trainer) -> int:
        figures = getattr(trainer.strategy, "figures", None)
        return 0 if figures is None else int(figures.tokens)
