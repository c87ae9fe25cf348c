"""Small moves on a `Pair`: what is on its way, and how to bring a job to a certain moment."""

from __future__ import annotations

from lightning_diloco.protocol.messages import Contribution, Publication
from lightning_diloco.protocol.wire import decode_from_learner, decode_from_syncer, decode_learner_header, decode_syncer_header
from tests.protocol.pair import Node, Pair


def down(node: Node) -> list:
    """Control messages on their way to a learner."""
    return [decode_from_syncer(data)[1] for data in node.control_down]


def up(node: Node) -> list:
    """Control messages on their way to the syncer."""
    return [decode_from_learner(data)[1] for data in node.control_up]


def payloads(node: Node) -> list[Contribution]:
    """Contributions on their way to the syncer."""
    return [decode_learner_header(data)[1] for kind, data, _ in node.bulk_up if kind == "contribution"]


def publications(node: Node) -> list[Publication]:
    """Publications on their way to a learner."""
    return [h for h in (decode_syncer_header(data)[1] for data, _ in node.bulk_down) if isinstance(h, Publication)]


def control(pair: Pair, node: Node) -> None:
    """Both control queues of one learner are emptied, bulk is left alone."""
    while node.control_up or node.control_down:
        while node.control_up:
            pair.deliver_control_up(node)
        while node.control_down:
            pair.deliver_control_down(node)


def bulk_up(pair: Pair, node: Node) -> None:
    """What the learner sent on bulk arrives."""
    while node.bulk_up:
        pair.deliver_bulk_up(node)


def bulk_down(pair: Pair, node: Node) -> None:
    """What was sent to the learner on bulk arrives."""
    while node.bulk_down:
        pair.deliver_bulk_down(node)


def contribute(pair: Pair, node: Node) -> None:
    """Step until a contribution of this learner is in flight."""
    for _ in range(3 * pair.config.sync_interval_steps):
        pair.step(node)
        control(pair, node)
        if payloads(node):
            return
    raise AssertionError("nobody asked for a contribution")


def pull(pair: Pair, *nodes: Node) -> None:
    """Bring a job with one fragment to the moment at which all of these learners are asked for a contribution."""
    pair.steps(list(nodes), 4)
    for stepping in nodes * 2:
        if all(n.machine.state.fragments[0].pulled_by is None for n in nodes):
            pair.step(stepping)
        for node in nodes:
            control(pair, node)
    assert all(n.machine.state.fragments[0].pulled_by is not None for n in nodes)


def atoms(pair: Pair, learner_id: int) -> list[int]:
    """All work of one learner."""
    return [a for a, (m, _) in pair.tokens_of.items() if m == learner_id]
