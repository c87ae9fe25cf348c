"""A learner that joins late, in a folder of its own, goes on with a healthy peer's inner optimizer state; over real sockets."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.outer import buffer_of, plan_layout
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import PeerState, PeerStateWanted
from lightning_diloco.runtime.client import LearnerClient
from lightning_diloco.runtime.peer_state import MAX_USELESS, PeerStates, max_state_bytes
from lightning_diloco.runtime.rejoin import InnerState, pack, unpack
from lightning_diloco.strategy.peer_state import PeerStateTaker, missing_states
from lightning_diloco.strategy.rejoin import keep_inner_state
from tests.runtime.job_helpers import CONFIG, Job, make_module, running_job, step, train, until
from tests.runtime.job_raw_peer import RawPeer
from tests.strategy.kit import ROOT, Script, TinyModel, loader, quiet, wait_until

LATE = dataclasses.replace(CONFIG, rejoin_every_steps=8)


def adamw(client: LearnerClient, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(client._module.parameters(), lr=lr)


def states_of(client: LearnerClient, optimizer: torch.optim.Optimizer, fragment_id: int) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in client.weights.parameters_of(fragment_id):
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"0/{name}/{key}"] = value.clone()
    return found


@contextmanager
def old_learner(job: Job, folder=None) -> Iterator[tuple[LearnerClient, dict[int, InnerState]]]:
    """Learner 0, which founds and trains on, and what it has given away so far, by fragment."""
    client, given, stop = job.client(0), dict[int, InnerState](), threading.Event()
    info, optimizer, give = client.join(), adamw(client), client.peers.give

    def noting(wanted, packed) -> None:
        if packed is not None:
            given[wanted.fragment_id] = unpack(buffer_of(packed.clone()))
        give(wanted, packed)

    client.peers.give = noting
    saver = keep_inner_state(client, [optimizer], folder, info, job.config)

    def train_on() -> None:
        while not stop.is_set():
            train(client, 1, optimizer=optimizer)

    thread = threading.Thread(target=train_on)
    thread.start()
    try:
        until(lambda: client.figures.inner_steps > 30)
        yield client, given
    finally:
        stop.set()
        thread.join()
        saver.close(is_done=False)


def young_learner(job: Job, folder=None, **options):
    """Learner 1 in its second life, so that it counts as late, with what it saw at each `took`: fragment, use, own state."""
    client = job.client(1, make_module(1), **options)
    info, optimizer, took = client.join(), adamw(client), client.peers.took
    seen: list[tuple[int, bool, dict[str, torch.Tensor]]] = []

    def noting(*, is_useful: bool) -> None:
        fragment_id = client.peers.arrived.fragment_id
        seen.append((fragment_id, is_useful, states_of(client, optimizer, fragment_id)))
        took(is_useful=is_useful)

    client.peers.took = noting
    saver = keep_inner_state(client, [optimizer], folder, info, job.config)
    return client, optimizer, saver, seen


@contextmanager
def late_job(tmp_path) -> Iterator[Job]:
    tmp_path.mkdir()
    with running_job(tmp_path, "tcp", LATE) as job:
        yield job


def test_a_late_learner_has_the_moments_that_its_peer_has_copied_aside(tmp_path, caplog):
    caplog.set_level("INFO")
    with late_job(tmp_path / "job") as job, old_learner(job) as (_, given):
        client, optimizer, saver, seen = young_learner(job, tmp_path / "mine")
        wanted = [f.fragment_id for f in client.layout.fragments if not f.holds_values]
        assert client.peers.is_asking
        per_boundary, steps = [], 0
        while client.peers.is_asking:
            before, steps = len(seen), steps + 1
            step(client._module, optimizer, 0)
            client.boundary(tokens=16)
            per_boundary.append(len(seen) - before)
            assert steps < 20_000
        train(client, 1, optimizer=optimizer)
        assert [i for i, _, _ in seen] == wanted and all(is_useful for _, is_useful, _ in seen)
        assert max(per_boundary) == 1, "one fragment at a boundary"
        for fragment_id, _, now in seen:
            theirs = given[fragment_id].tensors
            assert now.keys() == theirs.keys() and len(now) == 3 * len(client.weights.parameters_of(fragment_id))
            assert all(torch.equal(now[name], theirs[name]) for name in now)
        assert f"a peer's inner optimizer state of {len(wanted)} of {len(wanted)} fragments" in caplog.text
        saver.close(is_done=False)


def test_files_of_the_run_directory_that_are_fresh_are_enough(tmp_path):
    with late_job(tmp_path / "job") as job, old_learner(job, tmp_path / "job" / "rejoin") as (old, given):
        num_states = sum(not f.holds_values for f in old.layout.fragments)
        until(lambda: len(list((tmp_path / "job" / "rejoin").rglob("*.safetensors"))) == num_states)
        client, _, saver, _ = young_learner(job, tmp_path / "job" / "rejoin")
        assert not client.peers.is_asking and not given
        saver.close(is_done=False)


def test_garbage_of_one_peer_changes_nothing_and_another_one_is_asked(tmp_path):
    with late_job(tmp_path / "job") as job, old_learner(job) as (_, given), RawPeer(job.endpoint, make_module(2), LATE) as raw:
        raw.join(2)
        raw.step(1_000_000, 16_000_000)
        until(lambda: any(m.inner_step == 1_000_000 for m in job.machine.job.members.joined()))
        client, optimizer, saver, seen = young_learner(job)
        wanted = raw.hear(PeerStateWanted)
        header = PeerState(ticket=wanted.ticket, fragment_id=wanted.fragment_id)
        for false in (PeerState(ticket=wanted.ticket + 1, fragment_id=wanted.fragment_id), PeerState(ticket=wanted.ticket, fragment_id=99)):
            assert raw.end_of(raw.offer(false, b"x" * 64)) == "refused"
        too_much = max_state_bytes(client.layout.fragments[wanted.fragment_id]) + 1
        assert raw.end_of(raw.offer(header, b"x" * too_much)) == "refused"
        train(client, 3, optimizer=optimizer)
        assert raw.end_of(raw.offer(header, b"x" * 64)) is None
        until(lambda: client.peers._attempt == 1)
        assert not seen and all(int(state["step"]) == 3 for state in optimizer.state.values())
        until(lambda: client.peers.arrived is not None)
        train(client, 1, optimizer=optimizer)
        assert [(i, is_useful) for i, is_useful, _ in seen] == [(wanted.fragment_id, True)] and wanted.fragment_id in given
        assert job.machine.job.members.by_id(2) is not None, "its session goes on"
        saver.close(is_done=False)


# ---- what is looked at before it is used ----------------------------------------------------------------------------------------


class Alone:
    """A learner without a syncer: what it says is kept, what comes is given to it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        self.layout = plan_layout(self.module, num_fragments=2, merge="rda", mean_patterns=(), include_frozen=False)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.01)
        self.weights = self
        self.said: list = []
        self.now_s = 0.0
        self.peers = PeerStates(self.layout, send=self.said.append, send_payload=lambda *_: 0, wake=lambda: None)

    def parameters_of(self, fragment_id: int):
        return [(part.name, self.module.get_parameter(part.name)) for part in self.layout.fragments[fragment_id].slices]

    def version(self, fragment_id: int) -> Version:
        return Version(0, 40)

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.module(torch.randn(4, 6)).pow(2).mean().backward()
        self.optimizer.step()

    def tick(self) -> None:
        self.now_s += 0.1
        self.peers.tick(self.now_s)

    def state(self, fragment_id: int, **fields) -> InnerState:
        tensors = {
            f"0/{name}/{key}": value.clone() + 1
            for name, parameter in self.parameters_of(fragment_id)
            for key, value in self.optimizer.state[parameter].items()
        }
        standard = {"lineage": "ours", "optimizers": ("AdamW",), "fragment_id": fragment_id, "version": Version(0, 41), "inner_step": 9}
        return InnerState(**{**standard, "tensors": tensors, **fields})

    def moments(self) -> list[torch.Tensor]:
        return [value.clone() for p in self.module.parameters() for value in self.optimizer.state[p].values()]


class Info:
    """A join in the midst of a job."""

    role, job_step, lineage, learner_id = "joiner", 100, "ours", 1


def asking() -> tuple[Alone, PeerStateTaker]:
    alone = Alone()
    missing = {i: Version(0, 30) for i in range(len(alone.layout.fragments))}
    taker = PeerStateTaker(alone, [alone.optimizer], ("AdamW",), Info, missing)
    alone.train()
    alone.tick()
    return alone, taker


def deliver(alone: Alone, taker: PeerStateTaker, data: bytes) -> None:
    fragment_id = alone.said[-1].fragment_id
    alone.peers.take(PeerState(ticket=1, fragment_id=fragment_id), memoryview(bytearray(data)))
    taker.boundary()
    alone.tick()


def packed(state: InnerState) -> bytes:
    return bytes(buffer_of(pack(state)))


def renamed(state: InnerState, old: str, new: str) -> InnerState:
    return dataclasses.replace(state, tensors={name.replace(old, new): value for name, value in state.tensors.items()})


def mapped(state: InnerState, key: str, change) -> InnerState:
    return dataclasses.replace(state, tensors={n: change(v) if n.endswith(f"/{key}") else v for n, v in state.tensors.items()})


HOSTILE = {
    "nothing": lambda a: b"",
    "noise": lambda a: b"\xff" * 300,
    "header beyond the end": lambda a: (1 << 62).to_bytes(8, "little") + b"{}",
    "half": lambda a: packed(a.state(0))[:-5],
    "more": lambda a: packed(a.state(0)) + b"12345678",
    "a bit turned": lambda a: packed(a.state(0))[:-1] + bytes([packed(a.state(0))[-1] ^ 1]),
    "another job's": lambda a: packed(a.state(0, lineage="theirs")),
    "another optimizer's": lambda a: packed(a.state(0, optimizers=("SGD",))),
    "another fragment's": lambda a: packed(a.state(1)),
    "no newer": lambda a: packed(a.state(0, version=Version(0, 30))),
    "no entries": lambda a: packed(a.state(0, tensors={})),
    "too few entries": lambda a: packed(a.state(0, tensors={n: v for n, v in a.state(0).tensors.items() if "step" not in n})),
    "unknown entry": lambda a: packed(renamed(a.state(0), "exp_avg_sq", "z")),
    "unknown parameter": lambda a: packed(renamed(a.state(0), "weight", "height")),
    "unknown optimizer": lambda a: packed(renamed(a.state(0), "0/", "7/")),
    "odd name": lambda a: packed(renamed(a.state(0), "0/", "/")),
    "another shape": lambda a: packed(mapped(a.state(0), "exp_avg", lambda v: v.reshape(-1, 1))),
    "another dtype": lambda a: packed(mapped(a.state(0), "exp_avg", lambda v: v.double())),
    "a number for a tensor": lambda a: packed(a.state(0, numbers={"0/0.weight/step": 3}, tensors={})),
    "negative second moment": lambda a: packed(mapped(a.state(0), "exp_avg_sq", lambda v: v - 100)),
    "negative count": lambda a: packed(mapped(a.state(0), "step", lambda v: v - 100)),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_what_is_no_state_of_this_fragment_changes_nothing(name):
    alone, taker = asking()
    before = alone.moments()
    for useless in range(MAX_USELESS):
        assert [(m.fragment_id, m.attempt) for m in alone.said[-1:]] == [(0, useless)]
        deliver(alone, taker, HOSTILE[name](alone))
    taker.boundary()
    assert all(torch.equal(a, b) for a, b in zip(before, alone.moments(), strict=True))
    assert taker.is_done and not alone.peers.is_asking, "and after three it goes on with what it has"
    alone.train()


def test_what_fits_is_put_in_place_in_the_same_memory_and_what_is_not_finite_begins_at_zero():
    alone, taker = asking()
    places = {id(v) for p in alone.module.parameters() for v in alone.optimizer.state[p].values()}
    for fragment_id in range(2):
        state = mapped(alone.state(fragment_id), "exp_avg", lambda v: v.fill_(float("nan")))
        deliver(alone, taker, packed(state))
    taker.boundary()
    assert taker.is_done and alone.peers.num_taken == 2
    assert places == {id(v) for p in alone.module.parameters() for v in alone.optimizer.state[p].values()}
    for parameter in alone.module.parameters():
        state = alone.optimizer.state[parameter]
        assert int(state["step"]) == 2 and not state["exp_avg"].any() and (state["exp_avg_sq"] >= 1).all()


def test_a_request_without_an_answer_is_said_again_and_then_given_up(caplog):
    caplog.set_level("INFO")
    alone, taker = asking()
    for _ in range(300):
        alone.now_s += 1.0
        alone.tick()
    taker.boundary()
    assert 3 < len(alone.said) < 20 and {m.fragment_id for m in alone.said} == {0}
    assert caplog.text.count("fresh inner optimizer") == 1 and taker.is_done


def test_who_has_a_state_of_its_own_by_then_takes_nothing_any_more():
    alone, taker = asking()
    for _ in range(taker._young_steps):
        taker.boundary()
    before = alone.moments()
    deliver(alone, taker, packed(alone.state(0)))
    assert taker.is_done and all(torch.equal(a, b) for a, b in zip(before, alone.moments(), strict=True))


def test_only_what_is_missing_or_old_is_asked_for():
    alone = Alone()
    say = lambda restored, **info: missing_states(  # noqa: E731
        alone, type("Join", (Info,), info), restored, every_steps=50, sync_interval_steps=25
    )
    assert say({}) == {0: None, 1: None}
    assert say({0: Version(0, 37), 1: Version(0, 36)}) == {1: Version(0, 36)}
    assert say({}, job_step=49) == {} == say({}, role="member")


def test_who_is_asking_itself_or_has_nothing_to_give_says_so_at_once():
    alone, _ = asking()
    sent = []
    alone.peers._send_payload = lambda header, payload: sent.append((header.ticket, len(payload))) or 0
    alone.peers.can_give = True
    alone.peers.heard(PeerStateWanted(ticket=5, fragment_id=0, optimizers=("AdamW",)))
    alone.tick()
    assert sent == [(5, 0)] and alone.peers.next_wanted() is None
    alone.peers.stop()
    alone.peers.heard(PeerStateWanted(ticket=6, fragment_id=99, optimizers=("AdamW",)))
    for ticket in range(7, 30):
        alone.peers.heard(PeerStateWanted(ticket=ticket, fragment_id=0, optimizers=("AdamW",)))
    alone.tick()
    assert sent[1:] == [(6, 0)]
    first = alone.peers.next_wanted()
    assert first.ticket == 7 and alone.peers.next_wanted() is None, "one is on its way at a time"
    alone.peers.give(first, None)
    assert [alone.peers.next_wanted().ticket] == [8]


# ---- in processes ---------------------------------------------------------------------------------------------------------------

OPTIONS = {"sync_interval_steps": 5, "num_fragments": 2, "rejoin_every_steps": 20}
OLD = f"""
import sys
from lightning.pytorch import Trainer
from lightning_diloco import DecoupledDiLoCoStrategy
from tests.strategy.kit import TinyModel, loader, quiet

strategy = DecoupledDiLoCoStrategy(syncer=sys.argv[1], learner_id=0, **{OPTIONS})
Trainer(**quiet(devices=1, max_epochs=-1, strategy=strategy)).fit(TinyModel(0.005, "adamw"), loader())
"""


class Until(Callback):
    """Counts this process's own steps, and stops when it has asked for everything."""

    def __init__(self) -> None:
        self.own_steps = 0
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.own_steps += 1
        (optimizer,) = trainer.optimizers
        self.counts = [int(state["step"]) for state in optimizer.state.values()]
        if not trainer.strategy._outer_sync.client.peers.is_asking or self.own_steps > 2000:
            trainer.should_stop = True


@pytest.mark.slow
@pytest.mark.process
def test_a_late_learner_by_hand_goes_on_with_the_state_of_one_without_a_run_directory(tmp_path, caplog):
    caplog.set_level("INFO")
    run_dir = tmp_path / "syncer"
    command = [sys.executable, "-m", "lightning_diloco", "syncer", "--bind", "tcp://127.0.0.1:0", "--run-dir", str(run_dir)]
    with (tmp_path / "syncer.txt").open("wb") as file:
        syncer = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    old = Script(tmp_path, OLD)
    try:
        wait_until((run_dir / "syncer.json").exists, "the syncer's address")
        endpoint = json.loads((run_dir / "syncer.json").read_text())["endpoint"]
        old.start(endpoint)
        tape = run_dir / "tape.jsonl"
        wait_until(lambda: tape.read_text().count('"event":"merge"') >= 20, "some merges", script=old)
        late, strategy = Until(), DecoupledDiLoCoStrategy(syncer=endpoint, run_dir=tmp_path / "mine", **OPTIONS)
        trainer = Trainer(**quiet(devices=1, max_epochs=-1, strategy=strategy, callbacks=[late]))
        trainer.fit(TinyModel(0.005, "adamw"), loader())
        assert "goes on with a peer's inner optimizer state of 2 of 2 fragments" in caplog.text
        assert len(late.counts) == 4 and all(count >= late.own_steps + 20 for count in late.counts), (late.counts, late.own_steps)
    finally:
        old.close()
        syncer.terminate()
        try:
            syncer.wait(20)
        except subprocess.TimeoutExpired:
            syncer.kill()
            syncer.wait()
