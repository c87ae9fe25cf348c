"""Data leases on the machines, in any order of events: no sample is lost, and nothing that a peer says takes another one's."""

from __future__ import annotations

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_diloco.protocol.history import History
from lightning_diloco.protocol.identity import LeaseRange
from lightning_diloco.protocol.messages import Granted, LeaseRequest
from tests.protocol.lease_pair import LeasePair, check_tape, job
from tests.protocol.toy import Node

# ---- whatever happens -----------------------------------------------------------------------------------------------------------

actions = st.lists(
    st.tuples(
        st.sampled_from(["train", "train", "ask", "beat", "up", "down", "twice", "lose_up", "lose_down", "die", "restart"]),
        st.integers(0, 1),
    ),
    max_size=40,
)


@given(schedule=actions, num_samples=st.integers(3, 40), batch_size=st.integers(1, 5), is_counted=st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_sample_is_lost_whatever_happens_to_messages_learners_and_the_syncer(schedule, num_samples, batch_size, is_counted):
    pair, nodes = job(num_samples=num_samples, until=2, batch_size=batch_size)
    pair.take_snapshot()
    for name, m in schedule:
        play(pair, nodes, name, m, is_counted=is_counted)
    pair.finish_training()
    for epoch in range(2):
        times = {i: n for (e, i), n in pair.times.items() if e == epoch}
        account = pair.account(epoch)
        assert set(times) == set(range(num_samples)), "a sample was lost"
        assert account["done"] == num_samples
        surplus = sum(times.values()) - num_samples
        assert account["twice"] == surplus if is_counted else account["twice"] <= surplus <= account["twice"] + account["unsure"]
    check_tape(pair)


def play(pair: LeasePair, nodes: list[Node], name: str, m: int, *, is_counted: bool) -> None:
    node = nodes[m]
    if name == "train":
        pair.train(node)
    elif name == "ask":
        pair.ask(node)
    elif name == "beat":
        pair.heartbeat(node)
    elif name == "up" and node.control_up:
        pair.deliver_control_up(node)
    elif name == "twice" and node.control_up:
        pair.deliver_control_up(node, keep=True)
    elif name == "down" and node.control_down:
        pair.deliver_control_down(node)
    elif name == "lose_up":
        node.control_up.clear()
    elif name == "lose_down":
        node.control_down.clear()
    elif name == "die":
        node.control_up.clear()
        pair.die(node, is_counted=is_counted)
        pair.settle_all()
        nodes[m] = pair.join(m)
    elif name == "restart":
        pair.settle_all()
        pair.restart()


# ---- bytes of others ------------------------------------------------------------------------------------------------------------

HUGE = 2**53
total = st.one_of(st.integers(0, 50), st.sampled_from([2**31, HUGE]))
count = st.one_of(total, st.just(2**62))
number = st.one_of(st.integers(1, 9), st.sampled_from([HUGE]))
ranges = st.lists(st.builds(LeaseRange, count, count, count), max_size=3).map(tuple)
request = st.builds(
    LeaseRequest,
    number=number,
    wanted=count,
    batch_size=number,
    until=st.one_of(st.none(), count),
    samples=total,
    known=st.lists(st.builds(Granted, number, ranges, total), max_size=3).map(tuple),
)


@given(sent=st.lists(request, min_size=1, max_size=12), has_started_again=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_raises_or_takes_what_another_learner_was_given(sent, has_started_again):
    pair, (good, bad) = job(num_samples=40, until=None)
    if has_started_again:  # only then grants that are told are taken
        pair.take_snapshot()
        pair.stocks[bad.nonce]._known.clear()
        pair.restart()
    ledger = pair.syncer.job.leases
    assert ledger is not None
    held = ledger.held(0, 0)
    for message in sent:
        pair._send(bad, message)
        pair.settle()
    assert ledger.held(0, 0) == held
    for account in ledger.accounts():
        assert account["done"] + account["free"] + account["outstanding"] == 40
    history = History()
    for record in pair.tape:
        history.feed(msgspec.convert(msgspec.to_builtins(record), type(record)))
    assert history.leases is not None and history.leases.accounts() == ledger.accounts()
