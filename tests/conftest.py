"""What holds for every test: one thread for a process's arithmetic, and nothing that a test started outlives it."""

from __future__ import annotations

import os

# Before torch is imported anywhere; processes that tests start inherit it. More threads than cores make steps several times slower.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402

import psutil  # noqa: E402
import pytest  # noqa: E402

LEAK_PATIENCE_S = 5.0
"""What a test has asked to end gets so long to do it."""

KEPT_PROCESSES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "torch_shm_manager")
"""Helpers of the interpreter and of torch: one for the whole life of this process."""

KEPT_THREADS = ("TMonitor", "GarbageCollectorThread")
"""Types of threads of libraries that live on by design (tqdm; pyzmq, which lets go of what was sent without being copied)."""


def _children() -> dict[tuple[int, float], psutil.Process]:
    """Every process below this one, by id and creation time (ids are used again)."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() == psutil.STATUS_ZOMBIE or any(kept in " ".join(child.cmdline()) for kept in KEPT_PROCESSES):
                continue
            found[child.pid, child.create_time()] = child
        except psutil.Error:
            continue
    return found


def _threads() -> dict[int, threading.Thread]:
    """Every thread that Python code has started; threads of native libraries that merely called in are not."""
    return {
        id(thread): thread
        for thread in threading.enumerate()
        if not isinstance(thread, threading._DummyThread) and type(thread).__name__ not in KEPT_THREADS
    }


_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = exitstatus


def pytest_unconfigure(config: pytest.Config) -> None:
    """End also where a test that failed has left a thread: the interpreter would wait for it without end, and without a word."""
    left = [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    if left:
        print(f"Threads of failed tests that still run: {', '.join(left)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(config.stash.get(_STATUS, 1))


@pytest.fixture(autouse=True)
def _nothing_outlives_its_test():
    """Fail a test whose processes or threads are still there after it, and end those processes."""
    processes_before, threads_before = _children(), _threads()
    yield
    deadline = time.monotonic() + LEAK_PATIENCE_S
    while True:
        processes = [p for key, p in _children().items() if key not in processes_before]
        threads = [t for key, t in _threads().items() if key not in threads_before]
        if not (processes or threads) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    left = [f"thread {t.name}" for t in threads]
    for process in processes:
        try:
            left.append(f"process {process.pid}: {' '.join(process.cmdline())[:200]}")
            process.kill()
        except psutil.Error:
            continue
    if left:
        pytest.fail("The test left behind: " + "; ".join(left), pytrace=False)
