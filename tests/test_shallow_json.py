"""What a stranger's brackets may cost: a refusal, and nothing of this process."""

from __future__ import annotations

import gc
import json
import sys
import time

import pytest

from lightning_diloco.shallow_json import MAX_DEPTH, read_shallow_json


class Closing:
    """Garbage whose finalizer needs stack, as closing a socket does."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        descend(20)


def descend(levels: int) -> None:
    if levels:
        descend(levels - 1)


def finalizers_that_fail(parse, text: str, monkeypatch) -> int:
    failed = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    thresholds = gc.get_threshold()
    try:
        for threshold in range(900, 1200, 20):
            gc.collect()
            gc.disable()
            for _ in range(50):
                Closing()
            gc.set_threshold(threshold)
            gc.enable()
            with pytest.raises((ValueError, RecursionError)):
                parse(text)
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
    return len(failed)


def test_brackets_thousands_deep_leave_every_finalizer_its_stack(monkeypatch):
    text = "[" * 60_000
    if sys.version_info < (3, 12):  # since then garbage is collected between two instructions of Python only
        assert finalizers_that_fail(json.loads, text, monkeypatch) > 0, "the danger is there"
    assert finalizers_that_fail(read_shallow_json, text, monkeypatch) == 0


def nested(levels: int) -> str:
    return '{"a":[' * (levels // 2) + "]}" * (levels // 2)


def test_depth_is_counted_outside_strings():
    value = json.loads(nested(MAX_DEPTH))
    assert read_shallow_json(nested(MAX_DEPTH)) == value
    with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} levels"):
        read_shallow_json(nested(MAX_DEPTH + 2))
    names = ["[" * 100, '"{' * 50, "\\", '\\"[', "]\n["]
    assert read_shallow_json(json.dumps(names)) == names
    assert read_shallow_json(json.dumps([[]] * 1000)) == [[]] * 1000


@pytest.mark.parametrize("text", ['"' + '\\"' * 500_000, '"' * 999_999, '["' + "\\" * 999_999, "]" * 1_000_000])
def test_a_megabyte_of_anything_is_refused_in_linear_time(text):
    start = time.thread_time()
    with pytest.raises(ValueError):
        read_shallow_json(text)
    assert time.thread_time() - start < 5, "one that starts again at every quote takes hours"
