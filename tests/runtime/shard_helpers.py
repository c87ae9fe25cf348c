"""A syncer of several shards as processes, and learners of it on threads of the test."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_diloco.runtime.client import ClientOptions
from lightning_diloco.runtime.sharded_client import ShardedClient, join_job
from lightning_diloco.runtime.shards import shard_dir
from tests.runtime.job_helpers import CONFIG, step, until
from tests.tape_checker import check_run


class ShardedRun:
    """`lightning-diloco syncer --shards S` of one test."""

    def __init__(self, run_dir: Path, num_shards: int, *arguments: str, folder: tuple[str, ...] = ("--run-dir",)) -> None:
        self.run_dir, self.num_shards = run_dir, num_shards
        shards = ("--shards", str(num_shards)) if folder == ("--run-dir",) else ()
        argv = ["syncer", *folder, str(run_dir), *shards, *(arguments or ("--bind", "tcp://127.0.0.1:0"))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_diloco", *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        until(lambda: self.said().get("pid") == self.process.pid or self.process.poll() is not None, 90)
        assert self.process.poll() is None, self.process.communicate()
        self.endpoint = self.said()["endpoint"]

    def said(self, shard: int | None = None) -> dict[str, Any]:
        path = (self.run_dir if shard is None else shard_dir(self.run_dir, shard)) / "syncer.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return {}

    def options(self, learner_id: int, **options: Any) -> ClientOptions:
        return ClientOptions(**{"endpoint": self.endpoint, "config": CONFIG, "learner_id": learner_id} | options)

    def end(self, limit_s: float = 60) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=limit_s)
        return self.process.returncode, err.decode()

    def tape(self, shard: int) -> list[dict[str, Any]]:
        text = (shard_dir(self.run_dir, shard) / "tape.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def num_merges(self, shard: int) -> int:
        return sum(line["event"] == "merge" for line in self.tape(shard))


@contextlib.contextmanager
def sharded_run(run_dir: Path, num_shards: int = 2, *arguments: str, **options: Any) -> Iterator[ShardedRun]:
    run = ShardedRun(run_dir, num_shards, *arguments, **options)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
            run.process.communicate()
        # Without their parent the shards end themselves.
        until(lambda: not any(is_running(run.said(k).get("pid")) for k in range(num_shards)), 10)


def free_ports(count: int) -> int:
    """A free port, with so many free ones from it on."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                for after in range(1, count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + after))
            except (OSError, OverflowError):
                continue
            return port


def is_running(pid: int | None) -> bool:
    return pid is not None and Path(f"/proc/{pid}").exists()


class Learner:
    """One learner, whose steps are paced by the test."""

    def __init__(self, module: nn.Module, options: ClientOptions) -> None:
        self.module = module
        self.client, self.info = join_job(module, options)
        assert isinstance(self.client, ShardedClient)
        self.step_s: list[float] = []
        self._optimizer = torch.optim.SGD(module.parameters(), lr=0.02)

    def train(self, num_steps: int, *, sleep_s: float = 0.002) -> None:
        """Inner steps with their boundaries, 16 tokens each; `step_s` has what each boundary took."""
        for _ in range(num_steps):
            step(self.module, self._optimizer, len(self.step_s))
            time.sleep(sleep_s)
            begun_s = time.monotonic()
            self.client.boundary(tokens=16)
            self.step_s.append(time.monotonic() - begun_s)

    def leave(self, reason: Any = "limit") -> None:
        self.client.leave(reason)
        self.client.weights.load_global()
        self.client.close()


def check_sharded(run_dir: Path, num_shards: int) -> dict[str, Any]:
    """Check every shard against its own tape, and the figures of the whole against theirs, by sums written here; returns the whole."""
    parts = [check_run(shard_dir(run_dir, shard)) for shard in range(num_shards)]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["merges"] == sum(part["merges"] for part in parts)
    assert summary["bytes_up"] == sum(part["bytes_up"] for part in parts)
    assert summary["bytes_down"] == sum(part["bytes_down"] for part in parts)
    fragments = {f["fragment_id"] * num_shards + k: f for k, part in enumerate(parts) for f in part["fragments"]}
    assert [f["fragment_id"] for f in summary["fragments"]] == sorted(fragments)
    assert summary["tokens"] >= max(part["tokens"] for part in parts)
    for whole in summary["fragments"]:
        part = fragments[whole["fragment_id"]]
        assert (whole["version"], whole["num_params"], whole["merged"]) == (part["version"], part["num_params"], part["merged"])
        assert whole["merged"] + whole["pending"] + whole["discarded"] == summary["tokens"]
        assert whole["discarded"] >= part["discarded"]
    total = sum(f["num_params"] for f in summary["fragments"])
    for name in ("merged", "discarded"):
        assert summary[f"tokens_{name}"] == sum(f[name] * f["num_params"] for f in summary["fragments"]) // total
    return summary
