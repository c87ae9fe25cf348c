"""The parts of `benchmarks/chaos.py` that decide what it claims: which faults come, what counts as a hit, what a gap is."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import pytest

from benchmarks.chaos import LONGEST_S, SHORTEST_S, Plan
from benchmarks.storm.faults import KINDS, Fault, thread_states
from benchmarks.storm.proxy import Proxies
from benchmarks.storm.report import Result, aims, plot, tables
from benchmarks.storm.steps import StepFile, longest_gap_s, read_steps
from tests.runtime.job_helpers import until


@pytest.mark.parametrize("seed", range(20))
def test_a_storm_of_five_minutes_has_each_kind_three_times_and_a_fault_every_5_to_20_s(seed):
    kinds, pauses = Plan(seed=seed, length_s=300.0).deal()
    assert len(kinds) == len(pauses) == 28 and min(Counter(kinds)[kind] for kind in KINDS) >= 3
    assert all(SHORTEST_S <= pause <= LONGEST_S for pause in pauses) and sum(pauses) <= 301
    assert (kinds, pauses) == Plan(seed=seed, length_s=300.0).deal()
    assert sorted(Plan(seed=seed, length_s=60.0).deal()[0]) == sorted(KINDS)


def test_ends_of_steps_are_read_from_outside_and_the_longest_gap_is_that_of_the_window(tmp_path):
    file = StepFile(tmp_path / "steps.bin")
    assert read_steps(tmp_path / "steps.bin") == [] == read_steps(tmp_path / "none.bin")
    for _ in range(3):
        file.note()
    ends = read_steps(tmp_path / "steps.bin")
    assert len(ends) == 3 and ends == sorted(ends)
    times = [0.0, 1.0, 1.5, 4.0, 4.1, 9.0]
    assert longest_gap_s(times, 1.2, 4.05) == 2.5, "the step during which it came is in it"
    assert longest_gap_s(times, 4.05, 5.0) == 4.9 and longest_gap_s(times, 9.0, 20.0) is None


def test_a_process_counts_as_stopped_when_all_its_threads_are(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"])
    try:
        until(lambda: len(os.listdir(f"/proc/{process.pid}/task")) == 2)
        assert "T" not in thread_states(process.pid)
        process.send_signal(signal.SIGSTOP)
        until(lambda: thread_states(process.pid) == {"T"})
    finally:
        process.kill()
        process.wait()
    assert thread_states(process.pid) == set()


class Echo:
    """A server that sends back what it gets."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join(10)
        self.listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            self._echo(connection)

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            while data := _receive(connection):
                connection.sendall(data)


def _receive(connection: socket.socket, size: int = 65536) -> bytes:
    try:
        return connection.recv(size)
    except OSError:
        return b""


def test_a_link_counts_what_it_does_to_what_passes():
    echo = Echo()
    with Proxies(0) as proxies:
        link = proxies.link(0, [echo.endpoint])
        port = int(link.targets[echo.endpoint].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"hello")
            assert client.recv(99) == b"hello" and link.counts.connections == 1
            link.bits_to_turn = 1
            client.sendall(b"hello")
            heard = client.recv(99)
            assert sum((a ^ b).bit_count() for a, b in zip(heard, b"hello", strict=True)) == 1 == link.counts.bits_turned
            proxies.partition(link, "hold")
            client.sendall(b"later")
            until(lambda: link.counts.bytes_held == 5)
            passed = link.counts.bytes_passed
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.recv(99)
            assert link.counts.bytes_passed == passed
            link.state = "up"
            client.settimeout(10)
            assert client.recv(99) == b"later"
            proxies.partition(link, "reset")
            assert _receive(client) == b""
        until(lambda: not link.writers)
        assert link.counts.reset >= 1
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            assert _receive(client) == b"" and link.counts.refused == 1
    echo.close()


def test_a_proxy_ends_its_thread():
    with Proxies(0) as proxies:
        assert asyncio.run_coroutine_threadsafe(asyncio.sleep(0, "runs"), proxies._loop).result(5) == "runs"
    assert not proxies._thread.is_alive()


def result(**changes) -> Result:
    learner = SimpleNamespace(learner_id=0, incarnations=1, participation=0.9, inner_steps=5, tokens=7, discarded=0).__dict__
    summary = {
        **{"uptime": 1.0, "goodput": 0.9, "goodput_alive": 0.97, "wall_s": 10.0, "merges": 3, "mean_members": 2.0},
        **{"tokens": 7, "tokens_merged": 7, "tokens_discarded": 0, "discarded_by_reason": {"died": 0}, "learners": [learner]},
    }
    faults = [Fault(i, kind, 1.0, learner_id=0, life=0, is_confirmed=True, recovered=True) for i, kind in enumerate(KINDS)]
    known = {"faults": faults, "summary": summary, "reference": summary, "loss": 2.0, "reference_loss": 2.0, "checked": ""}
    known |= {
        "steps": {(0, 0): [0.5, 1.0, 2.0]},
        "begin_s": 0.0,
        "end_s": 3.0,
        "replayed": "equal",
        "least_faults": 8,
        "least_of_a_kind": 1,
    }
    return Result(**(known | changes))


def test_every_aim_can_be_missed():
    good = result()
    assert all(is_reached for _, _, is_reached in aims(good))
    assert "died" not in tables(good) and plot(good).startswith("<svg")
    lost = Fault(0, "kill", 1.0, is_confirmed=False, recovered=False)
    bad = result(
        faults=[lost, *good.faults[2:]],
        summary=good.summary | {"uptime": 0.9, "goodput_alive": 0.9},
        steps={(0, 0): [0.5, 1.0, 2.5]},
        reference_loss=1.9,
        checked="learner 0, fragment 1: pending is 5",
        replayed="exit code 1",
    )
    assert not any(is_reached for _, _, is_reached in aims(bad))
    assert tables(bad).count("**missed**") == len(aims(bad)) == 8
