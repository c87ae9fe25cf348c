"""The syncer as a process: how it ends, what it leaves behind, and how fast it answers while it works."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_diloco.protocol.messages import Ping, Pong
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from tests.runtime.job_helpers import CONFIG, Background, make_module, sum_up, train, until, whole_life
from tests.runtime.job_raw_peer import RawPeer
from tests.tape_checker import check_run, load_tape

pytestmark = pytest.mark.process

WRAPPER = """
import json, sys
from lightning_diloco.cli.main import main
path, argv = sys.argv[1], sys.argv[2:]
code = main(argv)
with open(path, "w") as file:
    json.dump(sorted({m.split(".")[0] for m in sys.modules}), file)
sys.exit(code)
"""


class Syncer:
    """One syncer process."""

    def __init__(self, run_dir: Path, *, supervised: bool = False, num_slots: int | None = None) -> None:
        self.run_dir = run_dir
        self.modules_path = run_dir.with_name(run_dir.name + ".modules")
        argv = ["syncer", "--bind", "tcp://127.0.0.1:0", "--run-dir", str(run_dir), *(["--supervised"] if supervised else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRAPPER, str(self.modules_path), *argv],
            stdin=subprocess.PIPE if supervised else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        if supervised:
            self.tell(token="job", takeover_token="over", num_slots=num_slots)
        until(lambda: (run_dir / "syncer.json").exists() or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.process.communicate()
        said = json.loads((run_dir / "syncer.json").read_text())
        assert said["pid"] == self.process.pid
        self.endpoint = said["endpoint"]

    def tell(self, **command: Any) -> None:
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def client(self, learner_id: int, module: nn.Module | None = None, **options: Any) -> LearnerClient:
        fields = {"endpoint": self.endpoint, "config": CONFIG, "counters_path": self.run_dir / "counters"} | options
        return LearnerClient(make_module(learner_id) if module is None else module, ClientOptions(learner_id=learner_id, **fields))

    def end(self, limit_s: float = 20) -> tuple[int, str]:
        """Wait for its end; the exit code and what stands on its stderr."""
        _, err = self.process.communicate(timeout=limit_s)
        return self.process.returncode, err.decode()

    def modules(self) -> list[str]:
        return json.loads(self.modules_path.read_text())


@contextlib.contextmanager
def syncer(run_dir: Path, **options: Any) -> Iterator[Syncer]:
    started = Syncer(run_dir, **options)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate()


@contextlib.contextmanager
def learner_process(**wish: Any) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-m", "tests.runtime.job_learner", json.dumps(wish)], stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_by_hand_the_job_ends_by_itself_when_the_last_learner_leaves(tmp_path):
    run_dir = tmp_path / "run"
    with syncer(run_dir) as process:
        modules = [make_module(i) for i in range(2)]
        clients = [process.client(i, modules[i]) for i in range(2)]
        lives = [Background(lambda i=i: whole_life(clients[i], (60, 150)[i])) for i in range(2)]
        assert [life.result().learner_id for life in lives] == [0, 1]
        assert process.end() == (0, "")
        assert not {"lightning", "pytorch_lightning", "lightning_fabric"} & set(process.modules())
    summary = check_run(run_dir)
    assert summary["status"] == "finished" and summary["tokens"] == summary["tokens_merged"] == 210 * 16
    assert 0 < summary["startup_s"] < 60 and summary["merges"] > 30
    saved = load_file(run_dir / "global.safetensors")
    for name, parameter in modules[1].named_parameters():
        assert torch.equal(parameter.detach(), saved[name]), name


def test_sigterm_by_hand_writes_everything_and_learners_go_on_alone(tmp_path):
    run_dir = tmp_path / "run"
    with syncer(run_dir) as process:
        client = process.client(0)
        client.join()
        train(client, 60)
        process.process.send_signal(signal.SIGTERM)
        assert process.end() == (0, "")
        train(client, 20)
        assert client.fenced is None and client.stop_reason is None
        client.close()
    summary = check_run(run_dir)
    assert summary["status"] == "stopped" and summary["merges"] > 10
    # What it had trained when the syncer ended stands in its counters; what had not been handed over is gone with the job.
    assert summary["tokens"] == 60 * 16 and summary["tokens_pending"] <= 1
    assert all(fragment["pending"] == 0 for fragment in summary["fragments"])
    saved = load_file(run_dir / "global.safetensors")
    assert set(saved) == {n for n in make_module().state_dict() if "num_batches" not in n} and all(
        torch.isfinite(t.float()).all() for t in saved.values()
    )


def test_sigterm_before_any_learner_has_come_is_a_run_that_was_stopped(tmp_path):
    run_dir = tmp_path / "run"
    with syncer(run_dir) as process:
        process.process.send_signal(signal.SIGTERM)
        assert process.end() == (0, "")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "stopped" and summary["merges"] == 0 and summary["learners"] == []
    assert not (run_dir / "global.safetensors").exists()
    assert [e["event"] for e in load_tape(run_dir / "tape.jsonl")] == ["end", "run"]


def test_a_killed_learner_costs_what_it_had_not_handed_over_and_its_next_life_joins(tmp_path):
    run_dir = tmp_path / "run"
    config = dataclasses.replace(CONFIG, min_quorum=1, norm_gate=None)
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(2)))
    wish = {"width": 64, "config": config.as_dict(), "run_dir": str(run_dir), "token": "job", "takeover_token": "over"}
    with syncer(run_dir, supervised=True, num_slots=2) as process:
        survivor = process.client(0, module, config=config, token="job")
        survivor.join()
        gaps: list[float] = []
        is_over = False

        def survive() -> None:
            while not is_over:
                start_s = time.perf_counter()
                time.sleep(0.02)
                survivor.boundary(tokens=16)
                gaps.append(time.perf_counter() - start_s)

        life = Background(survive)
        with learner_process(endpoint=process.endpoint, learner_id=1, steps=100_000, sleep_s=0.01, **wish) as first:
            assert json.loads(first.stdout.readline()) == {"learner_id": 1, "incarnation": 0, "role": "joiner"}
            time.sleep(0.8)
            first.kill()
            first.wait()
            killed_at = len(gaps)
            process.tell(command="nonsense")
            process.tell(command="lost", learner_id=1, life=0)
        second = process.client(1, nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(2))), config=config, token="job")
        assert second.join().incarnation == 1
        for _ in range(60):
            time.sleep(0.005)
            second.boundary(tokens=16)
        second.leave("limit")
        second.close()
        is_over = True
        life.result()
        survivor.leave("limit")
        survivor.close()
        process.tell(command="finish", status="finished")
        code, err = process.end()
        assert code == 0 and "nonsense" in err and err.count("\n") == 1
    summary = sum_up(run_dir, "finished")
    tape = load_tape(run_dir / "tape.jsonl")
    leaves = [(e["learner_id"], e["incarnation"], e["reason"]) for e in tape if e["event"] == "leave"]
    assert sorted(leaves) == [(0, 0, "limit"), (1, 0, "died"), (1, 1, "limit")]
    assert summary["learners"][1]["incarnations"] == 2
    assert [r for r, n in summary["discarded_by_reason"].items() if n] == ["died"] and summary["learners"][0]["discarded"] == 0
    # A killed learner is no reason for the others to wait: no gap is longer than two ordinary steps and what this machine's noise was
    # before the kill (and 100 ms for the next life's start on the same cores).
    before = sorted(gaps[5 : killed_at - 2])
    ordinary_s = before[len(before) // 2]
    assert max(gaps[killed_at - 2 :]) < 2 * ordinary_s + (before[-1] - ordinary_s) + 0.1


def test_the_supervisors_end_is_the_syncers_end(tmp_path):
    run_dir = tmp_path / "run"
    with syncer(run_dir, supervised=True) as process:
        start_s = time.monotonic()
        process.process.stdin.close()
        process.process.stdin = None
        assert process.end(5)[0] == 1
        assert time.monotonic() - start_s < 2.0


def test_control_round_trips_stay_below_50_ms_while_64_mib_are_on_their_way(tmp_path):
    """Founding and contributions of two fragments of 64 MiB, by a process of its own; pings from here, one after the other."""
    run_dir = tmp_path / "run"
    config = dataclasses.replace(CONFIG, num_fragments=2, sync_interval_steps=2, wire_dtype="fp32", norm_gate=None)
    wish = {"width": 4096, "config": config.as_dict(), "run_dir": str(run_dir), "steps": 100_000, "sleep_s": 0.02, "token": "job"}
    round_trips_s: list[float] = []
    with (
        syncer(run_dir, supervised=True) as process,
        RawPeer(process.endpoint, make_module(), CONFIG) as pinger,
        learner_process(endpoint=process.endpoint, learner_id=0, **wish) as learner,
    ):
        tape, merges, end_s = run_dir / "tape.jsonl", 0, time.monotonic() + 45
        while merges < 3 and time.monotonic() < end_s:
            number = len(round_trips_s)
            start_s = time.perf_counter()
            pinger.say(Ping(number=number))
            pinger.hear(Pong, number=number)
            round_trips_s.append(time.perf_counter() - start_s)
            time.sleep(0.005)
            if number % 50 == 0:
                merges = tape.read_bytes().count(b'"event":"merge"')
        learner.kill()
        process.tell(command="lost", learner_id=0, life=0)
        process.tell(command="finish", status="finished")
        assert process.end(60) == (0, "")
    summary = sum_up(run_dir, "finished")
    assert summary["merges"] >= 3 and summary["bytes_up"] >= 3 * (64 << 20)
    ordered = sorted(round_trips_s)
    p99_s = ordered[int(0.99 * len(ordered))]
    assert len(ordered) > 200 and p99_s < 0.05, (len(ordered), p99_s, ordered[-5:])
