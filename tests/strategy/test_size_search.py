"""The search for the batch size, against trying all sizes, on devices that are formulas."""

from __future__ import annotations

import random

import pytest

from lightning_diloco.strategy.size_search import SETTLED_WINDOW, SizeSearch


class Device:
    """A device whose step takes a + c s seconds, with noise."""

    def __init__(self, offset_s: float, per_sample_s: float, noise: float, seed: int = 0) -> None:
        self.offset_s, self.per_sample_s, self.noise = offset_s, per_sample_s, noise
        self.random = random.Random(seed)

    def time_s(self, size: int) -> float:
        return self.offset_s + self.per_sample_s * size

    def step_s(self, size: int) -> float:
        return self.time_s(size) * (1 + self.noise * self.random.uniform(-1, 1))

    def best(self, target_s: float, ceiling: int) -> int:
        return min(range(1, ceiling + 1), key=lambda size: (abs(self.time_s(size) - target_s), size))


def run(search: SizeSearch, device: Device, target_s: float, steps: int) -> list[int]:
    sizes = []
    for _ in range(steps):
        search.observe(search.size, device.step_s(search.size))
        search.decide(target_s)
        sizes.append(search.size)
    return sizes


@pytest.mark.parametrize("offset_s", [0.0, 0.02, 0.08])
@pytest.mark.parametrize("per_sample_s", [0.001, 0.004, 0.02])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("target_s", [0.1, 0.25])
def test_it_finds_what_trying_all_sizes_finds(offset_s, per_sample_s, noise, target_s):
    device, ceiling = Device(offset_s, per_sample_s, noise), 200
    search = SizeSearch(size=8, ceiling=ceiling)
    run(search, device, target_s, 200)
    best_s, found_s = device.time_s(device.best(target_s, ceiling)), device.time_s(search.size)
    # Within the tolerance of the target, or as near as whole sizes allow.
    assert abs(found_s - target_s) <= max(0.07 * target_s, 1.3 * abs(best_s - target_s) + 0.01 * target_s), (search.size, best_s)


def test_it_settles():
    search, device = SizeSearch(size=8, ceiling=64), Device(0.01, 0.004, 0.1, seed=3)
    sizes = run(search, device, 0.1, 2000)
    changes = sum(a != b for a, b in zip(sizes[200:], sizes[201:], strict=False))
    assert changes <= 2


def test_two_sizes_around_the_target_are_not_exchanged_for_ever():
    search, device = SizeSearch(size=1, ceiling=64), Device(0.0, 0.07, 0.02)
    sizes = run(search, device, 0.1, 600)
    assert len(set(sizes[100:])) == 1


def test_it_follows_a_device_that_gets_slower():
    search, device = SizeSearch(size=8, ceiling=64), Device(0.01, 0.002, 0.02)
    run(search, device, 0.1, 200)
    assert abs(device.time_s(search.size) - 0.1) <= 0.01
    device.offset_s, device.per_sample_s = 0.02, 0.004
    run(search, device, 0.1, 4 * SETTLED_WINDOW + 100)
    assert abs(device.time_s(search.size) - 0.1) <= 0.011


def test_steps_of_another_size_say_nothing():
    search = SizeSearch(size=8, ceiling=64)
    for _ in range(50):
        search.observe(9, 5.0)
    assert search.decide(0.1) == 8


def test_a_size_that_does_not_fit_is_not_tried_again():
    search, device = SizeSearch(size=8, ceiling=1000), Device(0.0, 0.001, 0.0)
    for _ in range(300):
        if search.size > 20:
            search.failed(search.size)
        search.observe(search.size, device.step_s(search.size))
        before = search.size
        if search.decide(0.3) != before:
            assert search.ceiling == 1000 or search.size <= search.ceiling
    assert 15 <= search.size <= 20
    assert search.failed(1) == 1
