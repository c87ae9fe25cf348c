"""ResNet of transformers as a LightningModule. Its running statistics are each learner's own; the caller gets learner 0's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from transformers import ResNetConfig, ResNetForImageClassification

__all__ = ["DigitsNet"]

NUM_DIGITS = 10


class DigitsNet(LightningModule):
    """A residual network for images of one channel.

    It logs ``train_loss``, ``val_loss`` (nats per image) and ``val_accuracy``.

    Args:
        hidden_sizes: channels of each stage.
        depths: residual blocks of each stage.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
    """

    def __init__(self, *, hidden_sizes: list[int], depths: list[int], learning_rate: float = 3e-3, weight_decay: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        config = ResNetConfig(
            num_channels=1,
            embedding_size=hidden_sizes[0],
            hidden_sizes=list(hidden_sizes),
            depths=list(depths),
            layer_type="basic",
            num_labels=NUM_DIGITS,
        )
        self.network = ResNetForImageClassification(config)
        self.val_accuracy = MulticlassAccuracy(NUM_DIGITS, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 8, 8)."""
        logits: Tensor = self.network(pixel_values=images).logits
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Cross-entropy and accuracy."""
        logits = self(batch[0])
        self.val_accuracy.update(logits, batch[1])
        self.log("val_loss", F.cross_entropy(logits, batch[1]), prog_bar=True, batch_size=len(batch[1]))
        self.log("val_accuracy", self.val_accuracy, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without a schedule."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], weight_decay=self.hparams["weight_decay"])
