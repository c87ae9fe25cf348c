"""One learner with a neutral outer optimizer trains bit for bit as a plain Trainer, whatever of Lightning the fit uses.

Outer SGD with learning rate 1 and no momentum over fp32 adds exactly 0 at every adoption (DESIGN.md section 4), so any difference is a
defect: a step counted wrong, a weight touched between micro-batches, a hook called twice.
"""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_diloco import DecoupledDiLoCoStrategy
from tests.citizen.cases import CASES, Case
from tests.strategy.kit import equal, parameters_of, quiet

NEUTRAL = {
    "launch": "inline",
    "num_fragments": 2,
    "sync_interval_steps": 3,
    "wire_dtype": "fp32",
    "outer_lr": 1.0,
    "outer_momentum": 0.0,
    "norm_gate": None,
}


class Recorder(Callback):
    """Parameters after every batch, and how often an optimizer was stepped."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.stepped_batches = 0
        self._fired = False

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._fire)

    def _fire(self, *_):
        self._fired = True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(parameters_of(pl_module))
        self.stepped_batches += self._fired
        self._fired = False


def run(case: Case, strategy) -> tuple[Recorder, Trainer]:
    seed_everything(5, verbose=False)
    model, recorder = case.model(), Recorder()
    options = case.options()
    options["callbacks"] = [*options.get("callbacks", []), recorder]
    trainer = Trainer(**quiet(devices=1, strategy=strategy, **options))
    trainer.fit(model, case.data(), None if case.val is None else case.val())
    return recorder, trainer


@pytest.mark.parametrize("name", CASES)
def test_a_fit_with_one_learner_equals_the_plain_one(name, tmp_path, monkeypatch):
    """Scenarios 15 to 18, 20 and 23."""
    monkeypatch.chdir(tmp_path)
    case = CASES[name]
    plain, plain_trainer = run(case, "auto")
    ours, trainer = run(case, DecoupledDiLoCoStrategy(**NEUTRAL))
    assert len(plain.seen) == len(ours.seen) > 3
    assert all(equal(a, b) for a, b in zip(plain.seen, ours.seen, strict=True))
    first, second = (parameters_of(t.lightning_module) for t in (plain_trainer, trainer))
    if case.own_weights:
        assert equal(first, second)
    else:
        assert all(torch.allclose(second[name].float(), value.float(), rtol=1e-5, atol=1e-6) for name, value in first.items())
    assert trainer.global_step == plain_trainer.global_step and trainer.current_epoch == plain_trainer.current_epoch
    summary = trainer.strategy.summary
    assert summary["merges"] > 0 and summary["bytes_up"] > 0, "the outer synchronization is alive"
    assert [row["inner_steps"] for row in summary["learners"]] == [ours.stepped_batches]
    assert all(row["pending"] == row["discarded"] == 0 for row in summary["fragments"])
