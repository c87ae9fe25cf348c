"""The background thread's policy is its own, and a system that refuses it is no reason to end."""

from __future__ import annotations

import os
import threading

import pytest

from lightning_diloco.runtime.threads import never_interrupt_others

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a policy of Linux")


def policy_after(function) -> int:
    seen = []
    thread = threading.Thread(target=lambda: (function(), seen.append(os.sched_getscheduler(0))))
    thread.start()
    thread.join()
    return seen[0]


def test_only_the_calling_thread_gets_the_policy():
    before = os.sched_getscheduler(0)
    assert policy_after(never_interrupt_others) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == before


def test_a_refusal_changes_nothing(monkeypatch):
    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert policy_after(never_interrupt_others) == os.SCHED_OTHER


def test_a_policy_that_the_user_has_chosen_stays():
    def idle_and_then():
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
        never_interrupt_others()

    assert policy_after(idle_and_then) == os.SCHED_IDLE
