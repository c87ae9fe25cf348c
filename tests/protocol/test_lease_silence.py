"""Data leases by hand, where nobody says who is dead: what a silent learner holds is handed to others, and it may come back."""

from __future__ import annotations

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.records import LeaseBackRecord
from tests.protocol.lease_pair import LeasePair, check_covered, check_tape, job
from tests.protocol.toy import Node


def by_hand(**options) -> tuple[LeasePair, Node, Node]:
    """Learner 0 has trained two samples of 40, and two more that nobody was told of, and is silent; 1 has trained all that it could get."""
    pair, (silent, other) = job(is_supervised=False, **options)
    pair.train(silent)
    pair.heartbeat(silent)
    pair.settle()
    pair.train(silent)
    silent.control_up.clear()
    pair.advance(5.0)
    while not pair.stocks[other.nonce].is_over:
        pair.train(other)
        pair.heartbeat(other)
        exchange(pair, other)
    while pair.stocks[other.nonce].queued:
        pair.train(other)
    return pair, silent, other


def exchange(pair: LeasePair, node: Node) -> None:
    """One asks and is answered; nobody else says anything."""
    pair.ask(node)
    while node.control_up:
        pair.deliver_control_up(node)
    while node.control_down:
        pair.deliver_control_down(node)


def end_epoch_and_ask(pair: LeasePair, node: Node) -> None:
    """At the end of its data a learner asks once more before it takes the word for it."""
    assert pair.stocks[node.nonce].draw(2) == "empty"
    exchange(pair, node)


def backs(pair: LeasePair) -> list[int]:
    return [r.learner_id for r in pair.tape if isinstance(r, LeaseBackRecord)]


def test_what_a_silent_learner_holds_is_handed_out_when_nothing_else_is_free_and_not_before_it_is_silent():
    pair, silent, other = by_hand()
    assert pair.account()["outstanding"] > 0 and backs(pair) == []
    pair.advance(pair.syncer.job.silent_after_s)
    end_epoch_and_ask(pair, other)
    assert backs(pair) == [0]
    pair.kill(silent)
    pair.finish_training()
    account = pair.account()
    assert (account["done"], account["free"], account["outstanding"]) == (40, 0, 0)
    assert set(pair.times) == {(0, i) for i in range(40)} and backs(pair) == [0]
    assert pair.syncer.job.members.of(silent.nonce) is not None, "it may come back"
    check_tape(pair)


def test_a_silent_learner_that_comes_back_counts_what_it_has_trained_and_a_syncer_that_starts_again_knows_it():
    pair, silent, other = by_hand()
    pair.take_snapshot()
    pair.advance(pair.syncer.job.silent_after_s)
    end_epoch_and_ask(pair, other)
    pair.train(other, batches=10)
    pair.heartbeat(other)
    pair.restart()
    pair.heartbeat(silent)
    pair.settle()
    pair.finish_training()
    check_covered(pair, but_twice=None)
    assert pair.account()["twice"] >= 2


def test_what_was_taken_back_and_died_with_the_next_one_is_handed_out_once_more():
    pair, silent, other = by_hand()
    third = pair.join(2)
    pair.advance(pair.syncer.job.silent_after_s)
    end_epoch_and_ask(pair, other)
    pair.kill(silent)
    pair.die(other, is_counted=False)
    pair.take(ev.LearnerLost(learner_id=0, incarnation=0, reason="died"))
    pair.finish_training()
    account = pair.account()
    assert (account["done"], account["free"], account["outstanding"]) == (40, 0, 0)
    assert set(pair.times) == {(0, i) for i in range(40)} and pair.trained_by[third.nonce]
    assert account["unsure"] >= 2
    check_tape(pair)


def test_under_a_supervisor_silence_takes_nothing_back():
    pair, (silent, other) = job()
    pair.advance(10 * pair.syncer.job.silent_after_s)
    for _ in range(30):
        pair.train(other)
        pair.heartbeat(other)
        exchange(pair, other)
    assert pair.stocks[other.nonce].is_over and pair.account()["outstanding"] > 0
    assert backs(pair) == [] and silent.stage == "joined"
