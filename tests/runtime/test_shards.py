"""A syncer of several shards, as processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_diloco.cli.main import main
from tests.runtime.job_helpers import CONFIG, Background, make_module, until
from tests.runtime.shard_helpers import Learner, ShardedRun, check_sharded, sharded_run

pytestmark = pytest.mark.process

KEPT = dataclasses.replace(CONFIG, tape_payloads=True, snapshot_interval_s=0.5)


def join_two(run: ShardedRun) -> list[Learner]:
    joining = [Background(lambda i=i: Learner(make_module(i), run.options(i, config=KEPT))) for i in range(2)]
    return [learner.result() for learner in joining]


def check_model(run_dir: Path, learner: Learner) -> None:
    """The last learner that has left holds what the run directory has."""
    saved = load_file(run_dir / "global.safetensors")
    for name, tensor in [*learner.module.named_parameters(), *learner.module.named_buffers()]:
        if "num_batches" not in name:
            assert torch.equal(tensor.detach(), saved.pop(name)), name
    assert not saved


def check_replay(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    summary = json.loads((run_dir / "summary.json").read_text())
    capsys.readouterr()
    assert main(["replay", str(run_dir), "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["is_equal"] and replayed["global_sha256"] == replayed["expected_sha256"] == summary["global_sha256"]
    assert [f["fragment_id"] for f in replayed["fragments"]] == list(range(len(replayed["fragments"])))
    return replayed


def test_two_learners_train_with_two_shards_and_the_model_is_put_together(tmp_path, capsys):
    run_dir = tmp_path / "run"
    with sharded_run(run_dir) as run:
        first, second = join_two(run)
        training = [Background(lambda: first.train(60)), Background(lambda: second.train(120))]
        training[0].result()
        first.leave()
        training[1].result()
        second.leave()
        assert run.end() == (0, "")
    summary = check_sharded(run_dir, 2)
    assert summary["status"] == "finished" and summary["tokens"] == summary["tokens_merged"] == 180 * 16
    assert [x["learner_id"] for x in summary["learners"]] == [0, 1] and len(summary["fragments"]) == 4
    check_model(run_dir, second)
    assert check_replay(run_dir, capsys)["merges"] > 0
    assert main(["export", str(run_dir), str(tmp_path / "model.safetensors")]) == 0
    exported = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == second.module.state_dict().keys()
    assert all(torch.equal(exported[name], value) for name, value in load_file(run_dir / "global.safetensors").items())


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_shard_comes_back_and_the_fragments_of_the_other_go_on_meanwhile(tmp_path, capsys, victim):
    run_dir, other = tmp_path / "run", 1 - victim
    with sharded_run(run_dir) as run:
        learners = join_two(run)
        stop = []
        training = [Background(lambda x=x: [x.train(10, sleep_s=0.01) for _ in iter(lambda: bool(stop), True)]) for x in learners]
        until(lambda: min(run.num_merges(k) for k in range(2)) > 20)
        quiet = [len(x.step_s) for x in learners]
        pid = run.said(victim)["pid"]
        os.kill(pid, signal.SIGKILL)
        merged_at_kill = run.num_merges(other)
        until(lambda: run.said(victim).get("pid", pid) != pid, 60)
        merged_meanwhile = run.num_merges(other) - merged_at_kill
        # Importing torch alone takes longer than this many steps of 10 ms.
        assert merged_meanwhile > 20
        before = run.num_merges(victim)
        until(lambda: run.num_merges(victim) > before + 20)
        stop.append(True)
        for learner, life in zip(learners, training, strict=True):
            life.result()
            learner.leave()
        code, err = run.end()
        assert code == 0 and f"Shard {victim} was ended by SIGKILL" in err
    for learner, steps in zip(learners, quiet, strict=True):
        # No boundary of the outage waited for the dead shard.
        assert max(learner.step_s[steps:]) < max(0.25, 5 * max(learner.step_s[:steps]))
        assert statistics.median(learner.step_s[steps:]) < 5 * statistics.median(learner.step_s[:steps])
    summary = check_sharded(run_dir, 2)
    assert summary["status"] == "finished" and summary["restarts"]["syncer"] == 1
    assert [sum(line["event"] == "restart" for line in run.tape(k)) for k in range(2)] == [int(k == victim) for k in range(2)]
    assert summary["tokens_pending"] <= 1
    check_model(run_dir, learners[1])
    assert check_replay(run_dir, capsys)["restarts"] == 1
