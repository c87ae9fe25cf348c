"""When a process counts as hung, on real processes; the watch is told the time, so that nobody waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_diloco import DecoupledDiLoCoStrategy, SyncConfig
from lightning_diloco.errors import SyncerUnavailableError
from lightning_diloco.runtime import life_signs
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from lightning_diloco.runtime.life_signs import begin_signs, give_sign, read_signs
from lightning_diloco.strategy.hang_watch import HangWatch, cpu_s
from tests.strategy.kit import ROOT, TinyModel, loader, quiet, wait_until

pytestmark = pytest.mark.process

SLEEPS = "import time; print(flush=True); time.sleep(600)"
SPINS = "print(flush=True)\nwhile True: pass"
POLLS = "import time; print(flush=True)\nwhile True: time.sleep(0.05)"
HAS_A_SPINNING_THREAD = (
    "import threading, time\ndef spin():\n    while True: pass\n"
    "threading.Thread(target=spin, daemon=True).start(); print(flush=True); time.sleep(600)"
)
HAS_A_SPINNING_CHILD = (
    "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'while True: pass'], start_new_session=True)\n"
    "print(child.pid, flush=True); child.wait(); print('reaped', flush=True); import time; time.sleep(600)"
)
GIVES_SIGNS = (
    "import sys, time; from pathlib import Path; from lightning_diloco.runtime.life_signs import begin_signs, give_sign\n"
    "begin_signs(Path(sys.argv[1])); print(flush=True)\nwhile True: give_sign(); time.sleep(0.01)"
)


@pytest.fixture
def start(tmp_path):
    """Starts a program and waits for its first line."""
    started = []

    def start(code: str) -> subprocess.Popen:
        arguments = [sys.executable, "-c", code, str(tmp_path / "signs")]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        started.append(process)
        process.first_line = process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


class Watch(HangWatch):
    """One with a place for the time that it was told last."""

    told_s = 0.0


def is_hung_within(watch: Watch, told_s: float, *, look_s: float = 0.1, real_s: float = 0.0) -> bool:
    """Look again and again in so much told time; between two looks so much real time passes."""
    for _ in range(round(told_s / look_s)):
        time.sleep(real_s)
        watch.told_s += look_s
        if watch.is_hung(watch.told_s):
            return True
    return False


def watch(process: subprocess.Popen, tmp_path, timeout_s: float = 2.0) -> Watch:
    return Watch(process.pid, tmp_path / "signs", timeout_s, 0.0)


def await_work(process: subprocess.Popen) -> None:
    """Wait until it has used the CPU for more than a hundredth of the timeout, however busy the machine is."""
    used_s = cpu_s(process.pid)
    wait_until(lambda: cpu_s(process.pid) >= used_s + 0.05, "it has worked")


def is_hung_at_work(watch: Watch, process: subprocess.Popen) -> bool:
    """Three times, for most of a timeout of 2 s, with work between."""
    for _ in range(3):
        if is_hung_within(watch, 1.5):
            return True
        await_work(process)
    return False


@pytest.mark.parametrize("code", [SLEEPS, POLLS, HAS_A_SPINNING_THREAD], ids=["sleeps", "polls", "spinning_thread"])
def test_a_process_whose_main_thread_does_nothing_hangs(start, tmp_path, code):
    assert is_hung_within(watch(start(code), tmp_path), 4.0, real_s=0.005)


def test_it_does_not_hang_before_the_timeout(start, tmp_path):
    watched = watch(start(SLEEPS), tmp_path)
    assert not is_hung_within(watched, 1.9)
    assert is_hung_within(watched, 2.0)


def test_a_stopped_process_hangs_and_does_not_when_it_goes_on(start, tmp_path):
    process = start(SPINS)
    watched = watch(process, tmp_path)
    assert not is_hung_at_work(watched, process)
    process.send_signal(signal.SIGSTOP)
    assert not is_hung_within(watched, 1.5)
    process.send_signal(signal.SIGCONT)
    await_work(process)
    assert not is_hung_within(watched, 1.5)
    process.send_signal(signal.SIGSTOP)
    assert is_hung_within(watched, 4.0)


def test_a_process_that_waits_for_one_at_work_does_not_hang_until_that_ends(start, tmp_path):
    process = start(HAS_A_SPINNING_CHILD)
    watched = watch(process, tmp_path)
    assert not is_hung_at_work(watched, process)
    os.kill(int(process.first_line), signal.SIGKILL)
    assert process.stdout.readline() == "reaped\n"
    assert is_hung_within(watched, 5.0)


def test_signs_of_life_are_enough_without_any_cpu(start, tmp_path):
    process = start(GIVES_SIGNS)
    watched = watch(process, tmp_path, timeout_s=600.0)
    # In 60 looks it uses less of the CPU than 6 s.
    assert not is_hung_within(watched, 1800.0, look_s=30.0, real_s=0.06)
    process.send_signal(signal.SIGSTOP)
    assert is_hung_within(watched, 1800.0, look_s=30.0)


def test_time_in_which_nobody_looked_does_not_count(start, tmp_path):
    """The supervisor was stopped, and the learner with it."""
    watched = watch(start(SLEEPS), tmp_path, timeout_s=100.0)
    assert not watched.is_hung(50.0)
    assert not watched.is_hung(5000.0)
    assert not watched.is_hung(5100.0)


def test_a_process_that_has_ended_does_not_hang(start, tmp_path):
    process = start(SLEEPS)
    process.kill()
    process.wait()
    assert not is_hung_within(watch(process, tmp_path), 4.0)
    assert cpu_s(process.pid) is None


@pytest.fixture
def signs(tmp_path, monkeypatch):
    """This process gives signs, for the length of a test."""
    monkeypatch.setattr(life_signs, "_words", None)
    begin_signs(tmp_path / "own")
    return tmp_path / "own"


def test_signs_can_be_read_and_a_missing_file_has_none(signs, tmp_path):
    assert (read_signs(signs), read_signs(tmp_path / "none")) == (0, 0)
    for _ in range(300):
        give_sign()
    assert read_signs(signs) == 300


def test_a_process_that_nobody_watches_gives_no_sign(monkeypatch):
    monkeypatch.setattr(life_signs, "_words", None)
    give_sign()
    assert life_signs._words is None


def test_batches_of_training_validation_and_sanity_check_are_signs(signs, tmp_path):
    class Notes(TinyModel):
        seen = ()

        def training_step(self, batch, batch_idx):
            self.seen += (read_signs(signs),)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.seen += (read_signs(signs),)
            return super().validation_step(batch, batch_idx)

    model = Notes()
    strategy = DecoupledDiLoCoStrategy(launch="inline", run_dir=tmp_path / "run")
    Trainer(**quiet(devices=1, max_steps=4, strategy=strategy)).fit(model, loader(16), loader(8, seed=1))
    assert len(model.seen) >= 2 + 4 + 2
    assert all(before < after for before, after in zip(model.seen, model.seen[1:], strict=False))


def test_who_waits_to_join_gives_signs(signs):
    client = LearnerClient(torch.nn.Linear(2, 2), ClientOptions(endpoint="tcp://127.0.0.1:9", config=SyncConfig(), join_timeout_s=0.5))
    with pytest.raises(SyncerUnavailableError):
        client.join()
    wait_until(lambda: not any(thread.name == "diloco-client" for thread in threading.enumerate()), "its thread ends")
    assert read_signs(signs) >= 5
