"""The same fits on two learners, as processes: they end, what they learned is accounted for, and the caller gets the global model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_diloco import DecoupledDiLoCoStrategy
from tests.citizen.cases import CASES, stream
from tests.strategy.kit import TinyModel, equal, global_parameters, latest, parameters_of, quiet

pytestmark = pytest.mark.process
STREAMS = "ignore:The training data is an IterableDataset:UserWarning"


class Noting(TinyModel):
    """Writes down the first number of every item that it trains on."""

    def training_step(self, batch, batch_idx):
        with Path(f"seen_{self.trainer.global_rank}").open("a") as file:
            file.write("".join(f"{x[0].item()}\n" for x in batch[0]))
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings(STREAMS)
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.slow
def test_a_stream_is_shared_out_unless_the_trainer_says_otherwise(is_shared, tmp_path, monkeypatch):
    """Scenario 20: each item once per epoch, or once per learner."""
    monkeypatch.chdir(tmp_path)
    strategy = DecoupledDiLoCoStrategy(num_fragments=2, sync_interval_steps=3)
    trainer = Trainer(**quiet(devices=2, strategy=strategy, max_epochs=1, use_distributed_sampler=is_shared))
    trainer.fit(Noting(), stream(2))
    first, second = (Path(f"seen_{i}").read_text().split() for i in range(2))
    assert len(first) == len(second) == (32 if is_shared else 64)
    assert len({*first, *second}) == 64 and set(first).isdisjoint(second) == is_shared


@pytest.mark.slow
@pytest.mark.filterwarnings(STREAMS)
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
    returned = {k: v.detach() for k, v in model.state_dict().items() if k in published}
    assert equal(returned, published) != case.own_weights
    last = torch.load(latest(tmp_path) / "checkpoints/last.ckpt", weights_only=False)["state_dict"]
    assert equal({name: last[name] for name in returned}, returned)
    if "Pruning" in name:
        assert all(0.2 < (v == 0).float().mean() < 0.8 for k, v in returned.items() if k.endswith("weight"))
    assert trainer.state.finished and trainer.current_epoch > 0
