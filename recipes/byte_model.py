"""What every language model on bytes shares here: how work is counted, the optimizer with its schedule, and how a text is continued."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lightning_diloco.errors import ConfigurationError

__all__ = ["ByteLanguageModel", "warmup_cosine"]


def warmup_cosine(step: int, *, warmup_steps: int, max_steps: int, floor: float) -> float:
    """The share of the peak learning rate that inner step `step` (from 0) uses.

    Linear from ``1 / warmup_steps`` to 1, then half a cosine down to `floor` at `max_steps`, then `floor`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


class ByteLanguageModel(LightningModule):
    """A module whose forward gives logits (B, t, 256) for int64 bytes (B, t).

    Its hyperparameters are ``learning_rate``, ``weight_decay``, ``betas``, ``warmup_steps`` and ``final_lr_share``.
    """

    @property
    def context(self) -> int:
        """The most bytes that the model sees at once."""
        raise NotImplementedError

    def diloco_tokens(self, batch: Tensor) -> int:
        """How many bytes a batch of windows (B, T + 1) predicts; the strategy counts work in them."""
        return len(batch) * (batch.shape[1] - 1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with decay on matrices only, and a schedule over `Trainer.max_steps`.

        Raises:
            ConfigurationError: the trainer has no max_steps, so that the schedule has no end.
        """
        max_steps = self.trainer.max_steps
        if max_steps < 1:
            raise ConfigurationError(
                f"trainer.max_steps={max_steps}: the learning rate's schedule needs an end; give a number of inner steps."
            )
        hp = self.hparams
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": hp["weight_decay"]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=hp["learning_rate"], betas=tuple(hp["betas"]), fused=True)

        def share(step: int) -> float:
            return warmup_cosine(step, warmup_steps=hp["warmup_steps"], max_steps=max_steps, floor=hp["final_lr_share"])

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def generate(self, prompt: bytes, num_bytes: int, *, temperature: float = 0.8, seed: int = 0) -> bytes:
        """Continue a text, byte after byte.

        Args:
            prompt: at least one byte; the last `context` of them are seen.
            num_bytes: how many to add.
            temperature: divides the logits; below 1 the likely becomes likelier.
            seed: of the draw; the same weights and seed give the same text.

        Returns:
            The prompt and what was added.

        Raises:
            ConfigurationError: the prompt is empty.
        """
        if not prompt:
            raise ConfigurationError("prompt=b'': at least one byte is needed to continue from; for example b'def '.")
        was_training = self.training
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        text = list(prompt)
        for _ in range(num_bytes):
            window = torch.tensor([text[-self.context :]], device=self.device)
            chances = torch.softmax(self(window)[0, -1].float().cpu() / temperature, dim=-1)
            text.append(int(torch.multinomial(chances, 1, generator=generator)))
        self.train(was_training)
        return bytes(text)
