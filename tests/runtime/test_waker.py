"""The wake-up of a poller: from any thread, without waiting, and never into a descriptor of somebody else."""

from __future__ import annotations

import os
import select
import threading

from lightning_diloco.runtime.transport.sockets import Waker


def is_readable(descriptor: int | Waker) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def test_one_or_many_wake_ups_are_one_and_none_waits():
    waker = Waker()
    assert not is_readable(waker)
    for times in (1, 200_000):  # more than a pipe holds
        for _ in range(times):
            waker.wake()
        assert is_readable(waker)
        waker.drain()
        assert not is_readable(waker)
    waker.close()


def test_it_ends_a_poll_of_another_thread():
    waker = Waker()
    ended = threading.Event()
    thread = threading.Thread(target=lambda: select.select([waker], [], [], 20) and ended.set())
    thread.start()
    waker.wake()
    assert ended.wait(10)
    thread.join()
    waker.close()


def test_after_the_end_it_leaves_the_next_owner_of_the_descriptor_alone():
    waker = Waker()
    numbers = {waker.fileno(), waker._writer}
    waker.close()
    reader, writer = os.pipe()
    assert {reader, writer} == numbers, "the same numbers"
    waker.wake()
    waker.close()
    assert not is_readable(reader)
    os.write(writer, b"still open")
    assert is_readable(reader)
    os.close(reader)
    os.close(writer)
