"""SIGTERM in a learner that somebody else started, in this process: it leaves in order, ends with 143, and the user's handler is back."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from lightning.pytorch import Trainer

from lightning_diloco import DecoupledDiLoCoStrategy
from tests.runtime.job_helpers import running_job, until
from tests.sites.kit import leaves
from tests.strategy.kit import TinyModel, loader, quiet

EXIT = 128 + signal.SIGTERM


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Told(TinyModel):
    """Gets SIGTERM in its sixth batch, and once more while it leaves; a batch later `error` is raised, if any."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(step_s=0.01)
        self.error = error

    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            terminate()
            if self.error is not None:
                raise self.error
        return super().training_step(batch, batch_idx)


@pytest.fixture
def heard():
    """Signals that the user's own handler was called with; it is there again after the test."""
    calls = []

    def handler(signum, frame):
        calls.append(signum)

    before = signal.signal(signal.SIGTERM, handler)
    yield calls
    assert signal.signal(signal.SIGTERM, before) is handler


def fit(endpoint: str, model: TinyModel, learner_id: int = 0) -> BaseException:
    strategy = DecoupledDiLoCoStrategy(syncer=endpoint, learner_id=learner_id, num_learners=2, heartbeat_s=0.2)
    with pytest.raises(SystemExit) as caught:
        Trainer(**quiet(devices=1, max_steps=200, strategy=strategy)).fit(model, loader(256))
    assert caught.value.code == EXIT
    return caught.value


def test_a_member_leaves_in_order_also_if_it_is_told_twice(tmp_path, heard, monkeypatch):
    from lightning_diloco.runtime.client import LearnerClient

    leave, told = LearnerClient.leave, []

    def told_again(self, reason, told_s=None):
        told.append(told_s)
        terminate()
        leave(self, reason, told_s)

    monkeypatch.setattr(LearnerClient, "leave", told_again)
    before_s = time.monotonic()
    with running_job(tmp_path, "tcp", supervised=False) as job:
        fit(job.endpoint, Told())
        assert heard == [signal.SIGTERM] * 2
        assert before_s < told[0] < time.monotonic(), "the drain's time counts from the first signal"
        until(lambda: leaves(tmp_path) == [(0, "signal")])


def test_a_loaders_worker_that_was_killed_as_well_is_no_reason_to_leave_otherwise(tmp_path, heard):
    with running_job(tmp_path, "tcp", supervised=False) as job:
        error = RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
        assert fit(job.endpoint, Told(error)).__cause__ is error
        until(lambda: leaves(tmp_path) == [(0, "signal")])


def test_one_that_waits_to_join_ends_at_once(tmp_path, heard):
    with running_job(tmp_path, "tcp", supervised=False) as job:

        def wait_and_terminate() -> None:
            until(lambda: [m.stage for m in job.machine.job.members.present()] == ["waiting"])
            terminate()

        thread = threading.Thread(target=wait_and_terminate)
        thread.start()
        start_s = time.monotonic()
        fit(job.endpoint, TinyModel(), learner_id=1)
        thread.join()
        assert time.monotonic() - start_s < 30.0 and leaves(tmp_path) == []
