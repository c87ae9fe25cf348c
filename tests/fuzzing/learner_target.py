"""A live learner under fire: the real client in a process of its own, and a syncer that founds with it in good faith, then says anything.

What a learner's own syncer may order is not among the shots: the end of the training, a version that follows and has its checksum, a
refusal of the contribution on its way for its values. So nothing of the learner may change: it must end with the parameters that the same
steps give without any syncer, bit for bit.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file

from lightning_diloco.outer import plan_layout
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import (
    Contribution,
    Describe,
    Envelope,
    Fenced,
    Found,
    FoundingFragment,
    FoundingStatic,
    Hello,
    JoinRefused,
    Leave,
    Left,
    Message,
    NotHeld,
    Ping,
    Pong,
    Publication,
    Ready,
    Recall,
    Resolved,
    SendState,
    ShardAddress,
    Stop,
    Welcome,
)
from lightning_diloco.protocol.wire import decode_from_learner, decode_learner_header, encode
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.transport import ControlReceived, PayloadReceived, SyncerTransport
from lightning_diloco.runtime.transport.frames import FRAME_KIND, Begin, Refused, decode_reply, encode_frame
from lightning_diloco.runtime.transport.sockets import send_parts
from tests.fuzzing.honest import CONFIG, TOKENS, PlainSGD, make_module
from tests.fuzzing.payloads import FLOATS, payload_of
from tests.fuzzing.shots import LEARNER, SYNCER, Shot, Shots, World
from tests.fuzzing.syncer_target import PATIENCE_S
from tests.fuzzing.tally import Tally
from tests.runtime.job_helpers import step

JOB = Envelope("the-job", "the-lineage", 3, 2)
BATCH = 200
FAR = Version(JOB.epoch, 2**40)
"""A version that nobody holds: a learner that is asked for it says so at once."""


class FalseSyncer(SyncerTransport):
    """The other side of one learner."""

    def __init__(self, tally: Tally) -> None:
        super().__init__(accept=lambda *_: True)
        module = make_module()
        self.tally = tally
        self.layout = plan_layout(
            module, num_fragments=CONFIG.num_fragments, merge=CONFIG.merge, mean_patterns=CONFIG.mean_patterns, include_frozen=False
        )
        self.bind()
        self.peer = b""
        self.heard: list[Message] = []
        self.headers: list[Message] = []
        self.contributions: list[Contribution] = []
        self.refused: set[int] = set()

    def _on_control(self, peer: bytes, data: memoryview) -> None:
        self.tally.heard(data, LEARNER)
        frame = decode_reply(bytes(data[1:])) if bytes(data[:1]) == FRAME_KIND else None
        if isinstance(frame, Refused):
            self.refused.add(frame.transfer_id)
        super()._on_control(peer, data)

    def say(self, message: Message) -> None:
        self.send_control(self.peer, encode(JOB, message))

    def turn(self, timeout_s: float = 0.02) -> None:
        """Take what has come, and answer the pings."""
        for event in self.poll(timeout_s):
            if isinstance(event, ControlReceived):
                self.peer = event.peer
                message = decode_from_learner(event.data)[1]
                self.heard.append(message)
                if isinstance(message, Ping):
                    self.say(Pong(number=message.number))
            elif isinstance(event, PayloadReceived):
                header = decode_learner_header(event.header)[1]
                (self.contributions if isinstance(header, Contribution) else self.headers).append(header)

    def acknowledge(self) -> None:
        """What the learner has handed over is held; without that word it does not leave."""
        for header in self.contributions:
            self.say(Resolved(fragment_id=header.fragment_id, seq=header.seq, outcome="held"))
        self.contributions.clear()

    def wait_for(self, kind: type[Message]) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not any(isinstance(message, kind) for message in self.heard):
            assert time.monotonic() < end_s, f"the learner does not say {kind.__name__}"
            self.turn()
        self.heard.clear()

    def found(self) -> None:
        """What an honest syncer does until its first learner is a member."""
        shards = (ShardAddress(bulk_endpoint=self.bulk_endpoint),)
        self.wait_for(Hello)
        self.say(Welcome(role="founder", learner_id=0, incarnation=JOB.incarnation, shards=shards))
        self.wait_for(Found)
        self.say(SendState())
        end_s, parts = time.monotonic() + PATIENCE_S, len(self.layout.fragments) + bool(self.layout.static)
        while sum(isinstance(h, FoundingFragment | FoundingStatic) for h in self.headers) < parts:
            assert time.monotonic() < end_s, "the founding does not come"
            self.turn()
        self.say(
            Welcome(role="member", learner_id=0, incarnation=JOB.incarnation, shards=shards, next_seq=(1,) * len(self.layout.fragments))
        )
        self.wait_for(Ready)

    def fire(self, shot: Shot) -> None:
        """Send it, however long the socket is full."""
        if shot.control is not None:
            self._send(self._control, b"c", (shot.control,))
        for parts in shot.bulk:
            self._send(self._bulk, b"b", parts)

    def _send(self, sock: Any, prefix: bytes, parts: tuple[bytes, ...]) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not send_parts(sock, [prefix + self.peer, *parts]):
            assert time.monotonic() < end_s, "the learner takes nothing any more"
            self.turn(0.002)

    def barrier(self, number: int) -> None:
        """Everything before this was taken: both channels answer. Said again, should a connection have been cut."""
        end_s, again_s, transfer_id = time.monotonic() + PATIENCE_S, 0.0, number << 32 | 7
        self.heard.clear()
        self.refused.clear()
        last = len(self.layout.fragments) - 1
        while not (transfer_id in self.refused and any(isinstance(m, NotHeld) and m.fragment_id == last for m in self.heard)):
            now_s = time.monotonic()
            assert now_s < end_s, "the learner does not answer"
            if now_s >= again_s:
                again_s = now_s + 2.0
                self.say(Recall(fragment_id=last, version=FAR))
                self._send(self._bulk, b"b", (encode_frame(Begin(transfer_id, 1, b"", 0, 0, 0)),))
            self.turn()
        del self.headers[:]

    def world(self) -> World:
        """What a syncer knows."""
        count = len(self.layout.fragments)
        here = Version(JOB.epoch, 0)
        hints: dict[str, tuple[Any, ...]] = {
            "fragment_id": tuple(range(count)),
            "version": (here, Version(JOB.epoch, 1), Version(JOB.epoch, 5), Version(JOB.epoch - 1, 9), Version(JOB.epoch + 1, 0)),
            "parent": (None, None, here, Version(JOB.epoch, 1)),
            "round_id": (1, 2, 3, 50),
            "seq": (1, 2, 3, 7),
            "learner_id": (0, 1),
            "incarnation": (JOB.incarnation, 0, 3),
            "next_seq": ((), (1,) * count, (9,) * count),
            "merged_through": ({}, {0: (1, TOKENS)}, {0: (2**53, 2**53)}),
            "versions": ((0,) * count, ()),
            "job_step": (0, 7),
            "shards": ((), (ShardAddress(bulk_endpoint=self.bulk_endpoint),), (ShardAddress(bulk_endpoint="nowhere"),)),
            "bulk_endpoint": (self.bulk_endpoint, "tcp://127.0.0.1:1", "tcp://:x", ""),
            "number": (0, 1),
        }
        return World(JOB, hints, 0.2, tuple(4 * f.num_params for f in self.layout.fragments), flaw=self.flaw, is_order=self.is_order)

    def is_order(self, envelope: Envelope, message: Any) -> bool:
        """Whether the learner must obey, or must take it for the answer to the question at the end of a batch."""
        if envelope.lineage != JOB.lineage or envelope.job_id != JOB.job_id or envelope.epoch < JOB.epoch:
            return False
        if isinstance(message, Recall) and message.fragment_id == len(self.layout.fragments) - 1:
            return True
        is_dialled = isinstance(message, Welcome | Recall | Describe) and bool(message.shards)
        if is_dialled and message.shards[0].bulk_endpoint.startswith("tcp://127.0.0.1:"):
            return message.shards[0].bulk_endpoint != self.bulk_endpoint or (isinstance(message, Welcome) and envelope.epoch > JOB.epoch)
        if isinstance(message, Welcome):
            return envelope.epoch > JOB.epoch
        if isinstance(message, Resolved):
            return message.reason in ("nonfinite", "norm") and message.seq < 2**31
        if isinstance(message, Publication):
            return crc32(payload_of("sound", 4 * self.layout.fragments[0].num_params)) == message.crc
        return isinstance(message, Stop | Fenced | JoinRefused | Left)

    def flaw(self, dice: random.Random, index: int, envelope: Envelope, header: Any, values: str) -> tuple[Envelope, Any, str]:
        """Values that are no numbers come with their true checksum, all others never do."""
        if isinstance(header, Publication) and values in ("nan", "inf") and header.fragment_id < len(self.layout.fragments):
            crc = crc32(payload_of(values, 4 * self.layout.fragments[header.fragment_id].num_params))
            header = msgspec.structs.replace(header, parent=None if dice.random() < 0.8 else header.parent, crc=crc)
        elif isinstance(header, Publication) and values in FLOATS:
            header = msgspec.structs.replace(header, crc=2**40)
        return envelope, header, values


@contextmanager
def learner_process(endpoint: str, parameters: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The learner to be fired at."""
    command = [sys.executable, "-m", "tests.fuzzing.learner_process", endpoint, str(parameters)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def attack_learner(num_messages: int, seed: int, work_dir: Path) -> Tally:
    """Fire `num_messages` at a learner, let it leave, and look at what it has become."""
    tally, log, parameters = Tally("learner", num_messages), work_dir / "learner.log", work_dir / "parameters.safetensors"
    syncer, shots, known = FalseSyncer(tally), Shots(SYNCER, seed), None
    tally.num_fragments = len(syncer.layout.fragments)
    try:
        with learner_process(syncer.control_endpoint, parameters, log) as process:
            try:
                syncer.found()
                process.stdout.readline()
                tally.sessions["the learner"] += 1
                world, number = syncer.world(), 0
                for goal in (num_messages // 10, num_messages):
                    while tally.num_fired < goal:
                        number += 1
                        for index in range(tally.num_fired, min(goal, tally.num_fired + BATCH)):
                            shot = shots.make(world, index)
                            tally.shot(shot, SYNCER, "its syncer")
                            syncer.fire(shot)
                            if index % 20 == 0:
                                syncer.turn(0.0)
                        syncer.barrier(number)
                        tally.settle()
                    tally.weigh(process.pid)
                known = last_words(process, syncer)
            except (AssertionError, ValueError) as error:
                tally.faults.append(f"{error!r} (exit code {process.poll()})")
                tally.rss += [0, 0]
    finally:
        syncer.close()
    tally.end(log)
    if known is not None:
        judge(tally, known, parameters)
    return tally


def last_words(process: subprocess.Popen[bytes], syncer: FalseSyncer) -> dict[str, Any]:
    """Let the learner leave as it would of a real syncer."""
    process.stdin.close()
    process.stdin = None
    end_s = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < end_s:
        syncer.turn()
        syncer.acknowledge()
        if any(isinstance(message, Leave) for message in syncer.heard):
            syncer.say(Left(versions=(0,) * len(syncer.layout.fragments)))
        syncer.heard.clear()
    assert process.poll() == 0, "the learner did not end by itself"
    return json.loads(process.stdout.read().splitlines()[-1])


def judge(tally: Tally, known: dict[str, Any], parameters: Path) -> None:
    """The learner is what its own steps have made of it."""
    founded = [[JOB.epoch, 0]] * tally.num_fragments
    expected = {
        "tokens": known["steps"] * TOKENS,
        "envelope": msgspec.to_builtins(JOB),
        "learner_id": 0,
        "stage": "joined",
        "versions": founded,
        "bases": founded,
        "discarded": 0,
        "stop_reason": None,
        "error": "",
    }
    for name, value in expected.items():
        tally.expect(known[name] == value, f"the learner's {name} is {known[name]}, not {value}")
    tally.sessions["inner steps"] = known["steps"]
    tally.expect(known["steps"] > 0, "the learner did not train meanwhile")
    module = make_module()
    optimizer = PlainSGD(module.parameters())
    for inner_step in range(known["steps"]):
        step(module, optimizer, inner_step)
    saved = load_file(parameters)
    same = all(torch.equal(p.detach(), saved[name]) for name, p in module.named_parameters())
    tally.expect(same, f"after {known['steps']} steps the learner's parameters are not those of the same steps without a syncer")
