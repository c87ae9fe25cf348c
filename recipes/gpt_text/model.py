"""A byte-level GPT as an ordinary LightningModule: nothing in it knows of learners, fragments or syncers.

The network is a decoder of pre-norm blocks: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with rotary positions (they need no
parameters), no dropout (less than one pass over the text is made) and an output head of its own. The loss is the mean of
``-ln p(byte | the bytes before it in the window)`` over all predicted bytes: nats per byte.

Shape letters: B windows, T bytes of context, C channels, H heads, V = 256 byte values.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from lightning_diloco.config import need_int
from lightning_diloco.errors import ConfigurationError
from recipes.byte_model import ByteLanguageModel

__all__ = ["GPT", "GPTText"]

NUM_BYTES = 256


class GPT(nn.Module):
    """The network: bytes in, one distribution over the next byte out for each of them.

    Args:
        num_layers: blocks.
        num_heads: attention heads in a block; they divide `channels`, and the quotient is even (rotary positions turn pairs).
        channels: width C of the residual stream.
        context: T, the most bytes that the network sees at once.

    Raises:
        ConfigurationError: the heads do not divide the channels into even parts.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, num_layers: int, num_heads: int, channels: int, context: int) -> None:
        super().__init__()
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "channels": channels, "context": context}
        for name, size in sizes.items():
            need_int(f"model.{name}", size, 1)
        if channels % (2 * num_heads):
            raise ConfigurationError(
                f"model.channels={channels}, model.num_heads={num_heads}: channels must be a multiple of twice the heads; "
                f"for example channels={2 * num_heads * max(1, channels // (2 * num_heads))}."
            )
        self.context = context
        self.embedding = nn.Embedding(NUM_BYTES, channels)
        self.blocks = nn.ModuleList(Block(channels, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(channels)
        self.lm_head = nn.Linear(channels, NUM_BYTES, bias=False)
        cos, sin = rotary_table(context, channels // num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialize(num_layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the byte after each one.

        Args:
            tokens: (B, t) int64, t at most `context`.

        Returns:
            Logits (B, t, V); row i depends on ``tokens[:, : i + 1]`` alone.
        """
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embedding(tokens)  # (B, t, C)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits

    def _initialize(self, num_layers: int) -> None:
        """Normal(0, 0.02); what is added to the residual stream is scaled down by the number of additions."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            is_residual = name.endswith(("project.weight", "contract.weight"))
            std = 0.02 / math.sqrt(2 * num_layers) if is_residual else 0.02
            nn.init.normal_(parameter, std=std)


class Block(nn.Module):
    """Attention, then a four times wider MLP, each added to the stream."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.project = nn.Linear(channels, channels, bias=False)
        self.norm_mlp = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 4 * channels, bias=False)
        self.contract = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One block; (B, T, C) in and out."""
        x = x + self._attend(self.norm_attention(x), cos, sin)
        mlp: Tensor = self.contract(F.gelu(self.expand(self.norm_mlp(x)), approximate="tanh"))
        return x + mlp

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, channels = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C / H)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.project(mixed.transpose(1, 2).reshape(batch, length, channels))
        return projected


def rotary_table(context: int, head_channels: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each (T, head_channels / 2), float32.

    References:
        Su et al., arXiv 2104.09864, equation 15; base 10,000.
    """
    frequency = 10_000.0 ** (-torch.arange(0, head_channels, 2) / head_channels)
    angle = torch.outer(torch.arange(context), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pair (i, i + half) of each head by its position's angle; x is (B, H, T, head_channels)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class GPTText(ByteLanguageModel):
    """`GPT` with its loss, its metrics and its optimizer.

    It logs ``train_loss`` and ``val_loss`` in nats per byte, and ``val_perplexity`` per byte.

    Args:
        num_layers: see `GPT`.
        num_heads: see `GPT`.
        channels: see `GPT`.
        context: see `GPT`.
        learning_rate: peak of the inner learning rate.
        weight_decay: of the matrices; norms' gains and biases have none.
        betas: AdamW's decay rates of the two moments.
        warmup_steps: inner steps of linear warm-up.
        final_lr_share: learning rate at `Trainer.max_steps`, as a share of the peak.

    Raises:
        ConfigurationError: see `GPT`.
    """

    def __init__(
        self,
        *,
        num_layers: int = 4,
        num_heads: int = 4,
        channels: int = 128,
        context: int = 64,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 100,
        final_lr_share: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.gpt = GPT(num_layers, num_heads, channels, context)
        self.val_perplexity = Perplexity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, t, V) for int64 tokens (B, t)."""
        logits: Tensor = self.gpt(tokens)
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss of a batch of windows (B, T + 1), uint8."""
        loss, _, _ = self._predict(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log loss and perplexity of a batch of windows (B, T + 1), uint8."""
        loss, logits, targets = self._predict(batch)
        self.val_perplexity.update(logits, targets)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("val_perplexity", self.val_perplexity, batch_size=len(batch))

    @property
    def context(self) -> int:
        """The most bytes that the model sees at once."""
        return self.gpt.context

    def _predict(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss, logits (B, T, V) and targets (B, T) of windows (B, T + 1)."""
        tokens = batch.long()
        targets = tokens[:, 1:]
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits, targets
