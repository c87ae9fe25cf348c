"""The mapped counters outlive their process and are never torn."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_diloco.runtime.counters import CounterFile, CounterFileError, Counters, read_counters

ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "learner_0.abc.bin"


def test_totals_are_read_back_while_the_writer_lives_and_after_it(path: Path):
    file = CounterFile(path)
    assert read_counters(path) == Counters(None, 0, 0)
    file.set_incarnation(3)
    for step in range(1, 6):
        file.update(step, step * 128, step * 4)
        assert read_counters(path) == Counters(3, step, step * 128, step * 4)
    file.close()
    file.close()
    assert read_counters(path) == Counters(3, 5, 640, 20)


def test_totals_survive_sigkill(path: Path):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from lightning_diloco.runtime.counters import CounterFile\n"
        "file = CounterFile(Path(sys.argv[1])); file.set_incarnation(2)\n"
        "for i in range(1, 1001): file.update(i, 7 * i)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(path)], timeout=60, env=os.environ | {"PYTHONPATH": ROOT})
    assert ended.returncode == -signal.SIGKILL
    assert read_counters(path) == Counters(2, 1000, 7000)


@pytest.mark.parametrize("stores_done", [1, 2, 3, 4])
def test_process_killed_between_two_stores_loses_one_step_and_no_more(path: Path, stores_done: int):
    file = CounterFile(path)
    file.set_incarnation(0)
    file.update(1, 10, 4)
    file.update(2, 20, 8)
    for at, value in list(zip(range(8, 13), (3, 3, 30, 12, 3), strict=True))[:stores_done]:  # the third update goes to the second slot
        file._words[at] = value
    file.close()
    assert read_counters(path) == Counters(0, 2, 20, 8)


def test_third_update_goes_where_the_test_above_says(path: Path):
    file = CounterFile(path)
    for step in (1, 2, 3):
        file.update(step, 10 * step, 4 * step)
    assert list(file._words[8:13]) == [3, 3, 30, 12, 3]
    file.close()


def test_new_incarnation_overwrites_an_old_file(path: Path):
    file = CounterFile(path)
    file.update(9, 99)
    file.close()
    file = CounterFile(path)
    assert read_counters(path) == Counters(None, 0, 0)
    file.close()


def test_large_totals_are_exact(path: Path):
    file = CounterFile(path)
    file.update(2**40, 2**62, 2**61)
    assert read_counters(path) == Counters(None, 2**40, 2**62, 2**61)
    file.close()


def test_damaged_file_is_a_sentence(path: Path):
    with pytest.raises(CounterFileError, match="cannot be read"):
        read_counters(path)
    file = CounterFile(path)
    file.update(1, 10)
    file.update(2, 20)
    file.close()
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(CounterFileError, match="103 bytes and should be 104"):
        read_counters(path)
    path.write_bytes(b"x" + good[1:])
    with pytest.raises(CounterFileError, match="is not a counter file"):
        read_counters(path)
    path.write_bytes(good[:8] + struct.pack("<Q", 1) + good[16:])
    with pytest.raises(CounterFileError, match="version 1"):
        read_counters(path)
    path.write_bytes(good[:24] + struct.pack("<Q", 77) + good[32:64] + struct.pack("<Q", 78) + good[72:])
    with pytest.raises(CounterFileError, match="both slots are half-written"):
        read_counters(path)


def test_file_that_cannot_be_created_is_an_os_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        CounterFile(tmp_path / "missing" / "x.bin")


def test_big_endian_machine_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(CounterFileError, match="little endian"):
        CounterFile(path)
