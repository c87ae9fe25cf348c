"""An id that a dead process still holds is waited for; a live one's is refused."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_diloco.errors import JoinRefusedError, LearnerIdInUseError
from lightning_diloco.protocol import job as job_rules
from lightning_diloco.protocol.messages import Welcome
from lightning_diloco.runtime.client import JoinInfo, LearnerClient
from lightning_diloco.strategy.joining import join_when_free, patience_s
from tests.runtime.job_helpers import CONFIG, make_module, running_job
from tests.runtime.job_raw_peer import RawPeer

QUICK = dataclasses.replace(CONFIG, heartbeat_s=0.1)


def joined(client: LearnerClient) -> tuple[LearnerClient, JoinInfo]:
    return client, client.join()


def test_a_learner_takes_over_the_id_of_a_silent_process_as_soon_as_it_may(tmp_path, monkeypatch):
    monkeypatch.setattr(job_rules, "SILENT_S", 1.0)
    with running_job(tmp_path, config=QUICK, supervised=False) as job, RawPeer(job.endpoint, make_module(3), QUICK, job.context) as dead:
        job.client(0).join()
        dead.hello(learner_id=1)
        dead.hear(Welcome, role="joiner")
        _, info = join_when_free(lambda: joined(job.client(1)), 20.0)
        assert (info.learner_id, info.role, info.incarnation) == (1, "joiner", 1)


def test_a_live_learners_id_is_refused_in_the_end_and_another_refusal_at_once(tmp_path, monkeypatch):
    made = []
    with running_job(tmp_path, config=QUICK, supervised=False) as job:
        job.client(0).join()
        with pytest.raises(LearnerIdInUseError, match="learner_id=0 is in use by a live process"):
            join_when_free(lambda: made.append(job.client(0)) or joined(made[-1]), 1.5)
        assert len(made) >= 2
        made.clear()
        with pytest.raises(JoinRefusedError, match="at most"):
            join_when_free(lambda: made.append(job.client(10**6)) or joined(made[-1]), 30.0)
        assert len(made) == 1


def test_it_waits_longer_than_a_syncer_listens_for_a_dead_process():
    for heartbeat_s in (0.1, 1.0, 5.0):
        config = dataclasses.replace(CONFIG, heartbeat_s=heartbeat_s)
        assert patience_s(heartbeat_s) > max(job_rules.SILENT_S, job_rules.SILENT_HEARTBEATS * config.heartbeat_s)
