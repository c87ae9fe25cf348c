"""Ends of a learner that another life may fare better after: memory that ran out, silence, signals; and what they are told from."""

from __future__ import annotations

import errno
import os
import queue
import signal
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_diloco import FencedError, LearnerFailedError
from lightning_diloco.errors import DiLoCoError
from lightning_diloco.runtime.children import ExitStatus
from lightning_diloco.strategy.deaths import death_of, is_death_by_memory
from lightning_diloco.strategy.results import LearnerResult, as_exception, failure

KILLED = ExitStatus(None, "SIGKILL")


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    ),
    RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. "),
    RuntimeError("unable to mmap 1024 bytes from file <weights.pt>: Cannot allocate memory (12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    chained(
        RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly"),
        RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. "),
    ),
    chained(RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly"), queue.Empty()),
    chained(FencedError("of the background thread"), chained(DiLoCoError("failed"), MemoryError())),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("DataLoader worker (pid 4711) is killed by signal: Segmentation fault. "),
    chained(
        RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly"),
        RuntimeError("DataLoader worker (pid 4711) is killed by signal: Segmentation fault. "),
    ),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("the text is about memory: out of memory"),
    KeyError("batch"),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda e: str(e)[:40])
def test_an_error_of_memory_is_told_from_its_kind_its_words_or_its_cause(error):
    assert is_death_by_memory(error)
    assert failure(error).outcome == "memory"


@pytest.mark.parametrize("error", OTHERS, ids=lambda e: str(e)[:40])
def test_any_other_error_fails(error):
    assert not is_death_by_memory(error)
    assert failure(error).outcome == "failed"


def test_a_fault_in_the_handling_of_an_error_of_memory_is_a_fault():
    with pytest.raises(KeyError) as caught:
        try:
            raise MemoryError
        except MemoryError:
            _ = {}["batch"]
    assert not is_death_by_memory(caught.value)


def test_a_chain_that_bites_its_own_tail_has_an_end():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_death_by_memory(first)


class KillsItsWorker(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.process
def test_a_killed_worker_of_a_real_loader_counts_as_memory():
    batches = iter(DataLoader(KillsItsWorker(), num_workers=1, multiprocessing_context="fork"))
    with pytest.raises(RuntimeError) as caught:
        next(batches)
    batches._shutdown_workers()
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":
            thread.join(10)
    assert is_death_by_memory(caught.value)


def test_an_allocation_that_no_machine_can_make_counts_as_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_death_by_memory(caught.value)


def test_memory_and_signals_are_deaths_and_failures_are_none():
    memory = death_of(failure(torch.OutOfMemoryError("CUDA out of memory. Tried.")), ExitStatus(1, None), None)
    assert memory is not None
    assert "memory that ran out (torch.OutOfMemoryError: CUDA out of memory. Tried.)" in memory.by
    assert "batch_sizing='auto'" in memory.remedy
    assert [death_of(None, KILLED, None).by, death_of(LearnerResult(outcome="signal"), ExitStatus(143, None), None).by] == [
        "SIGKILL",
        "SIGTERM",
    ]
    assert death_of(failure(ValueError("x")), ExitStatus(1, None), None) is None
    assert death_of(None, ExitStatus(3, None), None) is None


def test_who_hung_is_named_with_the_option():
    death = death_of(None, KILLED, 90.0)
    assert death is not None and "hang_timeout_s=90" in death.by and "hang_timeout_s" in death.remedy
    # It had ended by itself, a moment before it would have been killed.
    assert death_of(failure(ValueError("x")), KILLED, 90.0) is None
    assert death_of(None, ExitStatus(3, None), 90.0) is None


def test_an_error_of_memory_comes_back_with_its_traceback():
    error = as_exception(1, failure(MemoryError("of a learner")))
    assert isinstance(error, MemoryError)
    assert isinstance(error.__cause__, LearnerFailedError)
