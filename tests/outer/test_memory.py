"""A pool's tensors: ordinary ones, whose memory is used again when nobody holds it, and never before."""

from __future__ import annotations

import threading

import pytest
import torch

from lightning_diloco.outer import Pool, buffer_of


def test_memory_comes_back_when_the_last_holder_is_gone():
    pool = Pool(4096, keep=3)
    whole = pool.flat(1000)
    address = whole.data_ptr()
    parts = whole[10:20].split(5)
    view = buffer_of(whole)
    for held in ("whole", "parts", "view"):
        assert pool.num_free == 0, held
        if held == "whole":
            del whole
        elif held == "parts":
            del parts
        else:
            del view
    assert pool.num_free == 1
    assert pool.flat(7).data_ptr() == address


def test_two_tensors_never_share_memory():
    pool = Pool(400, keep=2)
    held = []
    for value in range(5):
        held.append(pool.flat(100).fill_(value))
        if value % 2:
            held.pop(0)
        assert all(bool((t == t[0]).all()) for t in held)
    assert len({t.data_ptr() for t in held}) == len(held)


def test_no_more_blocks_are_kept_than_was_said():
    pool = Pool(400, keep=2)
    held = [pool.flat(100) for _ in range(5)]
    held.clear()
    assert pool.num_free == 2


@pytest.mark.parametrize("num_elements", [0, 101])
def test_what_does_not_fit_has_memory_of_its_own(num_elements):
    pool = Pool(400, keep=2)
    flat = pool.flat(num_elements)
    assert flat.shape == (num_elements,) and flat.dtype == torch.float32
    del flat
    assert pool.num_free == 0


def test_threads_may_share_it():
    pool, wrong = Pool(4 * 64, keep=4), []

    def work(value):
        for _ in range(300):
            flat = pool.flat(64).fill_(value)
            if not bool((flat == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= pool.num_free <= 4
