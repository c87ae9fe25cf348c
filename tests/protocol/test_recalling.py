"""A syncer that starts again asks learners for versions: words are lost, ways for payloads are shut, holders fall silent."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import Recall
from lightning_diloco.protocol.recalling import AGAIN_S, GIVE_UP_S, SEEK_S
from lightning_diloco.protocol.records import RestartRecord
from tests.protocol.moves import bulk_up, control, down
from tests.protocol.restarting import RestartingPair
from tests.protocol.toy import Node


def recalling(num_learners: int, *, has_snapshot: bool = True) -> tuple[RestartingPair, list[Node]]:
    """A job whose learners are ahead of its snapshot, at the moment at which the next syncer's `Recall`s are on their way."""
    pair = RestartingPair(num_fragments=2)
    nodes = pair.found(num_learners)
    pair.take_snapshot()
    pair.steps(nodes, 20)
    if not has_snapshot:
        pair.snapshot = []
    pair.crash()
    for node in nodes:
        pair.heartbeat(node)
    while not any(recalls(node) for node in nodes):
        for node in nodes:
            while node.control_down and not recalls(node):
                pair.deliver_control_down(node)
        for node in nodes:
            while node.control_up:
                pair.deliver_control_up(node)
    return pair, nodes


def recalls(node: Node) -> list[int]:
    """Fragments that this learner is being asked for."""
    return [m.fragment_id for m in down(node) if isinstance(m, Recall)]


def report(pair: RestartingPair, *nodes: Node) -> None:
    """A second passes, and these learners report over control; what is asked of them reaches nobody."""
    pair.advance(1.0)
    for node in nodes:
        pair.heartbeat(node)
        while node.control_up:
            pair.deliver_control_up(node)


def lose(*nodes: Node) -> None:
    """What is on its way to these learners goes with their connections."""
    for node in nodes:
        node.control_down.clear()


def test_a_recall_that_was_lost_is_said_again():
    pair, nodes = recalling(2)
    held = nodes[0].machine.state.fragments[0].held
    lose(*nodes)
    for _ in range(int(AGAIN_S) - 1):
        report(pair, *nodes)
        assert not any(recalls(node) for node in nodes), "it may still come"
    report(pair, *nodes)
    assert sorted(recalls(nodes[0]) + recalls(nodes[1])) == [0, 1]
    pair.settle()
    (restart,) = pair.of(RestartRecord)
    assert restart.versions == (Version(1, held.n),) * 2 and restart.recalled == (0, 1)


def test_it_is_said_again_at_once_when_its_learner_says_hello():
    pair, (a,) = recalling(1)
    lose(a)
    pair.hello(a)
    pair.deliver_control_up(a)
    assert recalls(a) == [0, 1]


def test_who_sends_is_not_asked_again_however_long_it_takes_and_is_when_nothing_more_comes():
    pair, (a,) = recalling(1)
    lose(a)
    held = a.machine.state.fragments[0].held
    while pair.now_s < 1e6 + 20 + 1.5 * GIVE_UP_S:
        report(pair, a)
        pair.take(ev.HeldMoves(session=a.nonce))
        pair.hello(a)
        pair.deliver_control_up(a)
        assert not recalls(a)
    assert pair.syncer.recovery.expects(a.nonce, 0, held) and pair.syncer.recovery.expects(a.nonce, 1, held)
    for _ in range(int(AGAIN_S)):
        report(pair, a)
    assert recalls(a) == [0, 1]


def test_a_copy_of_a_recall_changes_nothing():
    pair, (a,) = recalling(1)
    for _ in range(2 * len(recalls(a))):
        pair.deliver_control_down(a, keep=True)
    pair.settle()
    before = [c.version for c in pair.syncer.job.currents]
    assert len(pair.of(RestartRecord)) == 1 and {v.epoch for v in before} == {1}
    pair.steps([a], 8)
    assert all(pair.version(i) > before[i].n for i in (0, 1))


def test_another_holder_is_asked_when_nothing_comes_and_who_is_first_counts():
    pair, (a, b) = recalling(2)
    first = {p: node for node in (a, b) for p in recalls(node)}
    held = a.machine.state.fragments[0].held
    assert first[0] is not first[1] and b.machine.state.fragments[0].held == held
    lose(a, b)
    shut, other = first[0], first[1]
    for _ in range(int(SEEK_S)):
        assert not pair.syncer.recovery.expects(other.nonce, 0)
        report(pair, shut, other)
        lose(shut)
        while other.control_down:
            pair.deliver_control_down(other)
        bulk_up(pair, other)
    assert pair.of(RestartRecord)[0].versions == (Version(1, held.n),) * 2
    assert not pair.syncer.recovery.expects(shut.nonce, 0)


def test_a_slow_holder_is_still_taken_when_another_one_was_asked_too():
    pair, (a, b) = recalling(2)
    shut, other = (a, b) if 0 in recalls(a) else (b, a)
    control(pair, shut)
    lose(other)
    for _ in range(int(SEEK_S)):
        report(pair, a, b)
        lose(a, b)
    assert pair.syncer.recovery.expects(other.nonce, 0) and pair.syncer.recovery.expects(shut.nonce, 0)
    bulk_up(pair, shut)
    assert not pair.syncer.recovery.expects(other.nonce, 0)


def test_a_holder_of_which_no_byte_comes_is_given_up_for_the_snapshot_and_the_log_can_say_so():
    pair, (a,) = recalling(1)
    held, since_s = a.machine.state.fragments[0].held, pair.now_s
    while pair.syncer.job.is_recovering:
        assert pair.now_s < since_s + GIVE_UP_S and pair.syncer.recovery.recalls.awaited == {0: (0,), 1: (0,)}
        lose(a)
        report(pair, a)
    assert pair.now_s == since_s + GIVE_UP_S
    assert [v.n for v in pair.of(RestartRecord)[0].versions] == [0, 0]
    assert [(x.fragment_id, x.learner_id, x.version) for x in pair.syncer.recovery.recalls.unmet] == [(0, 0, held), (1, 0, held)]


@pytest.mark.parametrize("quiet_s", [GIVE_UP_S + 60, 60])
def test_the_only_holder_is_waited_for_where_there_is_no_snapshot(quiet_s):
    """It is heard and sends nothing for longer than anybody is waited for, or its link is down for a while: it is asked when it is back."""
    pair, (a,) = recalling(1, has_snapshot=False)
    held, until_s = a.machine.state.fragments[0].held, pair.now_s + quiet_s
    while pair.now_s < until_s:
        lose(a)
        report(pair, *([a] if quiet_s > GIVE_UP_S else []))
    assert pair.syncer.recovery.recalls.missing == (() if quiet_s > GIVE_UP_S else (0, 1))
    for _ in range(int(AGAIN_S)):
        report(pair, a)
        pair.settle()
    assert pair.of(RestartRecord)[0].versions == (Version(1, held.n),) * 2
