"""A joined member that sends what no learner of ours would send: the syncer never raises, and no other learner's state changes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_diloco.errors import LocalProtocolError, RemoteProtocolError
from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol import messages as msg
from lightning_diloco.protocol import wire
from lightning_diloco.protocol.actions import Reply
from lightning_diloco.protocol.identity import FragmentInfo, Version
from tests.protocol.invariants import check_tape
from tests.protocol.pair import Pair

HUGE = 2**62
count = st.one_of(st.integers(0, 12), st.sampled_from([2**31, 2**53, 2**53 + 1, HUGE]))
number = st.one_of(st.integers(1, 12), st.sampled_from([2**31, 2**53, 2**53 + 1, HUGE]))
version = st.builds(Version, count, count)
short = st.text(max_size=8)
unresolved = st.lists(st.builds(msg.Unresolved, count, count), max_size=4).map(tuple)
discarded = st.lists(
    st.builds(msg.Discarded, count, st.sampled_from(["overwritten", "died", "fenced", "nonfinite", "norm", "rollback", "drain"]), count),
    max_size=4,
).map(tuple)
seconds = st.floats(0.0, 1e9)
times = st.lists(seconds, max_size=3).map(tuple)
heartbeat = st.builds(
    msg.Heartbeat,
    inner_step=count,
    tokens=count,
    versions=st.lists(count, max_size=5).map(tuple),
    unresolved=unresolved,
    discarded=discarded,
    step_gaps_s=times,
    paused_s=times,
    stalls_s=times,
    last_step_age_s=seconds,
    is_paused=st.booleans(),
    batch_size=count,
)
hello = st.builds(
    msg.Hello,
    protocol_version=st.integers(0, 3),
    token=short,
    learner_id=st.one_of(st.none(), st.integers(2, 9)),
    nonce=short,
    takeover_token=short,
    config=st.binary(max_size=40),
    fingerprint=short,
    lineage=st.sampled_from(["", "first", "other"]),
    versions=st.lists(version, max_size=4).map(tuple),
    unresolved=unresolved,
)
control = st.one_of(
    heartbeat,
    hello,
    st.builds(msg.Progress, inner_step=count, tokens=count),
    st.builds(msg.Busy, fragment_id=count, round_id=count),
    st.builds(msg.Adopted, fragment_id=count, version=version, crc=count),
    st.builds(msg.NeedFull, fragment_id=count),
    st.builds(msg.Paused, is_paused=st.booleans()),
    st.builds(msg.StopRequest, reason=short),
    st.builds(msg.Leave, reason=st.sampled_from(["limit", "signal", "stopped"]), report=heartbeat),
    st.builds(msg.Ready, inner_step=count),
    st.builds(msg.Ping, number=count),
    st.builds(
        msg.Found,
        layout=st.binary(max_size=4),
        fragments=st.lists(st.builds(FragmentInfo, count, number), min_size=1, max_size=3).map(tuple),
        static_bytes=count,
        static_crc=count,
        versions=st.lists(count, max_size=3).map(tuple),
    ),
    st.builds(msg.LeaseRequest, number=number, wanted=count, batch_size=number, samples=count),
    st.builds(msg.PeerStateRequest, fragment_id=count, optimizers=st.lists(st.text(max_size=4), max_size=3).map(tuple), attempt=count),
)
contribution = st.builds(
    msg.Contribution,
    fragment_id=count,
    seq=number,
    round_id=st.one_of(st.none(), count),
    base=version,
    base_merged_seq=count,
    steps=number,
    tokens=number,
    inner_step=count,
    total_tokens=count,
    crc=count,
    is_final=st.booleans(),
    after=st.one_of(st.none(), count),
)


def account(pair: Pair, learner_id: int) -> tuple:
    """All that the syncer keeps of one learner, but for what time and rounds do."""
    job, member = pair.syncer.job, pair.syncer.job.members.by_id(learner_id)
    ledger = [(job.ledger.tokens(learner_id), job.ledger.discarded(learner_id, i)) for i in range(pair.num_fragments)]
    return (member.session, member.stage, member.inner_step, member.tokens, member.is_paused, ledger, job.next_seq(learner_id))


@given(sent=st.lists(st.one_of(control, contribution), min_size=1, max_size=25), incarnation=st.sampled_from([0, 0, 0, 1, HUGE]))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_nothing_that_a_member_sends_raises_or_touches_another_learner(sent, incarnation):
    pair = Pair(num_fragments=2)
    good, bad = pair.found(2)
    pair.steps([good, bad], 5)
    before = account(pair, 0)
    envelope = msg.Envelope("job", "first", 0, incarnation)
    for message in sent:
        if isinstance(message, msg.Contribution):
            _, header = wire.decode_learner_header(wire.encode(envelope, message))
            event = ev.ContributionArrived(
                session=bad.nonce, envelope=envelope, header=header, norm=1.0, is_finite=True, payload_bytes=1, crc_ok=True
            )
        else:
            _, header = wire.decode_from_learner(wire.encode(envelope, message))
            event = ev.MessageReceived(session=bad.nonce, envelope=envelope, message=header)
        for action in pair.syncer.handle(event, pair.now_s):
            if isinstance(action, Reply):
                wire.decode_from_syncer(wire.encode(envelope, action.message))
    assert account(pair, 0) == before
    for through in (c.merged_through for c in pair.syncer.job.currents):
        assert all(m.tokens <= HUGE and m.seq <= HUGE for m in through.values())


def send(pair: Pair, node, message) -> None:
    pair.take(ev.MessageReceived(session=node.nonce, envelope=pair._envelope_up(node), message=message))


@pytest.mark.parametrize(
    "message",
    [
        msg.Progress(inner_step=HUGE, tokens=1),
        msg.Progress(inner_step=1, tokens=HUGE),
        msg.NeedFull(fragment_id=2),
        msg.Leave(reason="limit", report=msg.Heartbeat(inner_step=0, tokens=HUGE)),
    ],
)
def test_what_no_learner_can_say_costs_the_sender_its_session(message):
    pair = Pair(num_fragments=2)
    good, bad = pair.found(2)
    pair.steps([good, bad], 3)
    send(pair, bad, message)
    pair.settle()
    assert bad.stage in ("refused", "fenced") and bad.detail
    pair.steps([good], 8)
    assert pair.merges()[-1].members[0].learner_id == good.learner_id
    check_tape(pair)


def test_a_counter_that_leaps_does_not_stop_the_rounds_of_the_others():
    pair = Pair(num_fragments=2)
    good, bad = pair.found(2)
    pair.steps([good, bad], 5)
    send(pair, bad, msg.Progress(inner_step=10**9, tokens=10**9))
    pair.kill(bad)
    pair.steps([good], 30)
    before = len(pair.merges())
    pair.steps([good], 8)
    assert len(pair.merges()) - before == 4


def test_a_closed_session_never_becomes_a_member_again():
    pair = Pair(num_fragments=1)
    good, bad = pair.found(2)
    pair.steps([good, bad], 2)
    pair.take(ev.PayloadFailed(session=bad.nonce, reason="oversized"))
    bad.control_down.clear()
    pair.step(bad)
    pair.settle()
    assert bad.stage == "fenced" and "given up" in bad.detail
    assert pair.syncer.job.members.by_id(1) is None
    again = pair.add(1)
    assert again.joined.incarnation == 1


def test_a_payload_that_failed_from_a_stranger_closes_its_session_only():
    pair = Pair(num_fragments=1)
    pair.found(1)
    actions = pair.syncer.handle(ev.PayloadFailed(session="ff", reason="oversized"), pair.now_s)
    assert [type(a).__name__ for a in actions] == ["CloseSession"]


def test_a_strangers_contribution_is_answered_with_a_question():
    pair = Pair(num_fragments=1)
    pair.found(1)
    header = msg.Contribution(
        fragment_id=0, seq=1, round_id=1, base=Version(0, 0), base_merged_seq=0, steps=1, tokens=1, inner_step=1, total_tokens=1, crc=0
    )
    event = ev.ContributionArrived(
        session="ff", envelope=msg.Envelope("job", "first", 0, 0), header=header, norm=1.0, is_finite=True, payload_bytes=1
    )
    drop, reply = pair.syncer.handle(event, pair.now_s)
    assert type(drop).__name__ == "DropPayload" and reply.message == msg.WhoAreYou()


def test_a_merge_that_nobody_asked_for_is_an_error_of_this_program():
    pair = Pair(num_fragments=1)
    pair.found(1)
    with pytest.raises(LocalProtocolError, match="no Close was asked for"):
        pair.take(ev.Merged(fragment_id=0, crc=1, merge_s=0.1))


# ---- the wire ---------------------------------------------------------------------------------------------------------------

DECODERS = [wire.decode_from_learner, wire.decode_from_syncer, wire.decode_learner_header, wire.decode_syncer_header]
KINDS = st.one_of(control, contribution)


@pytest.mark.parametrize("decode", DECODERS)
@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_any_bytes_are_a_message_or_a_remote_error(decode, data):
    try:
        decode(data)
    except RemoteProtocolError as error:
        assert error.reason == "wrong_layout"


@pytest.mark.parametrize("decode", DECODERS)
@given(message=KINDS, where=st.integers(0, 400), bit=st.integers(0, 7), cut=st.integers(0, 400))
@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_a_flipped_or_cut_message_is_a_message_or_a_remote_error(decode, message, where, bit, cut):
    data = bytearray(wire.encode(msg.Envelope("job", "first", 0, 0), message))
    data[where % len(data)] ^= 1 << bit
    for broken in (bytes(data), bytes(data[: cut % len(data)])):
        try:
            decode(broken)
        except RemoteProtocolError as error:
            assert error.reason == "wrong_layout"


@given(message=control)
@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_a_control_message_comes_back_as_it_was_and_only_from_its_own_side(message):
    envelope = msg.Envelope("job", "first", 3, 4)
    data = wire.encode(envelope, message)
    assert wire.decode_from_learner(data) == (envelope, message)
    for decode in (wire.decode_from_syncer, wire.decode_learner_header, wire.decode_syncer_header):
        with pytest.raises(RemoteProtocolError):
            decode(data)


def test_deep_nesting_and_false_lengths_are_refused():
    for data in (b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff" * 3):
        for decode in DECODERS:
            with pytest.raises(RemoteProtocolError):
                decode(data)
