"""What one learner can take from the others, and from the syncer, through leases: little, whatever it says."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol.faults import MAX_TOTAL
from lightning_diloco.protocol.identity import DataSpec, LeaseRange
from lightning_diloco.protocol.lease_stock import MAX_KNOWN
from lightning_diloco.protocol.leases import LEASES_PER_GRANT, MAX_HELD_EPOCHS, MAX_RANGES, LeaseLedger, lease_size
from lightning_diloco.protocol.messages import Granted, Heartbeat, LeaseRequest, Message
from lightning_diloco.protocol.records import LeaseRecord
from lightning_diloco.protocol.wire import decode_from_learner, encode
from tests.protocol.lease_pair import LeasePair, check_tape, job
from tests.protocol.toy import Node

HUGE = 2**62


def leases_of(pair: LeasePair, node: Node) -> list[LeaseRecord]:
    return [r for r in pair.tape if isinstance(r, LeaseRecord) and r.learner_id == node.learner_id]


def say(pair: LeasePair, node: Node, message: Message) -> None:
    pair._send(node, message)
    pair.settle()


def size_of(ranges: tuple[LeaseRange, ...]) -> int:
    return sum(r.stop - r.start for r in ranges)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(100_000, 32), (1_000, 3), (40, 4), (5, 5), (1, 1)])
def test_a_grant_holds_a_few_leases_and_an_epoch_at_most_whatever_is_wanted(num_samples, batch_size):
    ledger = LeaseLedger(DataSpec(num_samples=num_samples, is_shuffled=False))
    got = size_of(ledger.grant(ledger.life(0, 0), 1, wanted=HUGE, batch_size=batch_size, until=None))
    assert 0 < got <= min(num_samples, LEASES_PER_GRANT * lease_size(num_samples, batch_size))


@pytest.mark.parametrize("batch_size", [1, 3, HUGE])
def test_one_that_asks_without_end_holds_two_epochs_and_the_others_get_the_rest(batch_size):
    pair, (good, bad) = job(num_samples=40, until=8)
    for number in range(10, 300):
        say(pair, bad, LeaseRequest(number=number, wanted=HUGE, batch_size=batch_size, until=8))
    ledger = pair.syncer.job.leases
    assert ledger is not None
    assert MAX_HELD_EPOCHS * 40 < size_of(ledger.held(1, 0)) <= (MAX_HELD_EPOCHS + 1) * 40
    assert len(leases_of(pair, bad)) <= (MAX_HELD_EPOCHS + 1) * 40 // min(batch_size, 40) + 1 and len(ledger.accounts()) <= 4
    for _ in range(400):
        pair.train(good)
        pair.ask(good)
        pair.settle()
    assert len(pair.trained_by[good.nonce]) == 8 * 40 - size_of(ledger.held(1, 0))
    check_tape(pair)


def test_one_that_holds_much_is_answered_when_it_has_reported_more_as_trained():
    pair, (_, bad) = job(num_samples=40, until=None)
    for number in range(10, 20):
        say(pair, bad, LeaseRequest(number=number, wanted=40, batch_size=40))
    held = size_of(pair.syncer.job.leases.held(1, 0))
    before = len(leases_of(pair, bad))
    say(pair, bad, Heartbeat(inner_step=0, tokens=0, samples=40))
    say(pair, bad, LeaseRequest(number=19, wanted=40, batch_size=40))
    assert len(leases_of(pair, bad)) == before + 1 and size_of(pair.syncer.job.leases.held(1, 0)) <= held
    say(pair, bad, LeaseRequest(number=20, wanted=40, batch_size=40, samples=80))
    assert len(leases_of(pair, bad)) == before + 2
    check_tape(pair)


def test_a_small_data_set_with_many_batches_ahead_is_handed_out_without_a_refusal():
    pair, nodes = job(num_samples=6, until=9, batch_size=4)
    for _ in range(30):
        for node in nodes:
            number = pair.stocks[node.nonce]._number
            if pair.ask(node, batches_ahead=64):
                pair.settle()
                assert pair.syncer.job.leases.life(node.learner_id, 0).number >= number + 1, "it was not answered"
            pair.train(node)
    pair.finish_training()
    check_tape(pair)


# ---- what is told -------------------------------------------------------------------------------------------------------------------


def test_a_syncer_that_has_not_started_again_takes_no_grants_from_learners():
    pair, (_, bad) = job(num_samples=40, until=None)
    say(pair, bad, LeaseRequest(number=9, wanted=0, batch_size=2, known=(Granted(8, (LeaseRange(0, 30, 40),)),)))
    assert not any(r.is_told for r in leases_of(pair, bad))
    check_tape(pair)


def test_one_that_has_started_again_takes_them_once_and_no_more_than_a_learner_can_hold():
    pair, (_, bad) = job(num_samples=40, until=None)
    pair.take_snapshot()
    pair.stocks[bad.nonce]._known.clear()
    pair.restart()
    whole = [Granted(10 + i, (LeaseRange(i, 0, 40),)) for i in range(MAX_KNOWN)]
    say(pair, bad, LeaseRequest(number=90, wanted=0, batch_size=2, known=tuple(whole)))
    told = [r for r in leases_of(pair, bad) if r.is_told]
    assert 0 < len(told) <= MAX_HELD_EPOCHS + 1
    say(pair, bad, LeaseRequest(number=99, wanted=0, batch_size=2, samples=HUGE // 2**20, known=(Granted(95, (LeaseRange(9, 0, 4),)),)))
    assert [r for r in leases_of(pair, bad) if r.is_told] == told
    check_tape(pair)


@pytest.mark.parametrize("ranges", [(), ((0, 0, 40), (1, 0, 1)), ((0, 5, 5),), ((0, 39, 41),), ((999, 0, 1),)])
def test_a_grant_that_cannot_be_one_is_not_taken(ranges):
    ledger = LeaseLedger(DataSpec(num_samples=40, is_shuffled=False))
    assert not ledger.is_possible(tuple(LeaseRange(*r) for r in ranges))


def test_a_rebuilt_ledger_does_not_take_epochs_that_lie_far_apart():
    ledger = LeaseLedger(DataSpec(num_samples=40, is_shuffled=False), is_rebuilt=True)
    assert ledger.is_possible((LeaseRange(HUGE - 1, 0, 1), LeaseRange(HUGE, 0, 1)))
    assert not ledger.is_possible((LeaseRange(0, 0, 1), LeaseRange(HUGE, 0, 1)))


@pytest.mark.parametrize("count", [0, 1])
def test_the_wire_takes_as_many_grants_and_ranges_as_there_can_be_and_no_more(count):
    pair, (_, bad) = job(num_samples=40, until=None)
    envelope = pair._envelope_up(bad)
    ranges = tuple(LeaseRange(0, i, i + 1) for i in range(MAX_RANGES))
    known = tuple(Granted(i, ranges) for i in range(MAX_KNOWN + count))
    data = encode(envelope, LeaseRequest(number=9, wanted=0, batch_size=1, known=known))
    if count:
        with pytest.raises(Exception, match="known"):
            decode_from_learner(data)
    else:
        assert decode_from_learner(data)[1].known == known


# ---- totals -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        Heartbeat(inner_step=0, tokens=0, samples=MAX_TOTAL + 1),
        Heartbeat(inner_step=0, tokens=0, again=((0, 1), (1, MAX_TOTAL + 1))),
        LeaseRequest(number=9, wanted=0, batch_size=1, samples=MAX_TOTAL + 1),
        LeaseRequest(number=9, wanted=0, batch_size=1, known=(Granted(8, (LeaseRange(0, 0, 1),), MAX_TOTAL + 1),)),
    ],
    ids=["samples", "again", "samples of a request", "before"],
)
def test_a_total_that_no_learner_reaches_ends_the_session(message):
    pair, (good, bad) = job(num_samples=40, until=None)
    say(pair, bad, message)
    assert pair.syncer.job.members.of(bad.nonce) is None and pair.syncer.job.members.of(good.nonce) is not None
    check_tape(pair)


# ---- the end of a life --------------------------------------------------------------------------------------------------------------


def test_what_two_lives_hold_is_free_when_both_have_ended_however_it_is_cut():
    ledger = LeaseLedger(DataSpec(num_samples=600, is_shuffled=False))
    for learner_id, step in ((0, 2), (1, 3), (2, 5)):
        ranges = tuple(LeaseRange(0, i, i + 1) for i in range(0, 600, step))
        ledger.take(ledger.life(learner_id, 0), 1, ranges)
    left = {i for i in range(600) if i % 3 == 0 or i % 5 == 0}
    for learner_id, held in ((0, left), (1, {i for i in range(600) if i % 5 == 0}), (2, set())):
        ledger.end(learner_id, 0, f"{learner_id}", said_last_word=False)
        (account,) = ledger.accounts() or [{"outstanding": 0}]
        assert account["outstanding"] == len(held)
