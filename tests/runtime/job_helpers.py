"""A whole job without Lightning: a syncer's service on a thread, learners with toy modules, and the run's last word."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import zmq
from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.protocol.records import RunRecord
from lightning_diloco.runtime.client import ClientOptions, JoinInfo, LearnerClient
from lightning_diloco.runtime.service import ServiceOptions, SyncerService
from lightning_diloco.runtime.summary import SummaryKeeper
from lightning_diloco.runtime.tape import TAPE_NAME, append_run_record
from tests.tape_checker import check_run

CONFIG = SyncConfig(num_fragments=4, sync_interval_steps=4, heartbeat_s=0.2, drain_timeout_s=8.0)
"""Small and quick: a round every inner step."""


def make_module(seed: int = 0, width: int = 12) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.01)


class Job:
    """One syncer on a thread of this process, and the learners that a test makes for it."""

    def __init__(self, run_dir: Path, kind: str = "inproc", config: SyncConfig = CONFIG, **options: Any) -> None:
        self.config = config
        self.run_dir = run_dir
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        bind = f"inproc://{secrets.token_hex(8)}" if kind == "inproc" else "tcp://127.0.0.1:0"
        self.service = SyncerService(ServiceOptions(run_dir=run_dir, bind=bind, **{"supervised": True, **options}), self.context)
        self.endpoint = self.service.start()
        self.clients: list[LearnerClient] = []

    @property
    def machine(self) -> Any:
        return self.service._machine

    def client(self, learner_id: int | None, module: nn.Module | None = None, **options: Any) -> LearnerClient:
        fields = {"endpoint": self.endpoint, "config": self.config, "counters_path": self.run_dir / "counters"}
        client = LearnerClient(
            make_module(learner_id or 0) if module is None else module,
            ClientOptions(learner_id=learner_id, **(fields | options)),
            context=self.context,
        )
        self.clients.append(client)
        return client

    def finish(self, status: Any = "finished") -> dict[str, Any]:
        """End the job, write the last word, and check the run against the tape."""
        self.service.finish(status)
        assert self.service.join(20), "the syncer did not end"
        assert self.service.error is None
        return sum_up(self.run_dir, status)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        if not self.service.join(0):
            self.service.finish("failed")
            self.service.join(20)
        self.context.destroy(linger=0)


def sum_up(run_dir: Path, status: Any) -> dict[str, Any]:
    """What a supervisor does at the end, and the independent check."""
    append_run_record(run_dir / TAPE_NAME, RunRecord(status=status, startup_s=0.0, restarts={"learners": 0, "syncer": 0}, val=None))
    SummaryKeeper(run_dir).finish()
    return check_run(run_dir)


@contextmanager
def running_job(run_dir: Path, kind: str = "inproc", config: SyncConfig = CONFIG, **options: Any) -> Iterator[Job]:
    job = Job(run_dir, kind, config, **options)
    try:
        yield job
    finally:
        job.close()


def step(module: nn.Module, optimizer: torch.optim.Optimizer, inner_step: int) -> None:
    """One inner step on data that depends on its number alone."""
    generator = torch.Generator().manual_seed(inner_step)
    x = torch.randn(16, 8, generator=generator).to(next(module.parameters()).device)
    optimizer.zero_grad()
    (module(x) - x[:, :2]).pow(2).mean().backward()
    optimizer.step()


def train(client: LearnerClient, num_steps: int, *, sleep_s: float = 0.002, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Inner steps with their boundaries, 16 tokens each."""
    module = client._module
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=0.02)
    for inner_step in range(num_steps):
        step(module, optimizer, inner_step)
        time.sleep(sleep_s)
        client.boundary(tokens=16)


def poison(client: Any, module: nn.Module, healed: list[int]) -> int:
    """Fill a learner's parameters with NaN; pass boundaries until `healed` has an entry more. Returns the number before."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(math.nan)
    client.boundary(tokens=16)
    count = len(healed)
    for _ in range(400):
        if len(healed) > count:
            break
        time.sleep(0.002)
        client.boundary(tokens=0)
    return count


class Background:
    """Runs a function on a thread; `result` waits and raises what it raised.

    A test that fails before it has told the function to end is reported for the thread it leaves; the interpreter does not wait for it.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="test-learner", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self, timeout_s: float = 60.0) -> Any:
        self._thread.join(timeout_s)
        assert self.is_done, "it did not end in time"
        if self._error is not None:
            raise self._error
        return self._value


def whole_life(client: LearnerClient, num_steps: int, *, sleep_s: float = 0.002) -> JoinInfo:
    """Join, train, leave, hold the global model, close."""
    info = client.join()
    train(client, num_steps, sleep_s=sleep_s)
    client.leave("limit")
    client.weights.load_global()
    client.close()
    return info
