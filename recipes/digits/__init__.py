"""`digits`: a residual network with BatchNorm on scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf

from recipes.extras import require
from recipes.values import call

__all__ = ["build", "show"]


def build(cfg: DictConfig) -> tuple[LightningModule, Any]:
    """The untrained module and its data.

    Args:
        cfg: with the groups `model` and `data`.

    Raises:
        ConfigurationError: a package is not installed, or a value is wrong.
    """
    require("digits", "sklearn", "transformers")
    from recipes.digits.data import DigitsData
    from recipes.digits.model import DigitsNet

    options: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[assignment]
    return call("model", DigitsNet, options), call("data", DigitsData, cfg.data)


def show(module: LightningModule, cfg: DictConfig) -> str:
    """What the module reads in the first held-out images."""
    from recipes.digits.data import DigitsData

    data = DigitsData(**cfg.data)
    data.setup()
    images, digits = (t[:20] for t in data.held_out())
    module.eval()
    read = module(images).argmax(dim=-1)
    return f"held out: {' '.join(map(str, digits.tolist()))}\nread:     {' '.join(map(str, read.tolist()))}"
