"""Data leases on the machines: messages that are lost, doubled or late, learners that die, syncers that start again."""

from __future__ import annotations

import msgspec
import pytest

from lightning_diloco.protocol.identity import DataSpec, LeaseRange
from lightning_diloco.protocol.messages import LeaseRequest
from lightning_diloco.protocol.records import JobRecord, JoinRecord, LeaseLateRecord, LeaseRecord
from tests.protocol.lease_pair import LeasePair, check_covered, check_tape, job

# ---- joining --------------------------------------------------------------------------------------------------------------------


def test_the_founders_data_is_the_jobs_and_its_seed_goes_to_all():
    pair, (a, _) = job()
    (record,) = [r for r in pair.tape if isinstance(r, JobRecord)]
    assert record.data == pair.spec
    c = pair.add(2, data=DataSpec(num_samples=40, is_shuffled=False, seed=99), takeover_token="mine")
    assert c.joined is not None and a.joined is not None and c.joined.data == a.joined.data == pair.spec


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (DataSpec(num_samples=41, is_shuffled=False), "The data set has 41 samples and the job's has 40."),
        (DataSpec(num_samples=40, is_shuffled=True), "shuffle=True of the DataLoader differs from the job's False."),
        (None, "data='shard' differs from the job's 'lease'."),
    ],
)
def test_a_learner_with_other_data_is_refused_with_a_sentence(data, sentence):
    pair, _ = job(1)
    other = pair.add(1, data=data)
    assert other.stage == "refused"
    assert sentence in other.detail


def test_a_learner_that_wants_leases_of_a_job_that_has_none_is_refused_and_requests_are_not_answered():
    pair = LeasePair(num_samples=40, until=1)
    a = pair.add(0)
    b = pair.add(1, data=pair.spec)
    assert b.stage == "refused" and "data='lease' differs from the job's 'shard'." in b.detail
    pair._send(a, LeaseRequest(number=1, wanted=2, batch_size=2))
    pair.settle()
    assert pair.syncer.job.leases is None and not [r for r in pair.tape if isinstance(r, LeaseRecord)]


# ---- a job ----------------------------------------------------------------------------------------------------------------------


def test_a_fast_learner_takes_more_and_each_sample_is_trained_once():
    pair, (fast, slow) = job(num_samples=200, until=2)
    for _ in range(40):
        pair.train(fast, batches=3)
        pair.train(slow)
        pair.settle_all()
    pair.finish_training()
    check_covered(pair)
    assert len(pair.trained_by[fast.nonce]) > 2 * len(pair.trained_by[slow.nonce])


def test_learners_have_batches_of_different_sizes():
    pair, (a, b) = job(num_samples=50)
    for size in (1, 7, 3, 2, 11, 4):
        pair.batch_size = size
        pair.train(a)
        pair.batch_size = 5
        pair.train(b)
        pair.settle_all()
    pair.finish_training()
    check_covered(pair)


def test_what_a_learner_hands_back_at_its_end_is_trained_by_the_others():
    pair, (a, b) = job()
    pair.train(a)
    pair.heartbeat(a)
    pair.settle()
    pair.leave(a, "signal")
    pair.settle()
    assert a.stage == "left"
    pair.finish_training()
    check_covered(pair)
    assert len(pair.trained_by[b.nonce]) == 38


@pytest.mark.parametrize("is_counted", [True, False])
def test_what_died_unreported_is_handed_out_again_and_named(is_counted):
    pair, (a, b) = job()
    pair.train(a)
    pair.heartbeat(a)
    pair.settle()
    pair.train(a)  # two samples that nobody was told of
    pair.die(a, is_counted=is_counted)
    again = pair.join(0)
    pair.finish_training()
    assert again.joined is not None and again.joined.incarnation == 1
    times = {i: n for (_, i), n in pair.times.items()}
    assert set(times) == set(range(40)) and sum(times.values()) == 42
    twice = sorted(i for i, n in times.items() if n == 2)
    account = pair.account()
    if is_counted:
        assert (account["twice"], account["twice_ranges"]) == (2, [[twice[0], twice[1] + 1]])
        assert account["unsure"] == 0
    else:
        assert account["twice"] == 0 and account["unsure"] >= 2
    check_tape(pair)


def test_a_learner_that_was_given_up_and_wakes_tells_what_it_has_trained():
    pair, (a, _) = job()
    pair.train(a)
    a.control_up.clear()  # it stands still, and its words with it
    pair.join(0)  # shows the takeover token: the first process is fenced
    assert a.stage == "fenced"
    pair.heartbeat(a)
    pair.settle()
    pair.finish_training()
    (late,) = [r for r in pair.tape if isinstance(r, LeaseLateRecord)]
    assert (late.learner_id, late.incarnation, late.samples) == (0, 0, 2)
    check_covered(pair, but_twice=2)


# ---- the link -------------------------------------------------------------------------------------------------------------------


def test_a_request_that_is_said_twice_is_answered_twice_and_granted_once():
    pair, (a, _) = job()
    pair.train(a, batches=2)
    pair.settle()
    free = pair.account()["free"]
    assert pair.ask(a)
    pair.deliver_control_up(a, keep=True)
    after = pair.account()["free"]
    pair.settle()
    assert after < free and pair.account()["free"] == after
    pair.finish_training()
    check_covered(pair)


def test_a_grant_that_is_lost_comes_again_and_one_that_comes_twice_counts_once():
    pair, (a, _) = job()
    pair.train(a, batches=2)
    pair.ask(a)
    while a.control_up:
        pair.deliver_control_up(a)
    a.control_down.clear()
    queued = pair.stocks[a.nonce].queued
    pair.ask(a)
    while a.control_up:
        pair.deliver_control_up(a)
    a.control_down.extend(list(a.control_down))
    pair.settle()
    assert pair.stocks[a.nonce].queued > queued
    pair.finish_training()
    check_covered(pair)


def test_a_learner_that_has_left_gets_no_more_samples():
    pair, (a, _) = job()
    pair.train(a, batches=2)
    pair.ask(a)
    request = a.control_up.pop()
    pair.leave(a)
    pair.settle()
    assert a.stage == "left"
    grants = len([r for r in pair.tape if isinstance(r, LeaseRecord)])
    a.control_up.append(request)
    pair.settle()
    assert len([r for r in pair.tape if isinstance(r, LeaseRecord)]) == grants


# ---- a syncer that starts again -------------------------------------------------------------------------------------------------


def test_the_ledger_of_a_syncer_that_was_killed_is_that_of_its_tape():
    pair, (a, b) = job(num_samples=60, until=2)
    pair.take_snapshot()
    for _ in range(4):
        pair.train(a, batches=2)
        pair.train(b)
        pair.settle_all()
    pair.train(a)  # while there is no syncer
    pair.restart()
    pair.finish_training()
    check_covered(pair)


def test_a_grant_that_was_on_the_tape_and_never_arrived_is_given_again_by_the_next_syncer():
    pair, (a, _) = job()
    pair.take_snapshot()
    pair.train(a, batches=2)
    pair.ask(a)
    while a.control_up:
        pair.deliver_control_up(a)
    pair.restart()  # clears what was on its way
    pair.finish_training()
    check_covered(pair)


def test_grants_that_a_machine_lost_with_its_tape_are_told_by_the_learners():
    pair, (a, b) = job(num_samples=60)
    pair.take_snapshot()
    for _ in range(3):
        pair.train(a, batches=2)
        pair.settle_all()
    pair.lose_lines(2)
    pair.restart()
    assert any(r.is_told for r in pair.tape if isinstance(r, LeaseRecord))
    pair.finish_training()
    check_covered(pair)


def test_what_two_learners_were_given_because_the_tape_lost_it_is_trained_twice_and_counted():
    pair, (a, b) = job(num_samples=60)
    pair.take_snapshot()
    pair.train(a, batches=2)
    pair.settle_all()
    pair.lose_lines(1)
    pair.crash()
    # Only b is back at first: it is given what a holds.
    a.control_up.clear()
    pair.heartbeat(b)
    pair.settle()
    pair.advance(6.0)
    pair.settle()
    assert not pair.syncer.job.is_recovering
    for _ in range(3):
        pair.train(b, batches=2)
        pair.heartbeat(b)
        pair.ask(b)
        while b.control_up:
            pair.deliver_control_up(b)
        while b.control_down:
            pair.deliver_control_down(b)
    pair.finish_training()
    check_covered(pair, but_twice=None)
    assert pair.account()["twice"] > 0


def test_a_rebuilt_ledger_goes_on_from_what_the_learners_show():
    pair, (a, b) = job(num_samples=600, until=2, batch_size=1)
    pair.take_snapshot()
    for _ in range(200):
        pair.train(a, batches=2)
        pair.train(b)
        pair.settle_all()
    assert len(pair.stocks[a.nonce]._known) == 32, "more than it remembers"
    before = pair.times.total()
    (founding,) = [r for r in pair.tape if isinstance(r, JobRecord)]
    pair.tape = [msgspec.structs.replace(founding, is_rebuilt=True), *(r for r in pair.tape if isinstance(r, JoinRecord))]
    pair.restart()
    pair.finish_training()
    assert set(pair.times) == {(epoch, i) for epoch in range(2) for i in range(600)}
    assert set(pair.times.values()) == {1} and before < pair.times.total()
    check_tape(pair)
    assert pair.account(0)["free"] == pair.account(0)["twice"] == 0
    assert pair.account(1)["done"] == 600


# ---- without a lease ------------------------------------------------------------------------------------------------------------


def test_without_a_lease_a_learner_trains_its_last_samples_again_up_to_its_share_and_says_so():
    pair, (a, _) = job(num_samples=20)
    stock = pair.stocks[a.nonce]
    while isinstance(item := stock.draw(2), LeaseRange):
        stock.processed(item.stop - item.start)
        stock.stepped()
    assert item == "empty"
    had, again = stock.samples, []
    while (item := stock.draw_again(3)) is not None:
        again += range(item.start, item.stop)
        stock.processed(item.stop - item.start)
        stock.stepped()
    assert len(again) + had >= 10 and set(again) <= set(range(had)), "its own, up to half of the epoch"
    assert (stock.samples, stock.reported_again()) == (had, ((0, len(again)),))
    pair.heartbeat(a)
    pair.settle()
    account = pair.account()
    assert (account["again"], account["twice"], account["done"]) == (len(again), 0, had)
    check_tape(pair)


# ---- what is drawn and not trained ----------------------------------------------------------------------------------------------


def test_what_a_loader_has_fetched_and_not_trained_is_drawn_again_in_the_same_order():
    pair, (a, _) = job(num_samples=40)
    stock = pair.stocks[a.nonce]
    first, second, third = (stock.draw(2) for _ in range(3))
    stock.processed(2)  # the first batch was processed, and waits for its optimizer step
    stock.begin()
    assert (stock.draw(2), stock.draw(2)) == (second, third)
    stock.processed(2)
    stock.stepped()
    assert stock.samples == 4
    assert first == LeaseRange(0, 0, 2)


def test_an_epoch_ends_at_the_first_range_of_a_later_one_and_older_ranges_end_nothing():
    pair, (a,) = job(1, num_samples=4, until=None)
    stock = pair.stocks[a.nonce]
    stock._queue.clear()
    stock._queue.extend([LeaseRange(2, 0, 2), LeaseRange(1, 0, 1), LeaseRange(2, 2, 4), LeaseRange(3, 0, 2)])
    drawn = [stock.draw(2) for _ in range(4)]
    assert drawn == [LeaseRange(2, 0, 2), LeaseRange(1, 0, 1), LeaseRange(2, 2, 4), "over"]
    assert stock.next_epoch() == 3
    stock.processed(5)
    stock.stepped()
    stock.begin()
    assert stock.draw(2) == LeaseRange(3, 0, 2)
