"""A learner whose syncer does not come back ends by its own rule, if it has one: real processes."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from tests.runtime.job_helpers import until
from tests.runtime.test_syncer_restart import CONFIG, Trainer, syncer, versions

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(180)]


def test_a_learner_without_a_syncer_ends_after_its_number_of_steps(tmp_path, caplog):
    with syncer(tmp_path / "run", replace(CONFIG, max_offline_steps=50, drain_timeout_s=2.0)) as job:
        learner = Trainer(job.client(0))
        until(lambda: bool(job.tape("merge")) and versions(job)[-1][1] >= 5, 60)
        job.kill()
        before, killed_s = learner.steps, time.monotonic()
        until(lambda: learner.client.stop_reason is not None, 60)
        assert learner.steps >= before + 50 and time.monotonic() - killed_s > 9.0, "short steps alone are no silence"
        assert "max_offline_steps=50" in learner.client.stop_reason
        start_s = time.monotonic()
        learner.end()
        assert time.monotonic() - start_s < 10.0 and "This learner ends: no syncer for" in caplog.text


def test_without_the_rule_it_goes_on_and_a_syncer_that_is_back_is_a_new_beginning(tmp_path):
    with syncer(tmp_path / "run", replace(CONFIG, max_offline_steps=100_000)) as job:
        learner = Trainer(job.client(0))
        until(lambda: bool(job.tape("merge")), 60)
        job.kill()
        until(lambda: learner.client._loop.reports.lost_syncer, 60)
        assert learner.client.stop_reason is None
        job.resume()
        until(lambda: versions(job)[-1][0] == 1, 60)
        steps = learner.client._machine.state.inner_step
        until(lambda: learner.client._machine.state.inner_step > steps + 20)
        assert learner.client._loop.reports._heard_step >= steps and learner.client.stop_reason is None
        learner.end()
        assert job.process.wait(30) == 0, job.log
