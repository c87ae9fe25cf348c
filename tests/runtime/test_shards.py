"""A syncer of several shards, as processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_diloco.cli.main import main
from lightning_diloco.errors import SyncerUnavailableError
from lightning_diloco.runtime.client import LearnerClient
from lightning_diloco.runtime.keys import SiteKeys, admit, make_pair, trust_syncer
from lightning_diloco.runtime.shards import shard_dir
from tests.doc_pages import ROOT
from tests.runtime.job_helpers import CONFIG, Background, make_module, until
from tests.runtime.metrics_reading import assert_equals_summary, scrape
from tests.runtime.shard_helpers import Learner, ShardedRun, check_sharded, free_ports, is_running, sharded_run
from tests.runtime.test_service_process import learner_process

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


def metrics_url(run: ShardedRun) -> str:
    lines = iter(lambda: run.process.stdout.readline().decode(), "")
    return next(line for line in lines if line.startswith("Metrics: ")).split()[1]


def last_scrape(run: ShardedRun, url: str) -> str:
    """What the endpoint says before its process ends."""
    told = ""
    while run.process.poll() is None:
        try:
            told = scrape(url)
        except OSError:
            break
        time.sleep(0.05)
    return told


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
    with sharded_run(run_dir, 2, "--metrics-port", "0") as run:
        url = metrics_url(run)
        first, second = join_two(run)
        training = [Background(lambda: first.train(60)), Background(lambda: second.train(120))]
        training[0].result()
        first.leave()
        training[1].result()
        second.leave()
        told = last_scrape(run, url)
        code, err = run.end()
        assert code == 0 and [line for line in err.splitlines() if "for the last scrape" not in line] == []
    summary = check_sharded(run_dir, 2)
    assert summary["status"] == "finished" and summary["tokens"] == summary["tokens_merged"] == 180 * 16
    assert [x["learner_id"] for x in summary["learners"]] == [0, 1] and len(summary["fragments"]) == 4
    assert_equals_summary(told, summary)
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
    with sharded_run(run_dir, 2, "--metrics-port", "0") as run:
        url = metrics_url(run)
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
        told = last_scrape(run, url)
        code, err = run.end()
        assert code == 0 and f"Shard {victim} was ended by SIGKILL" in err
    for learner, steps in zip(learners, quiet, strict=True):
        # No boundary of the outage waited for the dead shard.
        outage = learner.step_s[steps:]
        assert max(outage) < max(0.25, 5 * max(learner.step_s[:steps]))
        # Every step sees a fragment of the dead shard due: waits for it, however short, would be many. Starting a process takes both cores.
        assert sum(step_s > 0.02 for step_s in outage) < 0.03 * len(outage)
        assert statistics.median(learner.step_s[steps:]) < 5 * statistics.median(learner.step_s[:steps])
    summary = check_sharded(run_dir, 2)
    assert summary["status"] == "finished" and summary["restarts"]["syncer"] == 1
    assert_equals_summary(told, summary)
    assert [sum(line["event"] == "restart" for line in run.tape(k)) for k in range(2)] == [int(k == victim) for k in range(2)]
    assert summary["tokens_pending"] <= 1
    check_model(run_dir, learners[1])
    assert check_replay(run_dir, capsys)["restarts"] == 1


@pytest.mark.slow
def test_a_shard_that_is_down_while_the_last_learner_leaves_holds_nobody_up(tmp_path, capsys):
    """What it was not handed is discarded there, and it ends with the lead's word."""
    run_dir, hasty = tmp_path / "run", dataclasses.replace(KEPT, drain_timeout_s=0.3)
    with sharded_run(run_dir) as run:
        learner = Learner(make_module(0), run.options(0, config=hasty))
        learner.train(60)
        os.kill(run.said(1)["pid"], signal.SIGKILL)
        learner.train(20)
        learner.leave()
        assert run.end()[0] == 0
    summary = check_sharded(run_dir, 2)
    assert summary["status"] == "finished" and summary["tokens"] == 80 * 16
    by_shard = [summary["fragments"][k::2] for k in range(2)]
    assert all(f["merged"] == 80 * 16 for f in by_shard[0])
    assert all(f["pending"] == 0 and f["discarded"] >= 16 * 16 for f in by_shard[1])
    assert check_replay(run_dir, capsys)["restarts"] == 1


@pytest.mark.slow
def test_everything_is_killed_and_resumed_and_nothing_is_lost(tmp_path, capsys):
    """The process that looks after the shards is killed: they end with it, learners go on, and all go on from where they were."""
    run_dir, port = tmp_path / "run", free_ports(4)
    bind = ("--bind", f"tcp://127.0.0.1:{port}")
    with sharded_run(run_dir, 2, *bind) as run:
        assert [run.said(k)["endpoint"] for k in range(2)] == [f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 2}"]
        assert [run.said(k)["bulk"] for k in range(2)] == [f"tcp://127.0.0.1:{port + 1}", f"tcp://127.0.0.1:{port + 3}"]
        learners = join_two(run)
        stop = []
        training = [Background(lambda x=x: [x.train(10, sleep_s=0.01) for _ in iter(lambda: bool(stop), True)]) for x in learners]
        until(lambda: min(run.num_merges(k) for k in range(2)) > 20)
        pids = [run.said(k)["pid"] for k in range(2)]
        run.process.kill()
        run.process.communicate()
        until(lambda: not any(is_running(pid) for pid in pids), 10)
        steps = [len(x.step_s) for x in learners]
        with sharded_run(run_dir, 2, *bind, folder=("--resume",)) as again:
            before = [again.num_merges(k) for k in range(2)]
            until(lambda: all(again.num_merges(k) > before[k] + 20 for k in range(2)), 40)
            assert all(len(x.step_s) > n for x, n in zip(learners, steps, strict=True))
            assert main(["status", again.endpoint, "--json", "--once"]) == 0
            told = json.loads(capsys.readouterr().out)
            assert told["num_fragments"] == 4 and told["merges"] >= sum(before) and len(told["learners"]) == 2
            stop.append(True)
            for learner, life in zip(learners, training, strict=True):
                life.result()
                learner.leave()
            assert again.end()[0] == 0
    summary = check_sharded(run_dir, 2)
    assert summary["status"] == "finished" and summary["tokens_pending"] <= 1
    check_model(run_dir, learners[1])
    assert check_replay(run_dir, capsys)["restarts"] == 2


@pytest.mark.slow
def test_a_learner_is_killed_and_its_account_closes_alike_at_all_shards(tmp_path):
    """Its last totals are in a file that only the lead reads; the other shard was told less, and lacks the difference."""
    run_dir = tmp_path / "run"
    with sharded_run(run_dir) as run:
        wish = {"endpoint": run.endpoint, "config": KEPT.as_dict(), "width": 16, "steps": 100_000, "sleep_s": 0.004}
        wish["run_dir"] = str(shard_dir(run_dir, 0))
        with learner_process(**wish, learner_id=0) as victim, learner_process(**{**wish, "steps": 3000}, learner_id=1) as survivor:
            assert [json.loads(process.stdout.readline())["learner_id"] for process in (victim, survivor)] == [0, 1]
            until(lambda: min(run.num_merges(k) for k in range(2)) > 20)
            victim.kill()
            assert survivor.wait(60) == 0
            assert run.end(120)[0] == 0
    summary = check_sharded(run_dir, 2)
    assert summary["status"] == "finished"
    assert summary["tokens_pending"] <= 1 and summary["discarded_by_reason"]["died"] > 0
    dead, alive = summary["learners"]
    assert alive["tokens"] == 3000 * 16 and alive["discarded"] == 0 < dead["discarded"]


@pytest.mark.slow
def test_every_shard_is_behind_the_same_keys(tmp_path):
    run_dir, port = tmp_path / "run", free_ports(4)
    public = make_pair(tmp_path / "syncer-keys").hex()
    admit(tmp_path / "syncer-keys", "here", trust_syncer(tmp_path / "site-keys", public).hex())
    with sharded_run(run_dir, 2, "--bind", f"tcp://127.0.0.1:{port}", "--keys", str(tmp_path / "syncer-keys")) as run:
        site = SiteKeys.read(tmp_path / "site-keys")
        learner = Learner(make_module(0), run.options(0, keys=site))
        learner.train(40)
        for shard in range(2):
            endpoint = run.said(shard)["endpoint"]
            with pytest.raises(SyncerUnavailableError, match="a syncer with keys, probably"):
                LearnerClient(make_module(1), run.options(1, endpoint=endpoint, join_timeout_s=1.5)).join()
        learner.leave()
        code, err = run.end()
        assert code == 0 and "shard 0" in err and "shard 1" in err, "both have logged the stranger"
    check_sharded(run_dir, 2)


@pytest.mark.slow
def test_sigterm_stops_all_shards_and_another_one_the_wait_for_the_last_scrape(tmp_path):
    run_dir = tmp_path / "run"
    with sharded_run(run_dir, 2, "--metrics-port", "0") as run:
        url = metrics_url(run)
        learner = Learner(make_module(0), run.options(0))
        learner.train(60)
        scrape(url)
        run.process.send_signal(signal.SIGTERM)
        until(lambda: json.loads((run_dir / "summary.json").read_text())["status"] == "stopped")
        time.sleep(0.5)
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGTERM)
        code, err = run.end(5)
        assert code == 0 and err.count("\n") == 1 and "Waiting up to 20 s for the last scrape" in err
        learner.train(5)
        learner.client.close()
    summary = check_sharded(run_dir, 2)
    assert summary["status"] == "stopped" and summary["merges"] > 0 and summary["global_sha256"] is not None
    assert (run_dir / "global.safetensors").exists()


TRAINER = """
import sys
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule
from torch import nn
from lightning.pytorch.demos.boring_classes import BoringModel

class Model(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))
from lightning_diloco import DecoupledDiLoCoStrategy

sync = {"num_fragments": 3, "sync_interval_steps": 3, "heartbeat_s": 0.2}
strategy = DecoupledDiLoCoStrategy(syncer=sys.argv[1], learner_id=0, num_learners=1, **sync)
trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=60, logger=False, enable_progress_bar=False)
module = Model()
trainer.fit(module, BoringDataModule())
import torch
torch.save(module.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
def test_a_trainer_joins_a_syncer_of_several_shards_by_its_address_alone(tmp_path):
    run_dir, script = tmp_path / "run", tmp_path / "script.py"
    script.write_text(TRAINER)
    with sharded_run(run_dir) as run:
        done = subprocess.run(
            [sys.executable, str(script), run.endpoint, str(tmp_path / "state.pt")],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert run.end() == (0, "")
    summary = check_sharded(run_dir, 2)
    assert summary["learners"][0]["inner_steps"] == 60 and summary["tokens_pending"] <= 1
    assert all(f["version"] > 0 for f in summary["fragments"])
    state, saved = torch.load(tmp_path / "state.pt"), load_file(run_dir / "global.safetensors")
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in state)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert len(torch.load(checkpoint, weights_only=False)["state_dict"]) == len(state)
