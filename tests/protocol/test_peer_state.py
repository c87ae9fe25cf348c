"""Who is asked for inner optimizer state, who gets it, and that a request ends whatever happens."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol import actions as act
from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.messages import PeerState, PeerStateRequest, PeerStateWanted
from lightning_diloco.protocol.peer_state import ANSWER_S, MAX_AT_ONCE, MAX_PEERS, MAX_RELAYS, TRANSFER_S
from lightning_diloco.protocol.wire import decode_from_learner, encode
from tests.protocol.pair import Node, Pair


class Desk(Pair):
    """A job that notes what becomes of requests."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.asked: list[tuple[str, PeerStateWanted]] = []
        self.relayed: list[act.RelayPeerState] = []
        self.dropped: list[int] = []

    def _perform_syncer(self, action: act.SyncerAction) -> None:
        if isinstance(action, act.Reply) and isinstance(action.message, PeerStateWanted):
            self.asked.append((action.session, action.message))
        elif isinstance(action, act.RelayPeerState):
            self.relayed.append(action)
        elif isinstance(action, act.DropPeerState):
            self.dropped.append(action.ticket)
        super()._perform_syncer(action)

    def ask(self, node: Node, fragment_id: int = 0, attempt: int = 0) -> None:
        message = PeerStateRequest(fragment_id=fragment_id, optimizers=("AdamW",), attempt=attempt)
        envelope, decoded = decode_from_learner(encode(self._envelope_up(node), message))
        self.take(ev.MessageReceived(session=node.nonce, envelope=envelope, message=decoded))

    def answer(self, session: str, wanted: PeerStateWanted) -> None:
        header = PeerState(ticket=wanted.ticket, fragment_id=wanted.fragment_id)
        assert self.syncer.peer_states.offered(session, header)
        self.take(ev.PeerStateArrived(session=session, header=header))

    @property
    def num_requests(self) -> int:
        return len(self.syncer.peer_states._requests)


def job(count: int = 3, **options) -> tuple[Desk, list[Node], Node]:
    """A job in its midst: so many learners, of which the later ones have done more steps, and one that has just joined."""
    desk = Desk(**options)
    old = desk.found(count)
    desk.steps(old, 5)
    for i, node in enumerate(old):
        for _ in range(i):
            desk.step(node)
    desk.advance(0.5)
    desk.settle()
    return desk, old, desk.add(9)


def test_the_peer_with_most_steps_is_asked_and_what_it_gives_goes_to_the_one_that_asked():
    desk, old, young = job()
    desk.ask(young, fragment_id=1)
    ((session, wanted),) = desk.asked
    assert session == old[-1].nonce and (wanted.fragment_id, wanted.optimizers) == (1, ("AdamW",))
    desk.answer(session, wanted)
    (relayed,) = desk.relayed
    assert relayed.session == young.nonce and relayed.header.fragment_id == 1
    assert desk.num_requests == 1
    desk.take(ev.PeerStateRelayed(ticket=wanted.ticket))
    assert desk.num_requests == 0


def test_an_answer_of_no_use_leads_to_another_peer():
    desk, old, young = job()
    for attempt in range(MAX_RELAYS):
        desk.ask(young, attempt=attempt)
        session, wanted = desk.asked[-1]
        desk.answer(session, wanted)
        desk.take(ev.PeerStateRelayed(ticket=wanted.ticket))
    assert [session for session, _ in desk.asked] == [old[i].nonce for i in (2, 1, 0)]


def test_a_learner_that_asks_for_ever_gets_each_fragment_a_few_times_in_each_life():
    desk, old, young = job()
    for fragment_id in (0, 1):
        for _ in range(3 * MAX_RELAYS):
            desk.ask(young, fragment_id=fragment_id)
            if desk.num_requests:
                session, wanted = desk.asked[-1]
                desk.answer(session, wanted)
                desk.take(ev.PeerStateRelayed(ticket=wanted.ticket))
    assert [relayed.header.fragment_id for relayed in desk.relayed] == [0] * MAX_RELAYS + [1] * MAX_RELAYS
    assert len(desk.asked) == 2 * MAX_RELAYS
    desk.take(ev.LearnerLost(learner_id=9))
    desk.ask(desk.add(9))
    assert len(desk.asked) == 2 * MAX_RELAYS + 1, "a new life may ask"


def test_a_peer_that_offers_again_and_again_does_not_keep_its_place():
    desk, old, young = job()
    desk.ask(young)
    session, wanted = desk.asked[0]
    header = PeerState(ticket=wanted.ticket, fragment_id=0)
    start_s = desk.now_s
    while desk.syncer.peer_states.offered(session, header):
        assert desk.now_s <= start_s + 2 * TRANSFER_S
        desk.steps(old, 1, dt_s=TRANSFER_S / 4)
    assert desk.now_s >= start_s + TRANSFER_S and desk.asked[-1][0] != session


def test_what_comes_for_a_learner_that_is_gone_is_refused_when_it_is_offered_again():
    desk, _, young = job()
    desk.ask(young)
    session, wanted = desk.asked[0]
    header = PeerState(ticket=wanted.ticket, fragment_id=0)
    assert desk.syncer.peer_states.offered(session, header)
    desk.take(ev.LearnerLost(learner_id=9))
    assert not desk.syncer.peer_states.offered(session, header)


def test_asking_again_while_an_answer_is_under_way_changes_nothing():
    desk, _, young = job()
    for _ in range(3):
        desk.ask(young)
    session, wanted = desk.asked[0]
    desk.answer(session, wanted)
    desk.ask(young, fragment_id=1)
    assert len(desk.asked) == 1 and desk.num_requests == 1


def test_nobody_is_asked_who_is_paused_or_alone():
    desk = Desk()
    (only,) = desk.found(1)
    desk.steps([only], 3)
    desk.ask(only)
    assert not desk.asked
    young = desk.add(9)
    desk.feed(only, ev.PauseChanged(is_paused=True))
    desk.settle()
    desk.ask(young)
    assert not desk.asked and desk.num_requests == 2
    desk.feed(only, ev.PauseChanged(is_paused=False))
    desk.settle()
    desk.step(only)
    desk.settle()
    assert [session for session, _ in desk.asked] == [only.nonce]


def test_requests_of_many_newcomers_wait_in_line_and_go_to_different_peers():
    desk, old, first = job()
    young = [first, *(desk.add(i) for i in range(10, 15))]
    for node in young:
        desk.ask(node)
    assert len(desk.asked) == MAX_AT_ONCE and len({session for session, _ in desk.asked}) == MAX_AT_ONCE
    for i in range(len(young)):
        session, wanted = desk.asked[i]
        desk.answer(session, wanted)
        desk.take(ev.PeerStateRelayed(ticket=wanted.ticket))
    assert [relayed.session for relayed in desk.relayed] == [node.nonce for node in young]
    assert desk.num_requests == 0 and {session for session, _ in desk.asked} <= {node.nonce for node in old}


def test_a_peer_that_does_not_answer_is_followed_by_others_and_then_the_request_ends():
    desk, old, young = job()
    desk.ask(young)
    while desk.num_requests:
        desk.steps(old, int(ANSWER_S) + 1)
    assert [session for session, _ in desk.asked] == [old[i].nonce for i in (2, 1, 0)] and len(desk.asked) == MAX_PEERS
    desk.ask(young)
    assert len(desk.asked) == MAX_PEERS + 1


def test_a_peer_that_dies_is_followed_by_another_one_at_once():
    desk, old, young = job()
    for is_sending in (False, True):
        desk.ask(young)
        session, wanted = desk.asked[-1]
        if is_sending:
            assert desk.syncer.peer_states.offered(session, PeerState(ticket=wanted.ticket, fragment_id=0))
        learner_id = next(node.learner_id for node in old if node.nonce == session)
        desk.take(ev.LearnerLost(learner_id=learner_id))
        assert desk.asked[-1][0] != session
        # What the dead one had on its way comes after all.
        desk.take(ev.PeerStateArrived(session=session, header=PeerState(ticket=wanted.ticket, fragment_id=0)))
        assert not desk.relayed


def test_a_learner_that_is_gone_gets_nothing_and_its_payload_is_dropped():
    desk, _, young = job()
    desk.ask(young)
    session, wanted = desk.asked[0]
    desk.answer(session, wanted)
    desk.take(ev.LearnerLost(learner_id=9))
    assert desk.dropped == [wanted.ticket] and desk.num_requests == 0
    desk.take(ev.PeerStateRelayed(ticket=wanted.ticket))


def test_a_payload_that_nobody_takes_does_not_hold_the_place_for_ever():
    desk, old, young = job()
    desk.ask(young)
    desk.answer(*desk.asked[0])
    desk.steps(old, 3, dt_s=TRANSFER_S / 2)
    assert desk.dropped == [desk.asked[0][1].ticket] and desk.num_requests == 0


@pytest.mark.parametrize("case", ["ticket", "fragment", "sender", "twice"])
def test_what_was_not_asked_for_is_refused(case):
    desk, old, young = job()
    desk.ask(young, fragment_id=1)
    session, wanted = desk.asked[0]
    header = PeerState(ticket=wanted.ticket + (case == "ticket"), fragment_id=0 if case == "fragment" else 1)
    if case == "sender":
        session = young.nonce
    if case == "twice":
        desk.answer(session, wanted)
    assert not desk.syncer.peer_states.offered(session, header)
    desk.take(ev.PeerStateArrived(session=session, header=header))
    assert len(desk.relayed) == (case == "twice")


def test_a_request_for_a_fragment_that_there_is_not_ends_the_session_and_nothing_else():
    desk, old, young = job()
    desk.ask(young, fragment_id=7)
    assert not desk.asked and desk.syncer.job.members.by_id(9) is None
    assert len(desk.syncer.job.members.joined()) == len(old)
