"""A LightningModule around any causal language model of transformers; the vocabulary is the 256 byte values.

The network is made from a configuration, with random weights: nothing is downloaded. With `lora` its parameters are frozen and
low-rank adapters (peft) are trained; only those travel, the frozen ones are sent once at the join.

A mixture of experts (``output_router_logits: true`` in the configuration) adds its load-balancing loss in training; ``val_loss`` is the
loss of the text alone, so that it compares with other models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_diloco.errors import ConfigurationError
from recipes.gpt_text.model import warmup_cosine

__all__ = ["HFCausalLM"]

NUM_BYTES = 256


class HFCausalLM(LightningModule):
    """A causal language model on bytes, with its loss and optimizer.

    It logs ``train_loss`` and ``val_loss`` in nats per byte, and ``balance_loss`` for a mixture of experts.

    Args:
        architecture: a model type of transformers ("llama", "gpt2", "mixtral", ...).
        config: fields of that type's configuration, beside the vocabulary.
        learning_rate: peak of the inner learning rate.
        weight_decay: of the matrices.
        warmup_steps: inner steps of linear warm-up.
        final_lr_share: learning rate at `Trainer.max_steps`, as a share of the peak.
        lora: fields of ``peft.LoraConfig``; None: all parameters are trained.
        weights: ``global.safetensors`` of an earlier run of the same configuration, to begin with; None: random weights.

    Raises:
        ConfigurationError: there is no such architecture, or `weights` do not fit.
    """

    def __init__(
        self,
        *,
        architecture: str,
        config: dict[str, Any],
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 50,
        final_lr_share: float = 0.1,
        lora: dict[str, Any] | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network: Any = None
        try:
            # The end of a text is no byte.
            self._made = AutoConfig.for_model(architecture, vocab_size=NUM_BYTES, bos_token_id=None, eos_token_id=None, **config)
        except ValueError as error:
            raise ConfigurationError(f"model.architecture={architecture!r}: {str(error)[:300]}") from error
        if weights is not None and not Path(weights).is_file():
            raise ConfigurationError(
                f"model.weights={weights!r}: there is no such file; give RUN_DIR/global.safetensors of an earlier run."
            )

    def configure_model(self) -> None:
        """Make the network, in each process anew: transformers' router hooks do not survive being pickled, and the balance would be 0."""
        if self.network is not None:
            return
        self.network = AutoModelForCausalLM.from_config(self._made)
        hp = self.hparams
        if hp["weights"] is not None:
            self._load(hp["weights"])
        if hp["lora"] is not None:
            from peft import LoraConfig, get_peft_model

            self.network = get_peft_model(self.network, LoraConfig(task_type="CAUSAL_LM", **hp["lora"]))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, t, 256) for int64 tokens (B, t)."""
        logits: Tensor = self.network(input_ids=tokens).logits
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss of a batch of windows (B, T + 1), uint8, with the load-balancing loss if there is one."""
        loss, balance = self._predict(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch))
        if balance is None:
            return loss
        self.log("balance_loss", balance, batch_size=len(batch))
        total: Tensor = loss + self._made.router_aux_loss_coef * balance
        return total

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss of a batch of windows (B, T + 1), uint8."""
        loss, _ = self._predict(batch)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch))

    def diloco_tokens(self, batch: Tensor) -> int:
        """How many bytes a batch of windows (B, T + 1) predicts; the strategy counts work in them."""
        return len(batch) * (batch.shape[1] - 1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with decay on matrices only, and a schedule over `Trainer.max_steps`."""
        hp, max_steps = self.hparams, self.trainer.max_steps
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": hp["weight_decay"]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=hp["learning_rate"], betas=(0.9, 0.95))

        def share(step: int) -> float:
            return warmup_cosine(step, warmup_steps=hp["warmup_steps"], max_steps=max_steps, floor=hp["final_lr_share"])

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def generate(self, prompt: bytes, num_bytes: int, *, temperature: float = 0.8, seed: int = 0) -> bytes:
        """Continue a text, byte after byte, without a cache; the same weights and seed give the same text."""
        was_training = self.training
        self.eval()
        generator, text = torch.Generator().manual_seed(seed), list(prompt)
        for _ in range(num_bytes):
            window = torch.tensor([text[-self._made.max_position_embeddings :]], device=self.device)
            chances = torch.softmax(self(window)[0, -1].float().cpu() / temperature, dim=-1)
            text.append(int(torch.multinomial(chances, 1, generator=generator)))
        self.train(was_training)
        return bytes(text)

    def _predict(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = batch.long()
        out = self.network(input_ids=tokens[:, :-1], use_cache=False)
        loss = F.cross_entropy(out.logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return loss, out.aux_loss if self._has_router else None

    @property
    def _has_router(self) -> bool:
        return bool(getattr(self._made, "output_router_logits", False))

    def _load(self, weights: str) -> None:
        state = {name.removeprefix("network."): value for name, value in load_file(weights).items()}
        try:
            self.network.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise ConfigurationError(f"model.weights={weights!r} do not fit this configuration: {str(error)[:300]}") from error
        if not state.keys() & self.network.state_dict().keys():
            raise ConfigurationError(f"model.weights={weights!r} has no parameter of this model; give those of a run of the same recipe.")
