"""`hf_causal_lm`, `lora_text` and `moe_text`: causal language models of Hugging Face's transformers, from a configuration, on bytes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf

from recipes.extras import require
from recipes.gpt_text.data import TextData
from recipes.values import call

__all__ = ["build", "show"]


def build(cfg: DictConfig) -> tuple[LightningModule, TextData]:
    """The untrained module and its data.

    Args:
        cfg: with the groups `model` and `data`.

    Raises:
        ConfigurationError: a package is not installed, a value is wrong, or `data.path` names no text.
    """
    require("hf_causal_lm", "transformers", *(["peft"] if cfg.model.lora else []))
    from recipes.hf_causal_lm.model import HFCausalLM

    options: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[assignment]
    return call("model", HFCausalLM, options), call("data", TextData, cfg.data)


def show(module: LightningModule, cfg: DictConfig) -> str:
    """A text that the module wrote, headed by what it was asked to continue."""
    from recipes.hf_causal_lm.model import HFCausalLM

    assert isinstance(module, HFCausalLM)
    sample = module.generate(cfg.sample.prompt.encode(), cfg.sample.num_bytes)
    return f"{cfg.sample.num_bytes} bytes after {cfg.sample.prompt!r}:\n\n{sample.decode('utf-8', 'replace')}"
