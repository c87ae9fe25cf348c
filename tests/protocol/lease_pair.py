"""A `RestartingPair` whose learners draw leased samples: on a link that a test may cut, with a book of all trainings."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.identity import DataSpec
from lightning_diloco.protocol.lease_fold import fold_leases
from lightning_diloco.protocol.lease_stock import LeaseStock
from lightning_diloco.protocol.messages import Heartbeat, LeaseGrant
from lightning_diloco.protocol.records import LeaseRecord, TapeLine, decode_line, encode_line
from lightning_diloco.protocol.wire import decode_from_syncer
from tests.protocol.restarting import RestartingPair
from tests.protocol.toy import Node
from tests.tape_leases import lease_figures

__all__ = ["LeasePair", "check_covered", "check_tape", "job"]


class LeasePair(RestartingPair):
    """The whole job in one process.

    Args:
        num_samples: of the data set.
        until: epochs that the job has.
        batch_size: of every learner.
        is_supervised: whether somebody says who is dead.
    """

    def __init__(self, *, num_samples: int, until: int | None, batch_size: int = 2, is_supervised: bool = True, **options: Any) -> None:
        super().__init__(num_fragments=1, options={"is_supervised": is_supervised, "takeover_token": "mine"}, **options)
        self.spec = DataSpec(num_samples=num_samples, is_shuffled=False, seed=7)
        self.until, self.batch_size = until, batch_size
        self.stocks: dict[str, LeaseStock] = {}
        self.times: Counter[tuple[int, int]] = Counter()
        self.again: Counter[tuple[int, int]] = Counter()
        self.trained_by: dict[str, list[tuple[int, int]]] = {}
        self._lives = itertools.count()

    def join(self, learner_id: int) -> Node:
        """A process joins and has its first samples."""
        self.stocks[f"{len(self.nodes) + 1:02x}"] = LeaseStock(self.spec, until=self.until, share=-(-self.spec.num_samples // 2))
        node = self.add(learner_id, data=self.spec, takeover_token="mine")
        self.trained_by[node.nonce] = []
        self.ask(node)
        self.settle()
        return node

    def ask(self, node: Node, *, batches_ahead: int = 1) -> bool:
        """What the background thread says at a turn; returns whether it had anything to ask."""
        epoch = node.machine.state.envelope.epoch
        request = self.stocks[node.nonce].request(batch_size=self.batch_size, batches_ahead=batches_ahead, syncer_epoch=epoch)
        if request is not None and not node.is_dead:
            self._send(node, request)
        return request is not None

    def train(self, node: Node, *, batches: int = 1) -> int:
        """Draw batches, train each and pass the boundary; returns how many samples there were."""
        stock, count = self.stocks[node.nonce], 0
        for _ in range(batches):
            item = stock.draw(self.batch_size)
            if item == "over":
                stock.begin()
                item = stock.draw(self.batch_size)
            if isinstance(item, str):
                break
            positions = [(item.epoch, i) for i in range(item.start, item.stop)]
            self.times.update(positions)
            self.trained_by[node.nonce] += positions
            stock.processed(len(positions))
            stock.stepped()
            self.step(node, tokens=len(positions))
            count += len(positions)
        return count

    def heartbeat(self, node: Node) -> None:
        """A full report, samples included."""
        stock = self.stocks[node.nonce]
        report = node.machine.report()
        fields = {name: getattr(report, name) for name in report.__struct_fields__}
        self._send(node, Heartbeat(**{**fields, "samples": stock.samples, "again": stock.reported_again()}))

    def settle_all(self) -> None:
        """As in `RestartingPair`; and everyone asks."""
        super().settle_all()
        for node in self.nodes:
            if not node.is_dead and node.stage == "joined":
                self.ask(node)
        self.settle()

    def die(self, node: Node, *, is_counted: bool) -> None:
        """A process is killed, and the supervisor says so; its counter file may tell what it had trained."""
        self.kill(node)
        member = self.syncer.job.members.of(node.nonce)
        if member is None:
            return
        if is_counted:
            totals = {"inner_steps": node.machine.state.inner_step, "tokens": node.machine.state.tokens}
            samples = self.stocks[node.nonce].samples
            self.take(ev.CountersRead(learner_id=member.learner_id, incarnation=member.incarnation, samples=samples, **totals))
        self.take(ev.LearnerLost(learner_id=member.learner_id, incarnation=member.incarnation, reason="died"))

    def lose_lines(self, count: int) -> None:
        """The machine goes down with so many grants that are not on the disk."""
        for i in sorted((i for i, r in enumerate(self.tape) if isinstance(r, LeaseRecord)), reverse=True)[:count]:
            del self.tape[i]

    def deliver_control_down(self, node: Node, *, keep: bool = False) -> None:
        """As in `Pair`; grants go to the stock."""
        envelope, message = decode_from_syncer(node.control_down[0])
        if isinstance(message, LeaseGrant) and node.machine.heeds(envelope, message):
            self.stocks[node.nonce].granted(message, node.machine.state.envelope.epoch)
        super().deliver_control_down(node, keep=keep)

    def finish_training(self, *, limit: int = 400) -> None:
        """Everybody goes on until nothing is left."""
        for _ in range(limit):
            living = [n for n in self.nodes if not n.is_dead and n.stage == "joined"]
            count = sum(self.train(node) for node in living)
            self.settle_all()
            if not count and all(self.stocks[n.nonce].is_over and not self.stocks[n.nonce].queued for n in living):
                return
        raise AssertionError("the job does not come to its end")

    def account(self, epoch: int = 0) -> dict[str, Any]:
        """What the ledger says of an epoch."""
        assert self.syncer.job.leases is not None
        (found,) = [x for x in self.syncer.job.leases.accounts() if x["epoch"] == epoch]
        return found


def job(count: int = 2, **options: Any) -> tuple[LeasePair, list[Node]]:
    pair = LeasePair(**{"num_samples": 40, "until": 1, **options})
    return pair, [pair.join(i) for i in range(count)]


def check_covered(pair: LeasePair, *, but_twice: int | None = 0) -> None:
    """Every sample of every epoch was trained, and the ledger says how often; so does a fold of the tape."""
    assert pair.until is not None
    for epoch in range(pair.until):
        account = pair.account(epoch)
        times = {i: n for (e, i), n in pair.times.items() if e == epoch}
        assert set(times) == set(range(pair.spec.num_samples)), "a sample was lost"
        assert (account["done"], account["free"], account["outstanding"]) == (pair.spec.num_samples, 0, 0)
        assert account["twice"] == sum(times.values()) - pair.spec.num_samples
        assert but_twice is None or account["twice"] == but_twice
    check_tape(pair)


def check_tape(pair: LeasePair) -> None:
    ledger, sessions = None, {}
    for i, record in enumerate(pair.tape):
        ledger = fold_leases(ledger, decode_line(encode_line(TapeLine(i, 0.0, record))).record, sessions)
    assert ledger is not None and pair.syncer.job.leases is not None
    assert ledger.accounts() == pair.syncer.job.leases.accounts()
    plain = [json.loads(encode_line(TapeLine(i, 0.0, record))) for i, record in enumerate(pair.tape)]
    figures, samples = lease_figures(plain)
    assert figures == ledger.accounts()
    assert samples == {m: ledger.samples(m) for m in samples}
