"""The threads of data leases: the training thread waits for a syncer that answers, a bounded time, and for no other one."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from lightning_diloco.protocol.identity import DataSpec, LeaseRange
from lightning_diloco.protocol.messages import LeaseGrant
from lightning_diloco.runtime import leases as module
from lightning_diloco.runtime.leases import Leases, Link


class Syncer:
    """Answers when a test says so."""

    def __init__(self) -> None:
        self.is_heard = True
        self.sent: list = []
        self.leases = Leases(DataSpec(num_samples=100, is_shuffled=False), until=None, share=None, batch_size=lambda: 2, batches_ahead=1)
        self.leases.connect(
            Link(send=self.sent.append, wake=lambda: None, is_heard=lambda now_s: self.is_heard, syncer_epoch=lambda: 0, heartbeat_s=1.0)
        )
        self.given = 0

    def answer(self, count: int) -> None:
        self.leases.tick(time.monotonic())
        self.leases.granted(LeaseGrant(number=self.sent[-1].number, ranges=(LeaseRange(0, self.given, self.given + count),)))
        self.given += count


@pytest.fixture
def syncer(monkeypatch) -> Syncer:
    monkeypatch.setattr(module, "WAIT_S", 0.6)
    return Syncer()


def test_a_request_is_said_again_until_it_is_answered_and_not_at_every_turn(syncer):
    for at_s in (10.0, 10.1, 10.2, 10.3, 10.6):
        syncer.leases.tick(at_s)
    assert len(syncer.sent) == 3 and len(set(syncer.sent)) == 1
    syncer.leases.granted(LeaseGrant(number=1, ranges=(LeaseRange(0, 0, 6),)))
    syncer.leases.granted(LeaseGrant(number=1, ranges=(LeaseRange(0, 0, 6),)))
    syncer.leases.tick(11.0)
    assert len(syncer.sent) == 3, "the stock is full"
    assert [syncer.leases.draw(4), syncer.leases.draw(4)] == [LeaseRange(0, 0, 4), LeaseRange(0, 4, 6)]
    syncer.leases.tick(11.0)
    assert syncer.sent[-1].number == 2


def test_a_loader_that_has_run_dry_waits_for_a_syncer_that_answers(syncer):
    later = threading.Timer(0.1, syncer.answer, [4])
    later.start()
    assert syncer.leases.draw(2) == LeaseRange(0, 0, 2)
    later.join()
    assert syncer.leases.waited_s > 0.0


def test_nobody_waits_for_a_syncer_that_is_not_heard_and_its_absence_is_told_once(syncer, caplog):
    syncer.answer(4)
    first = [syncer.leases.draw(2), syncer.leases.draw(2)]
    syncer.is_heard = False
    with caplog.at_level(logging.WARNING):
        assert [syncer.leases.draw(2) for _ in range(4)] == first * 2, "its own last samples, again"
        assert syncer.leases.waited_s == 0.0
        syncer.leases.processed(10)
        assert syncer.leases.stepped() == 4
        assert syncer.leases.reported_again() == ((0, 6),)
        assert caplog.text.count("No lease is left") == 1
        syncer.is_heard = True
        syncer.answer(2)
        assert syncer.leases.draw(2) == LeaseRange(0, 4, 6)
        assert caplog.text.count("hands out samples again") == 1


def test_a_syncer_that_is_heard_and_hands_out_nothing_is_waited_for_once(syncer):
    syncer.answer(2)
    syncer.leases.draw(2)
    assert syncer.leases.draw(2) == LeaseRange(0, 0, 2)
    waited_s = syncer.leases.waited_s
    assert waited_s >= 0.6
    for _ in range(5):
        assert syncer.leases.draw(2) is not None
    assert syncer.leases.waited_s - waited_s < 0.6
