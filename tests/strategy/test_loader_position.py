"""A learner that was killed goes on in its training data where its last life was, if its loaders can tell where that is."""

from __future__ import annotations

import json
import os
import signal
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import Dataset, DistributedSampler

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.runtime.client_options import JoinInfo
from lightning_diloco.strategy.loader_position import LoaderPosition
from tests.strategy.kit import TinyModel, latest, quiet

FAST = {"num_fragments": 2, "sync_interval_steps": 4, "heartbeat_s": 0.2, "rejoin_every_steps": 4}
END = 12
"""Batch at which learner 1 is killed in its first life."""


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Numbers:
    """Batches that are numbered; it can be resumed. Like loaders that are not ours it is no DataLoader."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.at = 0

    def __iter__(self):
        while self.at < self.length:
            self.at += 1
            yield [torch.full((2, 8), float(self.at - 1))]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state) -> None:
        self.at = state["at"]


class Sized(Numbers):
    def __len__(self) -> int:
        return self.length


class Secretive(Numbers):
    """Its state is an object of its own class, which plain data are not."""

    def state_dict(self):
        return {"at": self.at, "self": self}


class Numbered(Dataset):
    def __len__(self) -> int:
        return 8192

    def __getitem__(self, index: int):
        return (torch.full((8,), float(index)),)


class Killed(TinyModel):
    """Learner 1 notes what it trains on, and is killed once; learner 0 waits until it is back and has trained on."""

    def training_step(self, batch, batch_idx):
        place, noted = self.trainer.strategy.assignment, self.trainer.strategy.assignment.run_dir
        if place.learner_id == 0:
            back, end_s = noted / "seen_1.jsonl", time.monotonic() + 60
            while batch_idx == 20 and time.monotonic() < end_s and not (back.exists() and len(back.read_text().splitlines()) > 8):
                time.sleep(0.05)
        else:
            if place.life == 0 and batch_idx == END:
                # Whatever was due has been written by then.
                time.sleep(1.0)
                os.kill(os.getpid(), signal.SIGKILL)
            with (noted / f"seen_{place.life}.jsonl").open("a") as file:
                file.write(json.dumps([int(row[0]) for row in batch[0]]) + "\n")
        time.sleep(0.02)
        return super().training_step([batch[0] / 1e4], batch_idx)


def seen_by_both_lives(tmp_path, loader) -> list[list[list[int]]]:
    """Batches of learner 1, by life."""
    trainer = Trainer(**quiet(devices=2, max_steps=80, strategy=DecoupledDiLoCoStrategy(**FAST)))
    trainer.fit(Killed(), loader)
    return [[json.loads(line) for line in (latest(tmp_path) / f"seen_{life}.jsonl").read_text().splitlines()] for life in (0, 1)]


@pytest.mark.process
@pytest.mark.parametrize("loader", [Numbers(5000), pytest.param(Sized(5000), marks=pytest.mark.slow)], ids=["unsized", "sized"])
def test_what_was_fetched_and_not_trained_comes_again_and_nothing_is_passed_over(tmp_path, loader):
    first, second = seen_by_both_lives(tmp_path, loader)
    assert first == [[k, k] for k in range(END)]
    start = second[0][0]
    # A position is read every four steps; where a batch is fetched ahead, that of the step is complete one batch later.
    assert start == END and second == [[k, k] for k in range(start, start + len(second))]


@pytest.mark.slow
@pytest.mark.process
def test_a_state_that_is_no_plain_data_is_named_and_the_data_begin_anew(tmp_path):
    first, second = seen_by_both_lives(tmp_path, Secretive(5000))
    assert first[0] == second[0] == [0, 0]
    log = (latest(tmp_path) / "logs" / "learner_1.log").read_text()
    assert log.count("The position in the training data is not saved") == 2, "once in each life"


def position(folder, loader, *, length: float = 8) -> tuple[LoaderPosition, SimpleNamespace]:
    """A callback that has joined, and the little of a Trainer that it asks for."""
    info = JoinInfo(learner_id=1, incarnation=1, role="joiner", job_step=0, lineage="ours")
    clock = SimpleNamespace(begun=[], begin_at=lambda batches: clock.begun.append(batches))
    loop = SimpleNamespace(_should_accumulate=lambda: False, _data_fetcher=None, _combined_loader=SimpleNamespace(flattened=[loader]))
    loop.is_resuming, loop.epoch_loop = True, SimpleNamespace(restarting=False)
    trainer = SimpleNamespace(
        fit_loop=loop,
        num_training_batches=length,
        current_epoch=0,
        distributed_sampler_kwargs={"rank": 1, "num_replicas": 2},
        strategy=SimpleNamespace(assignment=SimpleNamespace(rejoin_path=lambda: folder)),
    )
    return LoaderPosition(SimpleNamespace(info=info, clock=clock, is_done=False), every_steps=4), trainer


def train_on(callback: LoaderPosition, trainer, batches: int) -> None:
    (loader,) = trainer.fit_loop._combined_loader.flattened
    callback.on_train_start(trainer, None)
    for batch_idx, _ in zip(range(batches), loader, strict=False):
        callback.on_train_batch_end(trainer, None, None, None, batch_idx)
        while callback._is_busy:
            time.sleep(0.001)
    callback.on_exception(trainer, None, KeyboardInterrupt())


@pytest.mark.parametrize(("trained", "found"), [(3, None), (4, 4), (7, 4), (8, 4)])
def test_a_position_is_saved_every_so_many_steps_and_not_at_the_end_of_an_epoch(tmp_path, trained, found):
    train_on(*position(tmp_path, Numbers(8)), trained)
    callback, trainer = position(tmp_path, again := Numbers(8))
    callback.on_train_start(trainer, None)
    assert callback._sync.clock.begun == ([] if found is None else [found]) and again.at == (found or 0)


@pytest.mark.parametrize("other", [{"current_epoch": 1}, {"distributed_sampler_kwargs": {"rank": 1, "num_replicas": 3}}])
def test_a_position_of_another_epoch_or_share_is_none(tmp_path, other):
    train_on(*position(tmp_path, Numbers(8)), 5)
    callback, trainer = position(tmp_path, again := Numbers(8))
    vars(trainer).update(other)
    callback.on_train_start(trainer, None)
    assert callback._sync.clock.begun == [] and again.at == 0


def test_a_damaged_file_and_a_loader_that_refuses_cost_a_warning(tmp_path, caplog):
    train_on(*position(tmp_path, Numbers(8)), 5)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for cut in range(0, len(whole), 7):
        file.write_bytes(whole[:cut] + bytes([whole[cut] ^ 255]) + whole[cut + 1 :])
        callback, trainer = position(tmp_path, again := Numbers(8))
        callback.on_train_start(trainer, None)
        assert again.at in (0, 4), "what is read is a position or none"
    assert "The training data begin anew" in caplog.text
    file.write_bytes(whole)
    callback, trainer = position(tmp_path, again := Numbers(8))
    again.load_state_dict = lambda state: 1 / 0
    callback.on_train_start(trainer, None)
    assert "does not take its position back (ZeroDivisionError" in caplog.text


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.extras
@pytest.mark.skipif(find_spec("torchdata") is None, reason="torchdata is not installed; `make extras` brings it")
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_goes_on_in_the_middle_of_a_shuffled_epoch(tmp_path, workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    first, second = seen_by_both_lives(tmp_path, StatefulDataLoader(Numbered(), batch_size=2, shuffle=True, num_workers=workers))
    flat = [i for batch in first + second for i in batch]
    share = list(DistributedSampler(Numbered(), num_replicas=2, rank=1, shuffle=True))
    assert len(first) == END < len(first + second) and flat == share[: len(flat)]
