"""Learner processes that end or hang in the middle of a fit, and what the supervisor makes of it; learner 1 is always the one."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_diloco import DecoupledDiLoCoStrategy, LearnerFailedError
from tests.strategy.kit import TinyModel, equal, global_parameters, latest, loader, parameters_of, quiet
from tests.tape_checker import load_tape

pytestmark = pytest.mark.process
FAST = {"num_fragments": 2, "sync_interval_steps": 8}
AT_BATCH = 12


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class StopWhenBack(Callback):
    """Learner 0 ends the job once learner 1 has trained in its second life, however long a process needs to start."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        place = trainer.strategy.assignment
        mark = place.run_dir / "second_life"
        if place.learner_id == 1 and place.life == 1 and batch_idx == AT_BATCH:
            mark.touch()
        if place.learner_id == 0 and batch_idx % 16 == 0 and mark.exists():
            trainer.should_stop = True


class Dies(TinyModel):
    """Learner 1 meets its fate once, in the middle of its first life."""

    def __init__(self) -> None:
        super().__init__(step_s=0.01)

    def training_step(self, batch, batch_idx):
        place = self.trainer.strategy.assignment
        if place.learner_id == 1 and place.life == 0 and batch_idx == AT_BATCH:
            self.fate()
        return super().training_step(batch, batch_idx)


def run(model: TinyModel, **options) -> dict:
    """A fit of two learners that goes on until the second one is back; returns its summary."""
    strategy = DecoupledDiLoCoStrategy(**FAST, **options)
    trainer = Trainer(**quiet(devices=2, max_steps=100_000, strategy=strategy, callbacks=[StopWhenBack()]))
    trainer.fit(model, loader(1024))
    return strategy.summary


class RunsOutOfMemory(Dies):
    def fate(self):
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.slow
def test_a_learner_that_runs_out_of_memory_is_restarted_and_the_other_goes_on(tmp_path, caplog):
    model = RunsOutOfMemory()
    summary = run(model)
    assert summary["status"] == "finished"
    assert summary["restarts"] == {"learners": 1, "syncer": 0}
    assert [learner["incarnations"] for learner in summary["learners"]] == [1, 2]
    assert "learner 1 was ended by memory that ran out (RuntimeError:" in caplog.text
    assert "allocate memory" in (latest(tmp_path) / "logs" / "learner_1.log").read_text()
    assert equal(parameters_of(model), global_parameters(latest(tmp_path)))


class Sleeps(Dies):
    def fate(self):
        time.sleep(3600)


class Stops(Dies):
    def fate(self):
        os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize("model", [Sleeps(), Stops()], ids=lambda model: type(model).__name__.lower())
def test_a_learner_that_hangs_is_killed_and_restarted_and_the_other_goes_on(caplog, model):
    summary = run(model, hang_timeout_s=5)
    assert summary["status"] == "finished"
    assert summary["restarts"] == {"learners": 1, "syncer": 0}
    assert [learner["incarnations"] for learner in summary["learners"]] == [1, 2]
    assert "learner 1 has given no sign of life and used less than 1 % of a core for 5 s (hang_timeout_s): it is killed" in caplog.text
    assert "learner 1 was ended by its supervisor, without a sign of life for 5 s (hang_timeout_s=5); restart 1 of at most 3" in caplog.text


class IsSentAway(TinyModel):
    """The only learner gets SIGTERM in the middle of a batch, and notes when."""

    def training_step(self, batch, batch_idx):
        if batch_idx == AT_BATCH:
            (self.trainer.strategy.assignment.run_dir / "told_s").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


def test_a_learner_that_gets_sigterm_hands_over_what_it_has_and_is_gone_within_ten_seconds(tmp_path):
    strategy = DecoupledDiLoCoStrategy(**FAST, max_restarts=0)
    trainer = Trainer(**quiet(devices=1, max_steps=100_000, strategy=strategy))
    with pytest.raises(LearnerFailedError, match=r"Learner 0 was ended by SIGTERM, after 0 restarts \(max_restarts=0\)"):
        trainer.fit(IsSentAway(step_s=0.01), loader(1024))
    ended_s, run_dir = time.monotonic(), latest(tmp_path)
    assert ended_s - float((run_dir / "told_s").read_text()) < 10
    (leave,) = [event for event in load_tape(run_dir / "tape.jsonl") if event["event"] == "leave"]
    assert (leave["learner_id"], leave["reason"]) == (0, "signal")
    assert strategy.summary["learners"][0]["inner_steps"] == AT_BATCH + 1
    assert strategy.summary["tokens"] == strategy.summary["tokens_merged"] == 4 * (AT_BATCH + 1)
