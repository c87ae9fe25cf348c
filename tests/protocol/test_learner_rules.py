"""Rules of one learner and of one contribution that need a peer from another time: stale envelopes, differences that do not fit."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.actions import Decode, Forget, Send
from lightning_diloco.protocol.identity import MergedThrough, Version
from lightning_diloco.protocol.messages import Busy, Contribution, Envelope, Hello, NeedFull, Publication, Pull, Released, Resolved, Stop
from lightning_diloco.protocol.records import ContributionRecord
from tests.protocol.invariants import check_end
from tests.protocol.moves import bulk_up, contribute, payloads, up
from tests.protocol.pair import Pair

OURS = Envelope("job", "first", 0, 0)


@pytest.fixture
def pair() -> Pair:
    return Pair(num_fragments=1)


def publication(n: int, parent: int | None, epoch: int = 0, fragment_id: int = 0) -> Publication:
    return Publication(
        fragment_id=fragment_id,
        version=Version(epoch, n),
        parent=None if parent is None else Version(epoch, parent),
        crc=1,
        merged_through={0: MergedThrough(0, 0)},
    )


def told(pair: Pair, message, envelope: Envelope = OURS):
    return pair.nodes[0].machine.handle(ev.ControlReceived(envelope=envelope, message=message), pair.now_s)


def arrived(pair: Pair, header: Publication, envelope: Envelope = OURS):
    return pair.nodes[0].machine.handle(ev.PublicationArrived(envelope=envelope, header=header), pair.now_s)


@pytest.mark.parametrize("envelope", [Envelope("job", "second", 0, 0), Envelope("job", "", 9, 0)])
def test_a_syncer_of_another_history_is_not_obeyed(pair, envelope):
    pair.found(1)
    assert told(pair, Stop(reason="x"), envelope) == []
    assert arrived(pair, publication(1, 0), envelope) == []


def test_an_old_publication_and_one_of_no_fragment_are_ignored(pair):
    pair.found(1)
    for header in (publication(0, None), publication(1, 0, fragment_id=1)):
        assert arrived(pair, header) == []


def test_a_publication_of_a_later_epoch_is_not_taken_and_says_hello_to_a_syncer_that_has_started_again(pair):
    (node,) = pair.found(1)
    (answer,) = arrived(pair, publication(1, 0, epoch=1))
    assert isinstance(answer, Send) and isinstance(answer.message, Hello)
    assert node.machine.state.fragments[0].is_missed


def test_a_difference_to_a_version_that_is_not_held_asks_for_the_full_one(pair):
    pair.found(1)
    assert arrived(pair, publication(2, 1)) == [Send(message=NeedFull(fragment_id=0))]


def test_values_with_a_wrong_checksum_are_not_taken_and_asked_for_again(pair):
    (a,) = pair.found(1)
    (decode,) = arrived(pair, publication(1, 0))
    assert isinstance(decode, Decode) and not decode.is_full
    actions = a.machine.handle(ev.Decoded(fragment_id=0, version=Version(0, 1), crc_ok=False), pair.now_s)
    assert actions == [Send(message=NeedFull(fragment_id=0))]
    assert a.machine.state.fragments[0].held == Version(0, 0) and not a.machine.state.fragments[0].is_behind


def test_a_version_that_was_overtaken_while_it_was_decoded_is_not_taken_for_the_newest(pair):
    (a,) = pair.found(1)
    arrived(pair, publication(1, 0))
    arrived(pair, publication(2, None))
    assert a.machine.handle(ev.Decoded(fragment_id=0, version=Version(0, 1), crc_ok=True), pair.now_s) == []
    assert a.machine.state.fragments[0].held == Version(0, 0) and not a.machine.state.fragments[0].is_ready
    a.machine.handle(ev.Decoded(fragment_id=0, version=Version(0, 2), crc_ok=True), pair.now_s)
    assert a.machine.state.fragments[0].held == Version(0, 2)


def test_a_pull_is_answered_busy_at_once_where_no_boundary_will_come(pair):
    (a,) = pair.found(1)
    pull = Pull(fragment_id=0, round_id=3)
    pair.feed(a, ev.ControlReceived(envelope=OURS, message=pull))
    pair.feed(a, ev.PauseChanged(is_paused=True))
    assert [m for m in up(a) if isinstance(m, Busy)] == [Busy(fragment_id=0, round_id=3)]
    assert told(pair, pull) == [Send(message=Busy(fragment_id=0, round_id=3))]


def test_words_about_a_fragment_that_does_not_exist_are_ignored(pair):
    pair.found(1)
    for message in (Pull(fragment_id=1, round_id=1), Released(fragment_id=1, round_id=1), Resolved(fragment_id=1, seq=1, outcome="held")):
        assert told(pair, message) == []


def test_steps_before_the_join_are_counted_and_exchange_nothing(pair):
    node = pair.add(0, joins=False)
    assert node.machine.handle(ev.Boundary(tokens=3, steps=2), pair.now_s) == []
    assert (node.machine.state.inner_step, node.machine.state.tokens) == (2, 3)
    assert node.machine.handle(ev.Encoded(fragment_id=0, seq=1, crc=0), pair.now_s) == [Forget(fragment_id=0, seq=1)]
    assert node.machine.handle(ev.Tick(), pair.now_s) == []


def forge(pair: Pair, envelope: Envelope, **change) -> ContributionRecord:
    """The contribution in flight of the only learner, with some other fields."""
    (a,) = pair.nodes
    header = payloads(a)[0]
    fields = {**{n: getattr(header, n) for n in header.__struct_fields__}, **change}
    pair.take(
        ev.ContributionArrived(session=a.nonce, envelope=envelope, header=Contribution(**fields), norm=1.0, is_finite=True, payload_bytes=1)
    )
    return pair.of(ContributionRecord)[-1]


@pytest.mark.parametrize(
    ("envelope", "change", "reason"),
    [
        (Envelope("job", "first", 0, 7), {}, "stale_incarnation"),
        (Envelope("job", "second", 0, 0), {}, "stale_epoch"),
        (Envelope("job", "first", 1, 0), {}, "stale_epoch"),
        (OURS, {"base": Version(1, 0)}, "stale_epoch"),
        (OURS, {"base": Version(0, 5)}, "conflict"),
        (OURS, {"base_merged_seq": 3}, "overlap"),
        (OURS, {"tokens": 10_000}, "overlap"),
        (OURS, {"steps": 10_000}, "overlap"),
        (OURS, {"after": 9, "is_final": True}, "overlap"),
        (OURS, {"after": 1}, "overlap"),
    ],
)
def test_a_contribution_that_does_not_fit_is_refused_with_its_reason(pair, envelope, change, reason):
    (a,) = pair.found(1)
    contribute(pair, a)
    record = forge(pair, envelope, **change)
    assert (record.outcome, record.reason) == ("refused", reason)
    assert not pair.syncer.rounds.of(0).holds(0) and not pair.merges()


def test_a_seq_below_one_that_was_decided_is_refused(pair):
    (a,) = pair.found(1)
    pair.steps([a], 9)
    contribute(pair, a)
    assert payloads(a)[0].seq == 3
    too_early = forge(pair, OURS, seq=9, base_merged_seq=7)
    assert too_early.reason == "overlap"
    assert forge(pair, OURS).reason == "overlap"


def test_leavers_of_a_job_that_is_finished_still_get_their_good_bye():
    pair = Pair(num_fragments=1, options={"is_supervised": True})
    pair.manual_merge = True
    a, b = pair.found(2)
    pair.step(a)
    pair.settle()
    pair.step(a)
    pair.step(b)
    pair.leave(a)
    bulk_up(pair, a)
    while a.control_down:
        pair.deliver_control_down(a)
    while a.control_up:
        pair.deliver_control_up(a)
    pair.take(ev.Finish(status="stopped"))
    pair.merge()
    pair.settle()
    assert a.stage == "left" and b.is_joined, "b was given up; nobody speaks to it any more"
    check_end(pair)
