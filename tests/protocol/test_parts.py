"""The parts of the machines on their own: grace window, gates, ledger, membership, publisher, records."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.protocol import records as rec
from lightning_diloco.protocol.contributions import contribution_weight
from lightning_diloco.protocol.gates import WARMUP, NormGate
from lightning_diloco.protocol.grace import GraceWindow, MovingAverage
from lightning_diloco.protocol.identity import FragmentInfo, LeaseRange, MergedThrough, Version
from lightning_diloco.protocol.ledger import Ledger
from lightning_diloco.protocol.members import MAX_ENDED, Membership
from lightning_diloco.protocol.messages import Discarded
from lightning_diloco.protocol.publisher import Current, Publisher

# ---- the grace window -------------------------------------------------------------------------------------------------------


def window(**fields) -> GraceWindow:
    return GraceWindow(**{"overlap_steps": 2, "grace_fraction": 0.8, "grace_cap_steps": 1.0, **fields})


def test_the_window_is_equation_3():
    grace = window(grace_cap_steps=10.0)
    grace.quorum.add(0.5)
    grace.sync.add(0.25)
    assert grace.window_s(1.0) == pytest.approx(0.8 * (2 * 1.0 - (0.5 + 0.25)))


def test_the_window_is_never_negative():
    grace = window()
    grace.sync.add(100.0)
    assert grace.window_s(1.0) == 0.0


def test_the_window_is_at_most_the_cap():
    assert window(overlap_steps=50).window_s(0.5) == 0.5
    assert window(overlap_steps=50, grace_cap_steps=0.0).window_s(0.5) == 0.0


def test_there_is_no_window_before_a_step_time_is_known():
    assert window().window_s(None) == 0.0


def test_a_quorum_that_was_carried_leaves_its_share_of_the_slack():
    grace = window(grace_cap_steps=10.0)
    grace.quorum.add(1.0)
    assert grace.window_s(1.0, quorum_s=0.0) == pytest.approx(1.6)
    assert grace.window_s(1.0) == pytest.approx(0.8)


def test_the_average_starts_at_the_first_measurement_and_follows_slowly():
    average = MovingAverage()
    average.add(1.0)
    assert average.value == 1.0
    average.add(2.0)
    assert average.value == pytest.approx(1.2)


def test_the_weight_is_quantity_times_quality():
    assert contribution_weight(100, 4) == 2500.0
    assert contribution_weight(100, 2) == 2 * contribution_weight(100, 4)


# ---- the norm gate ----------------------------------------------------------------------------------------------------------


def test_the_gate_is_open_until_it_has_seen_enough():
    gate = NormGate(2.0)
    assert all(gate.admits(10.0**i, 1) for i in range(WARMUP))


def test_the_gate_judges_the_norm_per_step():
    gate = NormGate(2.0)
    for _ in range(WARMUP):
        gate.admits(8.0, 4)
    assert gate.admits(40.0, 10)
    assert not gate.admits(40.0, 9)


def test_a_gate_that_is_too_tight_opens_again():
    gate = NormGate(2.0)
    for _ in range(33):
        gate.admits(1.0, 1)
    verdicts = [gate.admits(5.0, 1) for _ in range(33)]
    assert not verdicts[0] and verdicts[-1]


def test_a_gate_that_is_off_or_has_seen_only_zeros_lets_everything_pass():
    off, zeros = NormGate(None), NormGate(2.0)
    for _ in range(20):
        assert off.admits(0.001, 1) and zeros.admits(0.0, 1)
    assert off.admits(1e30, 1) and zeros.admits(1e30, 1)


# ---- the ledger -------------------------------------------------------------------------------------------------------------


def test_what_died_is_computed_and_not_added_up():
    ledger = Ledger(2)
    ledger.trained(0, 100)
    ledger.hold(0, 0, 30)
    ledger.hold(0, 1, 20)
    ledger.merge(0, 1, 20)
    assert ledger.report_discarded(0, Discarded(1, "norm", 5)) == 5
    assert dict(ledger.end_incarnation(0)) == {0: 70, 1: 75}
    assert ledger.pending(0, 0) == 30, "what is held outlives its learner"
    ledger.merge(0, 0, 30)
    assert ledger.pending(0, 0) == ledger.pending(0, 1) == 0
    assert ledger.tokens(0) == 100 == ledger.merged(0, 0) + ledger.discarded(0, 0)


def test_the_totals_of_a_new_life_begin_at_zero_and_count_on_top():
    ledger = Ledger(1)
    ledger.trained(3, 50)
    list(ledger.end_incarnation(3))
    ledger.trained(3, 10)
    ledger.trained(3, 7)
    assert ledger.tokens(3) == 60 and ledger.pending(3, 0) == 10
    assert ledger.report_discarded(3, Discarded(0, "norm", 4)) == 4
    assert ledger.learners() == [3]


def test_a_report_of_discarded_tokens_is_a_running_total_and_speaks_only_of_what_is_open():
    ledger = Ledger(1)
    ledger.trained(0, 10)
    ledger.hold(0, 0, 6)
    assert ledger.report_discarded(0, Discarded(0, "norm", 3)) == 3
    assert ledger.report_discarded(0, Discarded(0, "norm", 3)) == 0
    assert ledger.report_discarded(0, Discarded(0, "norm", 2)) == 0
    assert ledger.report_discarded(0, Discarded(0, "norm", 1000)) == 1
    assert ledger.pending(0, 0) == 6
    ledger.trained(0, 20)
    assert ledger.report_discarded(0, Discarded(0, "norm", 8)) == 4


def test_merging_what_is_not_held_is_an_error_of_this_program():
    ledger = Ledger(1)
    ledger.hold(0, 0, 5)
    with pytest.raises(LocalProtocolError, match="6 tokens merged that were not held"):
        ledger.merge(0, 0, 6)


# ---- membership -------------------------------------------------------------------------------------------------------------


def joined(members: Membership, learner_id: int, now_s: float):
    member = members.add(learner_id, f"s{learner_id}", "joined")
    member.last_advance_s = now_s
    return member


def test_a_learner_is_active_from_its_first_step_while_its_counter_moves():
    member = joined(Membership(), 0, 0.0)
    assert not member.is_active(0.0)
    member.advance(1, 10, 1.0)
    assert member.is_active(10.9) and not member.is_active(11.1)
    member.advance(1, 10, 12.0)
    assert not member.is_active(12.0), "a heartbeat alone is not life"
    member.advance(2, 20, 13.0)
    assert member.is_active(13.0)


def test_a_slow_counter_gets_ten_of_its_own_step_times():
    member = joined(Membership(), 0, 0.0)
    member.advance(1, 10, 0.0)
    member.advance(2, 20, 20.0)
    assert member.is_active(219.0) and not member.is_active(221.0)


def test_a_paused_learner_is_not_active_and_not_still():
    member = joined(Membership(), 0, 0.0)
    member.advance(1, 10, 1.0)
    member.is_paused = True
    assert not member.is_active(2.0) and not member.is_still(1000.0)


@pytest.mark.parametrize("first", ["move", "answer"])
def test_a_silent_learner_is_active_again_when_it_has_moved_and_answered(first):
    member = joined(Membership(), 0, 0.0)
    member.advance(1, 10, 1.0)
    member.fall_silent()
    events = [lambda: member.advance(2, 20, 2.0), member.answered]
    for event in events if first == "move" else events[::-1]:
        assert not member.is_active(2.0)
        event()
    assert member.is_active(2.0)


def test_old_totals_change_nothing():
    member = joined(Membership(), 0, 0.0)
    member.advance(5, 50, 1.0)
    member.advance(4, 90, 2.0)
    assert (member.inner_step, member.tokens, member.last_advance_s, member.last_heard_s) == (5, 50, 1.0, 2.0)


def test_work_begins_after_the_last_snapshot():
    member = joined(Membership(), 0, 0.0)
    member.advance(5, 50, 1.0)
    assert member.has_work(3)
    member.snapshot_step[3] = 5
    assert not member.has_work(3) and member.has_work(2)


def test_incarnations_count_on_and_ended_sessions_are_remembered_within_a_limit():
    members = Membership()
    for i in range(MAX_ENDED + 5):
        member = members.add(0, f"s{i}", "waiting")
        assert member.incarnation == i
        members.remove(member, "fenced" if i % 2 else "died")
        assert member.stage == "gone"
    assert members.end_of("s0") is None and members.end_of(f"s{MAX_ENDED + 3}") == "fenced"
    assert members.present() == [] and members.of("s7") is None


def test_the_jobs_step_is_that_of_a_learner_and_the_step_time_that_of_the_fastest():
    members = Membership()
    assert members.job_step(0.0) == 0 and members.step_time_s(0.0) is None
    for learner_id, steps in enumerate((4, 10)):
        member = joined(members, learner_id, 0.0)
        member.advance(1, 1, 0.0)
        member.advance(steps, 1, 9.0)
    assert members.job_step(9.0) == 4 and members.step_time_s(9.0) == 1.0
    members.remove(members.by_id(0), "died")
    assert not members.active(900.0) and members.job_step(900.0) == 10, "one that joins while all others validate begins at their step"


# ---- the publisher ----------------------------------------------------------------------------------------------------------


def current(n: int) -> Current:
    return Current(
        version=Version(0, n),
        parent=Version(0, n - 1) if n else None,
        crc=n,
        merged_through={0: MergedThrough(n, n)},
        difference_bytes=2,
        full_bytes=4,
    )


@pytest.fixture
def member():
    return Membership().add(0, "s", "joined")


@pytest.fixture
def publisher(member) -> Publisher:
    publisher = Publisher()
    publisher.start("s", {0: Version(0, 0)})
    return publisher


def sent(actions) -> list[tuple[int, bool]]:  # (n, is a full transfer) of each transmission
    return [(a.version.n, a.parent is None) for a in actions if type(a).__name__ == "Transmit"]


def test_who_holds_the_parent_gets_the_difference_and_anyone_else_the_full_state(publisher, member):
    assert sent(publisher.offer(member, 0, current(1))) == [(1, False)]
    assert sent(publisher.offer(member, 1, current(1))) == [(1, True)]
    assert sent(publisher.offer(member, 0, current(1))) == []


def test_one_is_on_its_way_and_the_newest_follows(publisher, member):
    publisher.offer(member, 0, current(1))
    assert sent(publisher.offer(member, 0, current(2))) == []
    assert sent(publisher.offer(member, 0, current(3))) == []
    assert sent(publisher.delivered(member, 0, current(3))) == [(3, True)]
    assert publisher.delivered(member, 0, current(3)) == []
    assert publisher.delivered(member, 0, current(3)) == [] and publisher.holds("s", 0, Version(0, 3))


def test_after_a_failure_the_full_state_is_sent(publisher, member):
    publisher.offer(member, 0, current(1))
    assert sent(publisher.failed(member, 0, current(1))) == [(1, True)]
    publisher.delivered(member, 0, current(1))
    assert publisher.failed(member, 0, current(1)) == []


def test_a_wish_for_the_full_state_waits_for_what_is_on_its_way(publisher, member):
    publisher.offer(member, 0, current(1))
    assert sent(publisher.needs_full(member, 0, current(1))) == []
    assert sent(publisher.delivered(member, 0, current(1))) == [(1, True)]


def test_one_report_that_contradicts_an_acknowledgement_may_be_old_and_two_are_believed(publisher, member):
    publisher.offer(member, 0, current(1))
    assert publisher.reported(member, 0, Version(0, 0), current(1)) == [], "it is on its way"
    publisher.delivered(member, 0, current(1))
    assert publisher.reported(member, 0, Version(0, 0), current(1)) == []
    assert sent(publisher.reported(member, 0, Version(0, 0), current(1))) == [(1, False)]


def test_the_word_on_an_earlier_transfer_of_a_resumed_session_is_not_taken_for_the_newest(publisher, member):
    publisher.offer(member, 0, current(1))
    publisher.start("s", {0: Version(0, 0)})
    publisher.offer(member, 0, current(2))
    assert publisher.delivered(member, 0, current(2), Version(0, 1)) == []
    assert publisher.failed(member, 0, current(2), Version(0, 1)) == []
    assert not publisher.holds("s", 0, Version(0, 2))
    publisher.delivered(member, 0, current(2), Version(0, 2))
    assert publisher.holds("s", 0, Version(0, 2)) and publisher.holds_all("s", 1)


def test_an_ended_session_is_offered_nothing(publisher, member):
    publisher.offer(member, 0, current(1))
    publisher.stop("s")
    assert publisher.offer(member, 0, current(2)) == publisher.needs_full(member, 0, current(2)) == []
    assert publisher.delivered(member, 0, current(2)) == publisher.reported(member, 0, Version(0, 0), current(2)) == []
    assert publisher.holds("s", 0, Version(0, 9)) and not publisher.holds_all("s", 1)


# ---- records ----------------------------------------------------------------------------------------------------------------

BOTH = (FragmentInfo(0, 8), FragmentInfo(1, 9, "buffers"))
MEMBER = rec.Member(learner_id=1, incarnation=2, seq=3, steps=4, tokens=5, weight=6.25)
RECORDS = [
    rec.JobRecord(
        job_id="j", lineage="l", epoch=0, config={}, fingerprint="f", fragments=BOTH, founded_n=(0, 0), founder_id=0, founding_bytes=9
    ),
    rec.JoinRecord(learner_id=0, incarnation=0, role="founder"),
    rec.ProgressRecord(learner_id=0, incarnation=0, inner_steps=3, tokens=30, step_gaps_s=(0.1, 0.2)),
    rec.BatchRecord(learner_id=0, incarnation=1, inner_step=2, batch_size=3, accumulate=4, lr_factor=0.5, reason="r"),
    rec.CountersRecord(learner_id=0, incarnation=0, inner_steps=3, tokens=30),
    rec.LeaveRecord(learner_id=0, incarnation=0, reason="died"),
    rec.RoundOpenRecord(fragment_id=0, round_id=1, quorum=1, active=(0,), pulled=(0,), carried=()),
    rec.RoundCancelRecord(fragment_id=0, round_id=1, contributions=0, quorum=1),
    rec.ContributionRecord(
        learner_id=0,
        incarnation=0,
        fragment_id=0,
        seq=7,
        base=Version(1, 2),
        steps=1,
        tokens=10,
        weight=1.0,
        norm=0.1,
        payload_bytes=16,
        outcome="refused",
        reason="norm",
    ),
    rec.DiscardRecord(learner_id=0, fragment_id=0, reason="drain", tokens=4),
    rec.MergeRecord(
        fragment_id=0,
        round_id=1,
        version=Version(0, 1),
        members=(MEMBER,),
        eligible=(0, 1),
        quorum=1,
        quorum_s=0.1,
        grace_window_s=0.2,
        grace_used_s=0.3,
        merge_s=0.4,
        outer_lr=0.7,
        outer_momentum=0.9,
        crc=5,
        norms=((1.0, 2.0),),
        scales=(0.5, 1 / 3),
    ),
    rec.PublishRecord(fragment_id=0, version=Version(0, 1), is_full=False, learners=(0,), payload_bytes=3),
    rec.RestartRecord(epoch=1, versions=(Version(1, 5),)),
    rec.EndRecord(status="finished", versions=(1,), global_sha256=None),
    rec.RunRecord(status="finished", startup_s=1.0, restarts={"0": 1}, val={"loss": 1.5}),
    rec.LeaseRecord(learner_id=0, incarnation=0, number=1, ranges=(LeaseRange(0, 4, 8),), samples=4),
    rec.LeaseBackRecord(learner_id=0, incarnation=0),
    rec.LeaseLateRecord(learner_id=0, incarnation=0, session="ab", samples=4),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_a_record_comes_back_from_its_line_as_it_was(record):
    line = rec.encode_line(rec.TapeLine(12, 3.5, record))
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert rec.decode_line(line) == rec.TapeLine(12, 3.5, record)
    plain = msgspec.json.decode(line)
    assert (plain["seq"], plain["t_s"]) == (12, 3.5) and "event" in plain


def test_every_kind_of_record_is_tried():
    assert {type(r) for r in RECORDS} == set(rec.Record.__args__)


@given(data=st.binary(max_size=80), cut=st.integers(0, 200))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_a_line_that_is_no_record_is_a_value_error(data, cut):
    whole = rec.encode_line(rec.TapeLine(1, 1.0, RECORDS[9]))
    for broken in (data, whole[: min(cut, len(whole) - 3)]):
        with pytest.raises(ValueError):
            rec.decode_line(broken)
