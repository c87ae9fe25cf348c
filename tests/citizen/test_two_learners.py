"""The same fits on two learners, as processes: they end, what they learned is accounted for, and the caller gets the global model."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_diloco import DecoupledDiLoCoStrategy
from tests.citizen.cases import CASES
from tests.strategy.kit import equal, global_parameters, latest, parameters_of, quiet

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.mark.parametrize("name", CASES)
def test_a_fit_on_two_learners_ends_in_order(name, tmp_path, monkeypatch):
    """Scenarios 15 to 18, 20 and 23."""
    monkeypatch.chdir(tmp_path)
    case = CASES[name]
    seed_everything(5, verbose=False)
    model = case.model()
    strategy = DecoupledDiLoCoStrategy(num_fragments=2, sync_interval_steps=3)
    trainer = Trainer(**quiet(devices=2, strategy=strategy, **case.options()))
    trainer.fit(model, case.data(), None if case.val is None else case.val())
    summary = trainer.strategy.summary
    assert summary["status"] == "finished" and summary["merges"] > 0
    assert [row["incarnations"] for row in summary["learners"]] == [1, 1]
    assert all(row["inner_steps"] > 0 for row in summary["learners"])
    assert all(row["pending"] == 0 for row in summary["fragments"])
    assert all(torch.isfinite(value).all() for value in parameters_of(model).values())
    published = global_parameters(latest(tmp_path))
    assert equal({k: v for k, v in parameters_of(model).items() if k in published}, published)
    assert trainer.state.finished and trainer.current_epoch > 0
