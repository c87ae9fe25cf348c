"""Things of Lightning that a user brings along, each as one small fit: what `docs/lightning.md` lists and `test_parity.py` runs.

A case makes its parts afresh at every call, so the same case can be run with a plain Trainer and with ours, and both can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tests.strategy.kit import TinyModel, loader


@dataclass(kw_only=True)
class Case:
    """One fit: `model` and `data` are made afresh, `options` are the Trainer's."""

    model: Callable[[], pl.LightningModule] = TinyModel
    data: Callable[[], Any] = loader
    val: Callable[[], Any] | None = None
    options: Callable[[], dict[str, Any]] = field(default=lambda: {"max_epochs": 2})
    steps_per_batch: float = 1.0
    """Inner steps that a batch is worth."""
    own_weights: bool = False
    """A callback puts weights of its own into the module at the end, and `fit` returns those."""


class Regression(TinyModel):
    """The tiny model with any optimizer and scheduler."""

    def __init__(self, make_optimizer: Callable[[Any], Any], wrap: Callable[[nn.Module], nn.Module] = lambda net: net) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.layer = wrap(self.layer)

    def configure_optimizers(self):
        return self.make_optimizer(self)


class Gan(pl.LightningModule):
    """Two players and manual optimization; `raw`: with torch's own optimizers."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw
        self.player = nn.Linear(8, 8)
        self.judge = nn.Linear(8, 1)
        self.changes_inside = 0

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers(use_pl_optimizer=not self.raw)
        x = batch[0]
        loss = self.judge(self.player(x)).pow(2).mean()
        first.zero_grad()
        self.manual_backward(loss) if not self.raw else loss.backward()
        first.step()
        after = self.player.weight.detach().clone()
        loss = (self.judge(self.player(x).detach()) - 1).pow(2).mean()
        second.zero_grad()
        self.manual_backward(loss) if not self.raw else loss.backward()
        second.step()
        self.changes_inside += not torch.equal(after, self.player.weight)

    def configure_optimizers(self):
        return torch.optim.SGD(self.player.parameters(), lr=0.05), torch.optim.Adam(self.judge.parameters(), lr=0.01)


class Tied(pl.LightningModule):
    """One weight under two names, an embedding, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def training_step(self, batch, batch_idx):
        tokens = (batch[0].abs() * 4).long().clamp(max=15)
        logits = self.head(torch.tanh(self.frozen(self.embed(tokens))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.01)


class Normed(TinyModel):
    """Batch norm: buffers that change in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))


class Lazy(TinyModel):
    """Parameters that exist after the first batch was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(4)

    def setup(self, stage):
        self(torch.zeros(1, 8))


class Backbone(TinyModel):
    """What BackboneFinetuning wants: a `backbone` that is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(8, 8)

    def forward(self, x):
        return super().forward(torch.tanh(self.backbone(x)))

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05)


class Pair(TinyModel):
    """Steps on two batches at once, as CombinedLoader gives them."""

    def training_step(self, batch, batch_idx):
        first, second = (part for part in (batch if isinstance(batch, list | tuple) else batch.values()))
        parts = [p[0] for p in (first, second) if p is not None]
        return sum(self(part).pow(2).mean() for part in parts)


class Skipping(TinyModel):
    """No loss every third batch."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)


class Stream(IterableDataset):
    """A stream of known order; two workers read it in turns."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for i in range(first, 64, stride):
            yield (torch.randn(8, generator=torch.Generator().manual_seed(i)),)


def stream(num_workers: int = 0) -> DataLoader:
    return DataLoader(Stream(), batch_size=4, num_workers=num_workers)


def sgd(module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05)


def with_plateau(module):
    optimizer = sgd(module)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def with_one_cycle(module):
    optimizer = sgd(module)
    steps = int(module.trainer.estimated_stepping_batches)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def with_lbfgs(module):
    return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)


def opts(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"max_epochs": 2, **{k: v() if callable(v) else v for k, v in options.items()}}


CASES: dict[str, Case] = {
    "accumulate_grad_batches": Case(options=opts(accumulate_grad_batches=3)),
    "GradientAccumulationScheduler": Case(options=opts(callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 4})])),
    "gradient clipping by norm": Case(options=opts(gradient_clip_val=0.01)),
    "gradient clipping by value": Case(options=opts(gradient_clip_val=0.001, gradient_clip_algorithm="value")),
    "training_step that returns None": Case(model=Skipping),
    "LBFGS": Case(model=lambda: Regression(with_lbfgs)),
    "manual optimization, two optimizers": Case(model=Gan),
    "manual optimization, raw optimizers": Case(model=lambda: Gan(raw=True), options=lambda: {"max_epochs": 2}),
    "ReduceLROnPlateau": Case(model=lambda: Regression(with_plateau), val=lambda: loader(16)),
    "OneCycleLR with estimated_stepping_batches": Case(model=lambda: Regression(with_one_cycle)),
    "LearningRateMonitor and CSVLogger": Case(
        model=lambda: Regression(with_one_cycle),
        options=lambda: {"max_epochs": 2, "logger": CSVLogger("csv"), "callbacks": [LearningRateMonitor()]},
    ),
    "DeviceStatsMonitor": Case(
        options=opts(logger=lambda: CSVLogger("csv"), log_every_n_steps=2, callbacks=lambda: [DeviceStatsMonitor(cpu_stats=True)])
    ),
    "ThroughputMonitor": Case(
        options=opts(
            logger=lambda: CSVLogger("csv"), log_every_n_steps=2, callbacks=lambda: [ThroughputMonitor(lambda batch: len(batch[0]))]
        )
    ),
    "EarlyStopping": Case(
        val=lambda: loader(16), options=opts(max_epochs=6, callbacks=lambda: [EarlyStopping("val_loss", min_delta=9.0, patience=1)])
    ),
    "Timer": Case(options=opts(callbacks=lambda: [Timer(duration="00:01:00:00")])),
    "ModelCheckpoint, top k and every n steps": Case(
        val=lambda: loader(16),
        options=lambda: {
            "max_epochs": 3,
            "enable_checkpointing": True,
            "callbacks": [
                ModelCheckpoint("best", monitor="val_loss", save_top_k=2, save_last=True),
                ModelCheckpoint("steps", every_n_train_steps=5),
            ],
        },
    ),
    "bf16-mixed": Case(options=opts(precision="bf16-mixed")),
    "64-true": Case(options=opts(precision="64-true")),
    "bf16-true": Case(options=opts(precision="bf16-true")),
    "tied, frozen and embedding parameters": Case(model=Tied),
    "BatchNorm": Case(model=Normed),
    "LazyLinear, made in setup": Case(model=Lazy),
    "torch.compile of a part": Case(model=lambda: Regression(sgd, wrap=lambda net: torch.compile(net, backend="eager"))),
    "EMAWeightAveraging": Case(options=opts(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]), own_weights=True),
    "StochasticWeightAveraging": Case(
        options=opts(max_epochs=4, callbacks=lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]),
        own_weights=True,
    ),
    "BackboneFinetuning": Case(
        model=Backbone, options=opts(max_epochs=3, callbacks=lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)])
    ),
    "ModelPruning": Case(
        options=opts(max_epochs=3, callbacks=lambda: [ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.25)]),
        own_weights=True,
    ),
    "IterableDataset": Case(data=stream),
    "IterableDataset with two workers": Case(data=lambda: stream(2)),
    "CombinedLoader, max_size_cycle": Case(
        model=Pair, data=lambda: CombinedLoader({"a": loader(32), "b": stream()}, "max_size_cycle"), options=opts(max_epochs=1)
    ),
    "CombinedLoader, min_size": Case(model=Pair, data=lambda: CombinedLoader([loader(32), loader(64, seed=1)], "min_size")),
    "limit_train_batches, whole number": Case(options=opts(limit_train_batches=5)),
    "limit_train_batches, share": Case(options=opts(limit_train_batches=0.5)),
    "overfit_batches": Case(options=opts(overfit_batches=2, max_epochs=4)),
    "several workers": Case(data=lambda: loader(num_workers=2)),
    "validation inside the epoch": Case(val=lambda: loader(8), options=opts(val_check_interval=0.25)),
    "profiler": Case(options=opts(profiler="simple")),
    "detect_anomaly": Case(options=opts(detect_anomaly=True)),
}
