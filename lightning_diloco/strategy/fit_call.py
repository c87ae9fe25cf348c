"""The arguments of one ``Trainer.fit``, as the launcher gets them: a bound method and what it was called with."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["FitCall"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitCall:
    """What the user fits, with which data."""

    model: pl.LightningModule
    train_dataloaders: Any
    val_dataloaders: Any
    datamodule: pl.LightningDataModule | None

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> FitCall:
        """Read the call of Lightning's ``_fit_impl``."""
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        train, datamodule = bound.get("train_dataloaders"), bound.get("datamodule")
        if isinstance(train, pl.LightningDataModule):
            # Lightning takes a datamodule in the place of the loaders too.
            train, datamodule = None, train
        return cls(model=bound["model"], train_dataloaders=train, val_dataloaders=bound.get("val_dataloaders"), datamodule=datamodule)

    def attach(self, trainer: pl.Trainer) -> None:
        """Connect module and data to the Trainer, as Lightning does at the start of a fit."""
        trainer._data_connector.attach_data(
            self.model, train_dataloaders=self.train_dataloaders, val_dataloaders=self.val_dataloaders, datamodule=self.datamodule
        )

    def give_back(self, trainer: pl.Trainer) -> None:
        """Let module and data belong to this Trainer again, after another one; its loaders stay as they are."""
        self.model.trainer = trainer
        if self.datamodule is not None:
            self.datamodule.trainer = trainer

    def with_loaders_of(self, trainer: pl.Trainer) -> FitCall:
        """This call with the validation loaders that the fit has made: the module's hook for them is not called once more.

        A datamodule is asked again, because Lightning takes loaders or a datamodule, and its other hooks are needed.
        """
        if self.datamodule is not None or trainer.val_dataloaders is None:
            return self
        return dataclasses.replace(self, val_dataloaders=trainer.val_dataloaders)

    def has_validation(self, trainer: pl.Trainer) -> bool:
        """Whether the fit has a validation loop."""
        source: Any = self.datamodule if self.datamodule is not None else self.model
        has_data = (
            self.val_dataloaders is not None or is_overridden("val_dataloader", source) or is_overridden("val_dataloader", self.model)
        )
        return has_data and is_overridden("validation_step", self.model) and trainer.limit_val_batches > 0
