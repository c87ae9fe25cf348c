"""What happens to a transfer after a loss, a restart, a cancellation: without sockets."""

from __future__ import annotations

from collections import Counter

from lightning_diloco.runtime.transport.frames import Begin, Cancel, Chunk, Grant
from tests.runtime.transport_link import BOOT, WINDOW, Link


def _begin(link: Link, payload: bytes) -> int:
    """Offer a payload and bring the first grant home."""
    transfer_id = link.add(payload)
    assert link.send()
    link.arrive(*link.forward.pop(0))
    link.return_(link.back.pop(0))
    return transfer_id


def _send_all(link: Link) -> list[int]:
    """Send what may be sent; the chunk indices, -1 for other frames."""
    while link.send():
        pass
    return [frame.index if isinstance(frame, Chunk) else -1 for frame, _ in link.forward]


def test_after_a_loss_sending_goes_on_from_what_the_receiver_holds() -> None:
    link = Link()
    _begin(link, bytes(range(40)))
    assert _send_all(link) == [0, 1, 2]
    link.arrive(*link.forward.pop(0))
    link.forward.clear()  # 1 and 2 are lost, and the grant for 0 as well
    link.back.clear()
    link.now_s += 5.0
    assert _send_all(link) == [-1]
    link.arrive(*link.forward.pop(0))
    assert link.back == [Grant(BOOT + 1, 2, 1, 1 + WINDOW)]
    link.return_(link.back.pop(0))
    assert _send_all(link) == [1, 2, 3]


def test_a_grant_for_an_earlier_offer_moves_no_credit() -> None:
    link = Link()
    transfer_id = _begin(link, bytes(40))
    assert _send_all(link) == [0, 1, 2]
    link.forward.clear()
    link.now_s += 5.0
    assert _send_all(link) == [-1]
    link.return_(Grant(transfer_id, 1, 2, 2 + WINDOW))
    assert _send_all(link) == [-1]
    link.return_(Grant(transfer_id, 2, 0, WINDOW))
    assert _send_all(link) == [-1, 0, 1, 2]


def test_progress_makes_the_wait_short_again() -> None:
    link = Link()
    transfer_id = _begin(link, bytes(40))
    for wait_s in (5.0, 10.0):
        assert link.sender.deadline_s() == link.now_s + wait_s
        link.now_s += wait_s
        assert link.send()
    assert link.sender.deadline_s() == link.now_s + 20.0
    link.return_(Grant(transfer_id, 3, 2, 2 + WINDOW))
    assert link.sender.deadline_s() == link.now_s + 5.0


def test_a_cancellation_frees_the_receiver_and_a_late_copy_of_the_offer_does_not_start_again() -> None:
    link = Link()
    transfer_id = _begin(link, bytes(40))
    offer = Begin(transfer_id, 1, b"%d" % transfer_id, 40, 10, link.sender._queue[0].crc)
    assert link.receiver.buffer_bytes == 40
    link.cancel(transfer_id)
    assert link.send()
    assert link.forward == [(Cancel(transfer_id), b"")]
    link.arrive(*link.forward.pop(0))
    assert link.receiver.buffer_bytes == 0
    link.arrive(offer, b"")
    assert link.receiver.buffer_bytes == 0
    assert link.drops == {"duplicate_begin": 1}
    assert link.sender.is_idle


def test_a_blocked_peer_is_tried_again_at_growing_intervals_and_at_once_when_it_is_heard() -> None:
    link = Link()
    link.add(b"x")
    link.sender.hash_some(1)
    waits = []
    for _ in range(8):
        assert link.sender.peek(link.now_s) is not None
        link.sender.mark_blocked(link.now_s)
        assert link.sender.peek(link.now_s) is None
        deadline_s = link.sender.deadline_s()
        assert deadline_s is not None
        waits.append(round(deadline_s - link.now_s, 3))
        link.now_s = deadline_s
    assert waits == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0]
    link.sender.mark_blocked(link.now_s)
    link.sender.unblock()
    assert link.sender.peek(link.now_s) is not None


def test_a_restarted_receiver_gets_the_whole_payload_again() -> None:
    link = Link()
    link.add(bytes(range(40)))
    link.send()
    link.arrive(*link.forward.pop(0))
    link.return_(link.back.pop(0))
    while link.send():
        pass
    while link.forward:
        link.arrive(*link.forward.pop(0))
    link.back.clear()
    link.receiver = link.new_receiver()
    link.settle()
    assert link.intact() == Counter([BOOT + 1])
    assert link.drops["offered_again"] == 1


def test_a_restarted_sender_is_not_taken_for_the_old_one() -> None:
    link = Link()
    link.add(b"first life")
    link.settle()
    link.sender = link.new_sender()
    link.next_id = 3 << 32  # another boot, drawn smaller than the old one
    link.add(b"second life")
    link.settle()
    assert [bytes(d.payload or b"") for d in link.delivered] == [b"first life", b"second life"]


def test_a_timer_that_fires_early_sends_no_chunk_twice() -> None:
    link = Link()
    link.add(bytes(60))
    num_sent = 0
    for _ in range(300):
        link.now_s += 1.7  # a slow link: every frame takes long enough for the timer to fire now and then
        num_sent += link.send() and isinstance(link.forward[-1][0], Chunk)
        if link.forward:
            link.arrive(*link.forward.pop(0))
        if link.back:
            link.return_(link.back.pop(0))
    assert link.intact() == Counter([BOOT + 1])
    assert num_sent == 15
    assert link.drops["duplicate_chunk"] == 0


def test_the_wait_between_repetitions_doubles_up_to_its_limit() -> None:
    link = Link()
    link.add(b"nobody answers")
    times = []
    for _ in range(1200):
        if link.send() and isinstance(link.forward[-1][0], Begin):
            times.append(link.now_s)
        link.now_s += 0.125
    gaps = [round(b - a, 3) for a, b in zip(times, times[1:], strict=False)]
    assert gaps[:4] == [5.0, 10.0, 20.0, 20.0]
