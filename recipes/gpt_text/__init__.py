"""`gpt_text`: a byte-level GPT on Python's own standard library, or on the user's text (``data.path=FILE_OR_FOLDER``)."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from recipes.gpt_text.data import TextData
from recipes.gpt_text.model import GPTText
from recipes.values import call

__all__ = ["build", "show"]


def build(cfg: DictConfig) -> tuple[GPTText, TextData]:
    """The untrained module and its data.

    Args:
        cfg: with the groups `model` and `data`.

    Raises:
        ConfigurationError: a value is wrong, or `data.path` names no text.
    """
    return call("model", GPTText, cfg.model), call("data", TextData, cfg.data)


def show(module: LightningModule, cfg: DictConfig) -> str:
    """A text that the module wrote, headed by what it was asked to continue."""
    assert isinstance(module, GPTText)
    sample = module.generate(cfg.sample.prompt.encode(), cfg.sample.num_bytes)
    return f"{cfg.sample.num_bytes} bytes after {cfg.sample.prompt!r}:\n\n{sample.decode('utf-8', 'replace')}"
