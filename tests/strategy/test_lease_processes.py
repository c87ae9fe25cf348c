"""`data="lease"` with learners as processes: no sample is lost, and the ledger says which were trained twice. Runs of seconds.

Samples are in their own order (but where a test says otherwise), so a sample's number is its position in the ledger.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_diloco import DecoupledDiLoCoStrategy
from tests.strategy.kit import ROOT, latest, quiet, wait_until
from tests.strategy.lease_kit import Recorder, numbered, recorded, times_of
from tests.tape_checker import check_run, load_tape

pytestmark = [pytest.mark.process, pytest.mark.slow]

FAST = {"num_fragments": 2, "sync_interval_steps": 8, "outer_momentum": 0.3, "outer_lr": 0.5}
N = 301


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(model: Recorder, *, epochs: int = 1, sync: dict[str, Any] | None = None, **loader: Any) -> dict[str, Any]:
    """Two learners; returns the summary, which was checked against the tape."""
    strategy = DecoupledDiLoCoStrategy(data="lease", **{**FAST, **(sync or {})})
    Trainer(**quiet(devices=2, max_epochs=epochs, strategy=strategy)).fit(model, numbered(N, **loader))
    return check_run(latest(Path.cwd()))


@pytest.mark.parametrize(("num_workers", "drop_last", "shuffle"), [(0, False, True), (2, False, False), (0, True, False), (2, True, True)])
def test_two_learners_share_an_epoch_and_the_fast_one_takes_more(tmp_path, num_workers, drop_last, shuffle):
    model = Recorder(tmp_path, count=2, slow=(0.02, 0.08))
    summary = fit(model, num_workers=num_workers, drop_last=drop_last, shuffle=shuffle)
    times = times_of(tmp_path)
    (account,) = summary["leases"]
    assert set(times.values()) == {1}, "no sample was trained twice"
    assert len(times) == account["done"] >= N - (N % 4 if drop_last else 0)
    assert (account["free"], account["outstanding"], account["twice"]) == (N - len(times), 0, 0)
    fast, slow = (sum(len(line["samples"]) for line in lines) for lines in recorded(tmp_path))
    assert fast > slow > 0
    assert [x["samples"] for x in summary["learners"]] == [fast, slow]
    order = [i for line in recorded(tmp_path)[0] for i in line["samples"]]
    assert (order == sorted(order)) == (not shuffle)


class Killed(Recorder):
    """Learner 1 is killed in its first life, after a batch that it has told nobody of."""

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        place = self.trainer.strategy.assignment
        if place.learner_id == 1 and place.life == 0 and batch_idx == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_learner_had_not_reported_is_trained_again_and_the_ledger_names_it(tmp_path):
    model = Killed(tmp_path, count=2, slow=(0.1, 0.02))
    summary = fit(model, epochs=2, sync={"heartbeat_s": 60.0})
    assert summary["restarts"]["learners"] == 1
    times = times_of(tmp_path)
    assert set(times) == set(range(N))
    twice = {i for x in summary["leases"] for a, b in x["twice_ranges"] for i in range(a, b)}
    assert {i for i, n in times.items() if n > 2} == twice
    assert sum(times.values()) - 2 * N == sum(x["twice"] for x in summary["leases"]) > 0
    assert [(x["done"], x["free"], x["outstanding"], x["unsure"]) for x in summary["leases"]] == [(N, 0, 0, 0)] * 2


class SyncerKiller(Recorder):
    """Learner 0 kills the syncer once; nobody is through before another one serves."""

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        place = self.trainer.strategy.assignment
        if place.learner_id == 0 and self.trainer.current_epoch == 0 and batch_idx == 12:
            os.kill(json.loads((place.run_dir / "syncer.json").read_text())["pid"], signal.SIGKILL)
            (place.run_dir / "killed").touch()
        end_s = time.monotonic() + 90
        while (place.run_dir / "killed").exists() and batch_idx == 40 and time.monotonic() < end_s:
            if any(e["event"] == "restart" for e in load_tape(place.run_dir / "tape.jsonl")):
                break
            time.sleep(0.1)


def test_a_syncer_that_is_killed_goes_on_with_the_ledger_and_learners_do_not_stop_for_it(tmp_path):
    model = SyncerKiller(tmp_path, count=2, slow=(0.02, 0.05))
    summary = fit(model, epochs=2, sync={"heartbeat_s": 0.2})
    assert summary["restarts"] == {"learners": 0, "syncer": 1}
    times = times_of(tmp_path)
    assert set(times) == set(range(N))
    assert [(x["done"], x["free"], x["outstanding"]) for x in summary["leases"]] == [(N, 0, 0)] * 2
    # While there was no syncer they went on with samples that they had had, and the ledger counts these apart.
    again = sum(x["again"] for x in summary["leases"])
    assert sum(times.values()) - 2 * N == again + sum(x["twice"] for x in summary["leases"])
    assert again > 0 and sum(x["twice"] for x in summary["leases"]) == 0


ISLAND = """
import sys
from pathlib import Path
from lightning.pytorch import Trainer
from lightning_diloco import DecoupledDiLoCoStrategy
from tests.strategy.lease_kit import Recorder, numbered

class Island(Recorder):
    @property
    def learner_id(self):
        return self.trainer.strategy.learner_id

learner_id = int(sys.argv[2])
strategy = DecoupledDiLoCoStrategy(syncer=sys.argv[1], learner_id=learner_id, data="lease", num_fragments=2, sync_interval_steps=8)
trainer = Trainer(accelerator="cpu", strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False)
trainer.fit(Island(Path(sys.argv[3]), count=2, slow=(0.02, 0.06)), numbered(301, batch_size=(4, 3)[learner_id], shuffle=True))
"""


def test_learners_of_a_syncer_by_hand_share_an_epoch_with_batches_of_different_sizes(tmp_path):
    """The progress bar is on, as it is by default: it has no total to show."""
    script = tmp_path / "island.py"
    script.write_text(ISLAND)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "stdout": subprocess.DEVNULL}
    command = [sys.executable, "-m", "lightning_diloco", "syncer", "--run-dir", str(tmp_path / "run")]
    processes = [subprocess.Popen(command, **options)]
    try:
        wait_until((tmp_path / "run" / "syncer.json").exists, "the syncer's address")
        endpoint = json.loads((tmp_path / "run" / "syncer.json").read_text())["endpoint"]
        processes += [subprocess.Popen([sys.executable, str(script), endpoint, str(i), str(tmp_path)], **options) for i in range(2)]
        assert [process.wait(150) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    summary = check_run(tmp_path / "run")
    assert set(times_of(tmp_path).values()) == {1} and len(times_of(tmp_path)) == N
    assert [(x["done"], x["free"], x["twice"]) for x in summary["leases"]] == [(N, 0, 0)]
    assert {len(line["samples"]) for line in recorded(tmp_path)[1]} >= {3}
