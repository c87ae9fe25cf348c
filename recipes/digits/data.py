"""scikit-learn's digits: 1,797 images of 8 x 8 pixels, shipped with the package."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_diloco.config import need_int
from lightning_diloco.errors import ConfigurationError

__all__ = ["DigitsData"]


class DigitsData(LightningDataModule):
    """Images (B, 1, 8, 8), float32 of mean 0, and digits (B,), int64; a fixed part is held out.

    Args:
        batch_size: images in a training batch of one learner.
        val_share: the part that is held out, between 0 and 1.
        seed: of the split; the same on all learners.

    Raises:
        ConfigurationError: the share leaves one part empty.
    """

    def __init__(self, *, batch_size: int = 32, val_share: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        if not 0.0 < val_share < 1.0:
            raise ConfigurationError(f"data.val_share={val_share}: must lie between 0 and 1; for example 0.2.")
        need_int("data.batch_size", batch_size, 2)
        self.batch_size = batch_size
        self.val_share = val_share
        self.seed = seed
        self._parts: tuple[TensorDataset, TensorDataset] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Load and split, once in a process."""
        if self._parts is not None:
            return
        loaded = load_digits()
        images = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
        digits = torch.tensor(loaded.target, dtype=torch.int64)
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(self.seed))
        cut = max(1, int(self.val_share * len(digits)))
        self._parts = (TensorDataset(images[order[cut:]], digits[order[cut:]]), TensorDataset(images[order[:cut]], digits[order[:cut]]))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled; BatchNorm needs more than one image, so a last, smaller batch is left out."""
        return DataLoader(self._split()[0], batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All that is held out, in order."""
        return DataLoader(self._split()[1], batch_size=256)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """All held-out images and their digits."""
        images, digits = self._split()[1].tensors
        return images, digits

    def _split(self) -> tuple[TensorDataset, TensorDataset]:
        self.setup()
        assert self._parts is not None
        return self._parts
