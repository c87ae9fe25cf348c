"""The handler of SIGTERM: what it notes, and when it ends a process at once."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_diloco.strategy.sigterm import SigtermPolicy


@pytest.fixture
def policy():
    """Installed, for a member of a job that is between two validations."""
    sync: Any = SimpleNamespace(told_s=None, has_left=False, is_joined=True, is_validating=False)
    policy = SigtermPolicy(lambda: sync)
    policy.install()
    policy.sync = sync
    yield policy
    policy.remove()


def test_a_member_is_told_once_and_the_time_counts_from_the_first_signal(policy):
    before_s = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    assert policy.was_told
    told_s = policy.sync.told_s
    assert before_s <= told_s <= time.monotonic()
    with pytest.raises(SIGTERMException):
        os.kill(os.getpid(), signal.SIGTERM)
    assert policy.sync.told_s == told_s


def test_in_a_validation_the_time_is_noted_too(policy):
    policy.sync.is_validating = True
    with pytest.raises(SIGTERMException):
        os.kill(os.getpid(), signal.SIGTERM)
    assert policy.sync.told_s is not None


def test_who_has_left_hears_nothing_more(policy):
    policy.sync.has_left = True
    os.kill(os.getpid(), signal.SIGTERM)
    assert not policy.was_told
