"""`fit` with two learners and a syncer that is killed, or hangs: learners go on, another one takes the job over, the fit ends as ever."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from lightning.pytorch import Trainer

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.errors import SyncerUnavailableError
from lightning_diloco.runtime.life_signs import give_sign
from lightning_diloco.runtime.replay import replay_run
from tests.strategy.kit import TinyModel, equal, global_parameters, latest, loader, parameters_of, quiet
from tests.tape_checker import check_run, load_tape

pytestmark = pytest.mark.process

FAST = {"num_fragments": 2, "sync_interval_steps": 8, "heartbeat_s": 0.2, "outer_momentum": 0.3, "outer_lr": 0.5, "tape_payloads": True}
KILLED_AT, MEET_AT = 60, 600


class SyncerKiller(TinyModel):
    """Learner 0 sends the syncer a signal at a step of its own; no learner has trained all its steps before another syncer serves."""

    def __init__(self, always: bool = False, signum: signal.Signals = signal.SIGKILL) -> None:
        super().__init__(step_s=0.01)
        self.always, self.signum = always, signum

    def training_step(self, batch, batch_idx):
        place = self.trainer.strategy.assignment
        if place.learner_id == 0 and (batch_idx == KILLED_AT or (self.always and batch_idx > KILLED_AT and batch_idx % 20 == 0)):
            os.kill(self._pid(place), self.signum)
        end_s = time.monotonic() + 60
        while batch_idx == MEET_AT and "restart" not in self._events(place) and time.monotonic() < end_s:
            give_sign()
            time.sleep(0.1)
        return super().training_step(batch, batch_idx)

    def _pid(self, place) -> int:
        return json.loads((place.run_dir / "syncer.json").read_text())["pid"]

    def _events(self, place) -> set[str]:
        return {event["event"] for event in load_tape(place.run_dir / "tape.jsonl")}


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_syncer_that_is_killed_is_started_again_and_the_fit_goes_on(tmp_path, caplog, monkeypatch, signum):
    monkeypatch.chdir(tmp_path)
    strategy = DecoupledDiLoCoStrategy(**FAST, hang_timeout_s=5)
    model = SyncerKiller(signum=signum)
    Trainer(**quiet(devices=2, max_steps=900, strategy=strategy)).fit(model, loader(8192))
    summary, run_dir = strategy.summary, latest(tmp_path)
    assert ("the syncer hangs: its loop has not turned" in caplog.text) == (signum == signal.SIGSTOP)
    assert "the syncer was ended by SIGKILL; restart 1 of at most 3" in caplog.text
    assert summary["status"] == "finished" and summary["restarts"] == {"learners": 0, "syncer": 1}
    assert [learner["inner_steps"] for learner in summary["learners"]] == [900, 900]
    assert summary["discarded_by_reason"]["died"] == 0
    (restart,) = [e for e in load_tape(run_dir / "tape.jsonl") if e["event"] == "restart"]
    assert all(f["version"] > n for f, (_, n) in zip(summary["fragments"], restart["versions"], strict=True)), "it merged again after it"
    assert check_run(run_dir)["tokens"] == 2 * 900 * 4
    replayed = replay_run(run_dir)
    assert replayed.is_equal and replayed.restarts == 1 and replayed.global_sha256 == summary["global_sha256"]
    assert equal(parameters_of(model), global_parameters(run_dir))


@pytest.mark.slow
def test_a_syncer_that_is_killed_too_often_ends_the_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strategy = DecoupledDiLoCoStrategy(**FAST, max_restarts=0)
    with pytest.raises(SyncerUnavailableError, match=r"signal SIGKILL after 0 restarts \(max_restarts=0\).*syncer\.log.*--resume"):
        Trainer(**quiet(devices=1, max_steps=5000, strategy=strategy)).fit(SyncerKiller(), loader(65536))
    assert strategy.summary["status"] == "failed"
