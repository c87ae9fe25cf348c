"""Learners that torchrun starts, with its own variables, restarts and signals."""

from __future__ import annotations

import shlex
import signal

import psutil
import pytest

from tests.sites.kit import code, joins, leaves, make_keys, merges_after_last, site
from tests.tape_checker import check_run


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(420)
def test_two_torchruns_train_one_model_and_a_killed_learner_costs_one_restart(tmp_path):
    with site(tmp_path / "site") as here:
        make_keys(here.folder)
        run_dir = here.folder / "outputs" / "job"
        syncer = here.start_syncer(run_dir)
        command = shlex.split(here.command(code("torchrun")))
        assert command[-2:] == ["1", "2"]
        first, second = here.start(*command[:-2], "0", "2"), here.start(*command)
        here.wait_until(lambda: len(joins(run_dir)) == 2 and merges_after_last("join", run_dir) > 5, "two learners")

        (learner,) = psutil.Process(second.pid).children()
        learner.send_signal(signal.SIGKILL)
        here.wait_until(lambda: (1, 1) in joins(run_dir) and merges_after_last("join", run_dir) > 5, "the next incarnation")
        assert leaves(run_dir) == [(1, "died")]

        second.send_signal(signal.SIGTERM)
        assert here.exit_code(second) != 0
        assert leaves(run_dir) == [(1, "died"), (1, "signal")], here.text()

        second = here.start(*command)
        here.wait_until(lambda: (1, 2) in joins(run_dir) and merges_after_last("join", run_dir) > 5, "the third life")
        here.stop()
        assert [here.exit_code(process) for process in (first, second, syncer)] == [0, 0, 0], here.text()
    summary = check_run(run_dir)
    assert summary["status"] == "finished"
    assert {reason for reason, tokens in summary["discarded_by_reason"].items() if tokens} <= {"died"}
    assert all(x["rounds_merged"] > 0 for x in summary["learners"])


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(240)
def test_two_processes_of_one_torchrun_get_a_sentence(tmp_path):
    with site(tmp_path / "site") as here:
        make_keys(here.folder)
        command = shlex.split(here.command(code("torchrun")))
        command[command.index("--nproc-per-node") + 1], command[command.index("--max-restarts") + 1] = "2", "0"
        assert here.exit_code(here.start(*command)) == 1
        assert "syncer= in one of 2 processes of torchrun: a learner of several processes is not there yet." in here.text()
