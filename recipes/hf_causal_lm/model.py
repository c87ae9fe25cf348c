"""A LightningModule around any causal language model of transformers; the vocabulary is the 256 byte values.

The network is made from a configuration, with random weights: nothing is downloaded. With `lora` its parameters are frozen and
low-rank adapters (peft) are trained; only those travel, the frozen ones are sent once at the join.

A mixture of experts (``output_router_logits: true`` in the configuration) adds its load-balancing loss in training; ``val_loss`` is the
loss of the text alone, so that it compares with other models.
"""

from __future__ import annotations

import os
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_diloco.errors import ConfigurationError
from recipes.byte_model import ByteLanguageModel

__all__ = ["HFCausalLM"]

NUM_BYTES = 256


class HFCausalLM(ByteLanguageModel):
    """A causal language model on bytes, with its loss and optimizer.

    It logs ``train_loss`` and ``val_loss`` in nats per byte, and ``balance_loss`` for a mixture of experts.

    Args:
        architecture: a model type of transformers ("llama", "gpt2", "mixtral", ...).
        config: fields of that type's configuration, beside the vocabulary.
        learning_rate: peak of the inner learning rate.
        weight_decay: of the matrices; norms' gains and biases have none.
        betas: AdamW's decay rates of the two moments.
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
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 50,
        final_lr_share: float = 0.1,
        lora: dict[str, Any] | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network: Any = None
        self._made = _configuration(architecture, config)
        self._lora = None if lora is None else _adapters(lora)
        # Absolute, because a learner's working directory may be another one.
        self._weights = None if weights is None else os.path.abspath(weights)
        if self._weights is not None and not os.path.isfile(self._weights):
            raise ConfigurationError(f"model.weights={weights!r}: there is no such file; give an earlier run's RUN_DIR/global.safetensors.")

    def configure_model(self) -> None:
        """Make the network, in each process anew: transformers' router hooks do not survive being pickled, and the balance would be 0."""
        if self.network is not None:
            return
        self.network = AutoModelForCausalLM.from_config(self._made)
        if self._weights is not None:
            self._load(self._weights)
        if self._lora is not None:
            from peft import get_peft_model

            self.network = get_peft_model(self.network, self._lora)

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

    @property
    def context(self) -> int:
        """The most bytes that the model sees at once."""
        return int(self._made.max_position_embeddings)

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


def _configuration(architecture: str, config: dict[str, Any]) -> Any:
    try:
        known = AutoConfig.for_model(architecture).to_dict()
        # The end of a text is no byte.
        made = AutoConfig.for_model(architecture, vocab_size=NUM_BYTES, bos_token_id=None, eos_token_id=None, **config)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"model.architecture={architecture!r}: {' '.join(str(error).split())[:200]}") from error
    if unknown := sorted(set(config) - set(known)):
        raise ConfigurationError(f"model.config.{unknown[0]}: a {architecture} has no such field; it has {', '.join(sorted(known))[:600]}.")
    return made


def _adapters(lora: dict[str, Any]) -> Any:
    from peft import LoraConfig

    try:
        return LoraConfig(task_type="CAUSAL_LM", **lora)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"model.lora: {' '.join(str(error).split())[:200]}; its fields are those of peft.LoraConfig.") from error
