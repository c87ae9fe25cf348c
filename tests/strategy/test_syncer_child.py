"""The syncer's process as its supervisor looks after it: noticed when it stands still, killed, started again, given up.

Most tests have a stand-in for it, which starts faster (`stand_in_syncer`).
"""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from lightning_diloco.cli import syncer as syncer_command
from lightning_diloco.errors import SyncerUnavailableError
from lightning_diloco.runtime import life_signs
from lightning_diloco.runtime.children import child_environment, start_child
from lightning_diloco.runtime.life_signs import give_sign, read_signs
from lightning_diloco.strategy import syncer_child
from lightning_diloco.strategy.awake_clock import AwakeClock
from lightning_diloco.strategy.syncer_child import SyncerChild
from tests.strategy.kit import ROOT, wait_until

pytestmark = pytest.mark.process
HANG_S = 1.0


@pytest.fixture
def make(tmp_path):
    """Makes what looks after a syncer, which is not yet started."""
    made = []
    (tmp_path / "signs").mkdir()
    environment = {**child_environment(1), "PYTHONPATH": str(ROOT)}

    def make(hang_timeout_s: float | None = HANG_S) -> SyncerChild:
        hello = {"token": "", "num_slots": 1}
        made.append(SyncerChild(tmp_path / "run", hello, environment, 3, tmp_path / "signs", hang_timeout_s))
        return made[-1]

    yield make
    for child in (child.child for child in made if child.child is not None):
        child.signal_group(signal.SIGKILL)
        wait_until(lambda child=child: child.poll() is not None, "its end")


def start_stand_in(module: str, arguments: list[str], **kwargs):
    return start_child("tests.strategy.stand_in_syncer", arguments, **kwargs)


def start_stopped(module: str, arguments: list[str], **kwargs):
    """One that stands still before it has done anything."""
    child = start_stand_in(module, arguments, **kwargs)
    os.kill(child.pid, signal.SIGSTOP)
    return child


@pytest.fixture
def start(make, monkeypatch):
    """Starts a stand-in, and waits until it serves."""

    def start(hang_timeout_s: float | None = HANG_S) -> SyncerChild:
        monkeypatch.setattr(syncer_child, "start_child", start_stand_in)
        child = make(hang_timeout_s)
        child.start()
        await_ready(child)
        return child

    return start


def await_ready(child: SyncerChild, restarts: int = 0) -> None:
    def is_ready() -> bool:
        child.look_after()
        return child.restarts >= restarts and child._is_ready

    wait_until(is_ready, "it serves")
    assert child.restarts == restarts


def look_for(child: SyncerChild, seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        child.look_after()
        time.sleep(0.02)


def stop(child: SyncerChild) -> None:
    os.kill(child.child.pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(child), "it stands still")


def is_stopped(child: SyncerChild) -> bool:
    return psutil.Process(child.child.pid).status() == psutil.STATUS_STOPPED


def never() -> bool:
    return False


@pytest.mark.slow
def test_a_syncer_with_nothing_to_do_does_not_hang_and_one_that_is_stopped_does(make, caplog):
    child = make()
    child.start()
    await_ready(child)
    look_for(child, 3 * HANG_S)
    assert child.restarts == 0
    stop(child)
    await_ready(child, restarts=1)
    assert (
        "the syncer hangs: its loop has not turned, and has used less than 1 % of a core, for 1 s (hang_timeout_s, at most" in caplog.text
    )
    assert "the syncer was ended by SIGKILL; restart 1 of at most 3" in caplog.text
    look_for(child, 2 * HANG_S)
    child.finish("finished", never)
    assert child.restarts == 1 and child.child.poll().code == 0


def test_one_that_hangs_is_killed_and_started_again_each_time(start, tmp_path):
    child = start()
    for restarts in (1, 2):
        stop(child)
        await_ready(child, restarts=restarts)
    assert {path.name for path in (tmp_path / "signs").iterdir()} == {f"signs_syncer_{n}.bin" for n in (1, 2, 3)}


def test_nobody_looks_whether_it_hangs_without_a_timeout(start, tmp_path):
    child = start(None)
    stop(child)
    look_for(child, 2 * HANG_S)
    assert child.restarts == 0 and child.child.poll() is None and not list((tmp_path / "signs").iterdir())


def test_it_is_noticed_after_five_minutes_however_long_learners_may_be_silent(start):
    assert start(7200.0)._watch.timeout_s == 300.0


def test_silence_of_one_that_has_never_given_a_sign_says_nothing(start, monkeypatch):
    """Neither of two disks has taken its file."""
    monkeypatch.setattr(syncer_child, "read_signs", lambda path: 0)
    child = start()
    stop(child)
    look_for(child, 2 * HANG_S)
    assert child.restarts == 0 and child.child.poll() is None


def test_signs_begin_where_a_disk_takes_them_and_the_log_says_if_none_does(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(life_signs, "_words", None)
    spare = tmp_path / "spare"
    hello = {"signs_path": str(tmp_path / "not_there" / "signs"), "spare_dir": str(spare)}
    syncer_command._begin_signs(hello)
    assert life_signs._words is None and "not_there/signs: its disk takes no file" in caplog.text
    spare.mkdir()
    syncer_command._begin_signs(hello)
    give_sign()
    assert read_signs(spare / "signs") == 2


def test_one_that_was_started_again_and_does_not_begin_to_serve_is_killed_and_started_again(start, caplog, monkeypatch):
    child = start()
    first = child.child
    first.signal_group(signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(syncer_child, "_START_S", 0.1)
        patch.setattr(syncer_child, "start_child", start_stopped)
        wait_until(lambda: child.look_after() or child.child is not first, "it is started again")
    await_ready(child, restarts=2)
    assert "the syncer was started again and did not begin to serve in time: it is killed" in caplog.text


class Hurried(AwakeClock):
    """Goes ten seconds further at each look while the syncer is a stopped process."""

    def __init__(self, child: SyncerChild) -> None:
        super().__init__()
        self.child, self.ahead_s = child, 0.0

    def now_s(self) -> float:
        self.ahead_s += 10.0 if is_stopped(self.child) else 0.0
        return super().now_s() + self.ahead_s


def test_one_that_does_not_end_after_the_learners_is_killed_and_another_one_ends_the_job(start, caplog):
    child = start(None)
    child._clock = Hurried(child)
    stop(child)
    child.finish("finished", never)
    assert child.restarts == 1 and child.child.poll().code == 0
    assert "the syncer was told to end the job and has not for 300 s, so that another one is to do it from the newest" in caplog.text


def test_one_that_was_killed_meanwhile_and_does_not_end_then_is_killed_too(start, monkeypatch):
    child = start(None)
    child._clock = Hurried(child)
    child.child.signal_group(signal.SIGKILL)
    starts = iter([start_stopped, start_stand_in])
    monkeypatch.setattr(syncer_child, "start_child", lambda *args, **kwargs: next(starts)(*args, **kwargs))
    child.finish("finished", never)
    assert child.restarts == 2 and child.child.poll().code == 0


def test_the_second_one_that_does_not_end_is_given_up_with_what_can_be_done(start, monkeypatch):
    child = start(None)
    child._clock = Hurried(child)
    stop(child)
    monkeypatch.setattr(syncer_child, "start_child", start_stopped)
    with pytest.raises(
        SyncerUnavailableError, match=r"did not end .*syncer\.log.*lightning-diloco export .*/run OUT\.ckpt.* --resume .*/run "
    ):
        child.finish("finished", never)
    assert child.restarts == 1


def test_one_that_does_not_end_when_the_job_is_given_up_is_not_started_again(start):
    child = start(None)
    child._clock = Hurried(child)
    stop(child)
    child.finish("failed", never)
    assert child.restarts == 0 and child.child.poll() is None


def test_time_in_which_nobody_looked_is_no_patience_with_a_start(start):
    """The supervisor was stopped, and the syncer with it."""
    told_s = [0.0]
    child = start()
    child._clock = AwakeClock(lambda: told_s[0])
    child._is_ready, child._deadline_s = False, 60.0
    child.ready_path.unlink()
    for told_s[0] in (7200.0, 14400.0):
        child.look_after()
    assert child._deadline_s == 60.0 and child.child.poll() is None


def test_the_clock_stands_still_while_nobody_looks():
    told_s = [100.0]
    clock = AwakeClock(lambda: told_s[0])
    passed = []
    for told_s[0] in (100.05, 100.1, 4000.1, 4000.2):
        passed.append(round(clock.now_s(), 6))
    assert passed == [0.05, 0.1, 1.1, 1.2]
