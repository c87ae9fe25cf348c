"""The emulation against what it stands for: a merge after every step, adopted at once, is data parallel training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
EVERY_STEP = {"interval": 1, "fragments": 1, "delay": 0, "merge": "mean", "outer_lr": 1.0, "outer_momentum": 0.0}
STEPS = 10
pytestmark = pytest.mark.slow


@pytest.fixture
def emulate(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import emulate

    # Instead of a loss: the weights, by which two runs are compared.
    monkeypatch.setattr(emulate.Run, "validate", lambda self, model: torch.cat([p.detach().flatten() for p in model.parameters()]))
    return emulate


def weights(emulate, **settings):
    """Of the final model."""
    run = emulate.Run(emulate.Settings(steps=STEPS, batch=4, lr=4.0, **settings))
    return run.train()["val_loss"]


def distance(emulate, ours, ddp):
    """Between two models, over the way that the second one has gone."""
    run = emulate.Run(emulate.Settings(method="ddp"))
    return float((ours - ddp).norm() / (ddp - run.validate(run.models[0])).norm())


@pytest.mark.parametrize("inner", ["adamw", "shared", "muon"])
def test_one_learner_is_data_parallel_training_on_one_process(emulate, inner):
    ddp = weights(emulate, method="ddp", learners=1, inner="adamw" if inner == "shared" else inner)
    assert distance(emulate, weights(emulate, learners=1, inner=inner, **EVERY_STEP), ddp) < 1e-5


def test_two_learners_with_one_second_moment_are_data_parallel_training_on_two(emulate, monkeypatch):
    # Each learner clips its own gradient, data parallel training that of the whole batch: without clipping they are the same.
    monkeypatch.setattr(emulate.nn.utils, "clip_grad_norm_", lambda *_: None)
    ddp = weights(emulate, method="ddp", learners=2)
    found = {
        name: distance(emulate, weights(emulate, learners=2, **EVERY_STEP | changed), ddp)
        for name, changed in {"it": {"inner": "shared"}, "later": {"inner": "shared", "delay": 1}, "own moments": {}}.items()
    }
    assert found["it"] < 1e-5, found
    assert found["later"] > 0.05 and found["own moments"] > 0.05, found
