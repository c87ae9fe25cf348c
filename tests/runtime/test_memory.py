"""A pool's tensors: ordinary ones, whose memory is used again when nobody holds it, and never before."""

from __future__ import annotations

import threading
from collections import deque

import pytest
import torch

from lightning_diloco.outer import buffer_of
from lightning_diloco.runtime.memory import Pool


def test_memory_comes_back_when_the_last_holder_is_gone():
    pool = Pool(10_000)
    whole = pool.flat(1000)
    address = whole.data_ptr()
    assert pool.used_bytes == 4000
    parts = whole[10:20].split(5)
    view = buffer_of(whole)
    for held in ("whole", "parts", "view"):
        assert pool.free_bytes == 0, held
        if held == "whole":
            del whole
        elif held == "parts":
            del parts
        else:
            del view
    assert pool.free_bytes == 4000
    assert pool.flat(900).data_ptr() == address


def test_two_tensors_never_share_memory():
    pool = Pool(800)
    held = []
    for value in range(9):
        held.append(pool.flat(100 - value).fill_(value))
        if value % 2:
            held.pop(0)
        assert all(bool((t == t[0]).all()) for t in held)
    assert len({t.data_ptr() for t in held}) == len(held)


def test_what_is_too_much_is_freed_the_longest_unused_first():
    pool = Pool(2 * 400)
    held = [pool.flat(100).fill_(i) for i in range(5)]
    addresses = [t.data_ptr() for t in held]
    for _ in range(5):
        held.pop(0)
    assert pool.free_bytes == 2 * 400
    assert {pool.flat(100).data_ptr(), pool.flat(100).data_ptr()} <= set(addresses[3:])


@pytest.mark.parametrize(("size", "is_used_again"), [(101, False), (100, True), (80, True), (79, False)])
def test_a_block_serves_what_fills_four_fifths_of_it(size, is_used_again):
    pool = Pool(4000)
    block = pool.raw(100)
    address = block.data_ptr()
    del block
    other = pool.raw(size)
    assert (other.data_ptr() == address) == is_used_again and other.numel() == size
    assert pool.free_bytes == (0 if is_used_again else 100)


def test_nothing_needs_no_memory():
    pool = Pool(4000)
    assert pool.flat(0).shape == (0,) and pool.flat(0).dtype == torch.float32
    assert pool.free_bytes == 0


def test_threads_may_share_it():
    pool, wrong = Pool(3 * 4 * 64), []

    def work(value):
        held = deque()
        for i in range(300):
            held.append((value + i, pool.flat(64).fill_(value + i)))
            if len(held) > 3:
                number, flat = held.popleft()
                if not bool((flat == number).all()):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(1000.0 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.used_bytes == 0


def test_who_finds_it_busy_gets_fresh_memory_and_does_not_wait():
    pool = Pool(4000)
    first = pool.raw(100)
    address = first.data_ptr()
    del first
    with pool._lock:
        fresh = pool.raw(100)
        assert fresh.data_ptr() != address
        del fresh
        assert pool.used_bytes == 0
    assert pool.free_bytes == 200


def test_torchs_default_device_is_not_asked():
    with torch.device("meta"):
        assert Pool(4000).flat(10).device.type == "cpu"
