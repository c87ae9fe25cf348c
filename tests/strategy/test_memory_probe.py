"""The probe of an accelerator's memory, on a module that holds so many samples: what it finds, and that it leaves no trace."""

from __future__ import annotations

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_diloco.strategy.memory_probe import is_out_of_memory, largest_that_fits, make_batch, probe_step
from tests.strategy.kit import quiet
from tests.strategy.test_live_sizes import Stream


class Holds(pl.LightningModule):
    """Fails above so many samples, in the forward or in the backward pass; has running statistics and a metric, and logs."""

    def __init__(self, holds: int, fails_in: str = "forward") -> None:
        super().__init__()
        self.holds, self.fails_in = holds, fails_in
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.mean = MeanMetric()
        self.tried: list[int] = []

    def training_step(self, batch, batch_idx):
        self.tried.append(len(batch[0]))
        loss = self.layers(batch[0]).mean()
        self.mean.update(loss)
        self.log("loss", loss)
        if len(batch[0]) > self.holds:
            if self.fails_in == "forward":
                raise torch.OutOfMemoryError("simulated")
            loss.register_hook(_fail)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def _fail(gradient):
    raise RuntimeError("CUDA out of memory. Simulated.")


class Probe(Callback):
    """Probes where a fit would, and notes what was there before and after."""

    def on_train_start(self, trainer, pl_module):
        loader = trainer.fit_loop._combined_loader.flattened[0]
        before = self.state(pl_module)
        self.found = largest_that_fits(lambda size: probe_step(trainer, make_batch(loader, size)), 2)
        self.before, self.after = before, self.state(pl_module)
        self.logged = dict(trainer._results)

    def state(self, module):
        torch_state, numpy_state = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
        tensors = {name: value.tolist() for name, value in module.state_dict().items()}
        metric = {name: value.tolist() for name, value in module.mean._copy_state_dict().items()}
        grads = [p.grad is None for p in module.parameters()]
        return torch_state, numpy_state, random.getstate(), tensors, metric, module.mean._update_count, grads, module.training


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
@pytest.mark.parametrize(("holds", "low", "high"), [(3, 2, 3), (37, 28, 37)])
def test_it_finds_what_fits_and_leaves_no_trace(fails_in, holds, low, high):
    module, probe = Holds(holds, fails_in), Probe()
    trainer = pl.Trainer(**quiet(), max_steps=1, callbacks=[probe])
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(50, 4)), batch_size=2, shuffle=True))
    assert low <= probe.found <= high
    assert max(module.tried) > holds
    assert probe.before == probe.after
    assert probe.logged == {}


def test_streams_are_not_probed():
    assert make_batch(DataLoader(Stream(10), batch_size=2), 4) is None


def test_what_is_an_error_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
