"""A live syncer under fire: the real command, two real learners that train beside the attack, and peers that say anything.

One batch in four comes from sessions that never joined, the others from peers that were let in and speak as members until a rule ends
them. No contribution of theirs is one that the rules may take: its values are not finite, or its header breaks a rule. So at the end the
job must be the honest learners' alone.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from torch import nn

from lightning_diloco.outer import plan_layout
from lightning_diloco.protocol.identity import FragmentInfo, Version
from lightning_diloco.protocol.messages import (
    PROTOCOL_VERSION,
    Contribution,
    Envelope,
    Fenced,
    Found,
    JoinRefused,
    Leave,
    Left,
    Ping,
    Pong,
)
from lightning_diloco.protocol.messages import Heartbeat as Report
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.transport import LearnerTransport
from lightning_diloco.runtime.transport.frames import FRAME_KIND, Begin, Refused, decode_reply, encode_frame
from lightning_diloco.runtime.transport.sockets import send_parts
from tests.fuzzing.honest import CONFIG, TOKENS, Honest, judge, make_module
from tests.fuzzing.payloads import payload_of
from tests.fuzzing.shots import LEARNER, SYNCER, Shot, Shots, World
from tests.fuzzing.tally import Tally
from tests.runtime.job_helpers import until
from tests.runtime.job_raw_peer import RawPeer

BATCH = 100
MEMBERS = 3 / 4
LOOK_EVERY = 4
"""Shots between two looks for the answers: what a session says after its end is answered at the door."""
PATIENCE_S = 60.0
FIRST_ID, NUM_IDS = 100, 30
"""Learner ids of the attackers' members."""
LARGE_AFTER = 8
"""Versions of a fragment between two contributions whose only fault is their size: more of them would move the gate's median."""


class Tapped(LearnerTransport):
    """A transport that shows every word of the other side before it looks at it."""

    tap: Any = None

    def _on_control(self, peer: bytes, data: memoryview) -> None:
        self.tap(data)
        super()._on_control(peer, data)


class Intruder(RawPeer):
    """One session of an attacker."""

    def __init__(self, endpoint: str, bulk: str, module: nn.Module, tally: Tally) -> None:
        self.tally = tally
        self.refused: set[int] = set()
        super().__init__(endpoint, module, CONFIG, transport=Tapped)
        self.transport.tap = self._heard
        self.transport.connect_bulk(bulk)
        self.is_over = False

    def _heard(self, data: memoryview) -> None:
        self.tally.heard(data, SYNCER)
        frame = decode_reply(bytes(data[1:])) if bytes(data[:1]) == FRAME_KIND else None
        if isinstance(frame, Refused):
            self.refused.add(frame.transfer_id)

    def poll(self, timeout_s: float = 0.05) -> None:
        super().poll(timeout_s)
        self.is_over = self.is_over or any(isinstance(m, JoinRefused | Fenced | Left) for m in self.heard)
        del self.published[: -8 * len(self.layout.fragments)]

    def fire(self, shot: Shot) -> None:
        """Send it, however long the socket is full."""
        if shot.control is not None:
            self._send("_control", (shot.control,))
        for parts in shot.bulk:
            self._send("_bulk", parts)

    def _send(self, channel: str, parts: tuple[bytes, ...]) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not send_parts(getattr(self.transport, channel), list(parts)):
            assert time.monotonic() < end_s, "the syncer takes nothing any more"
            self.poll(0.002)

    def barrier(self, number: int) -> None:
        """Everything before this was taken: both channels answer. Said again, should a connection have been cut."""
        end_s, again_s, transfer_id = time.monotonic() + PATIENCE_S, 0.0, number << 32 | 7
        self.refused.clear()
        while not (transfer_id in self.refused and any(isinstance(m, Pong) and m.number == number for m in self.heard)):
            now_s = time.monotonic()
            assert now_s < end_s, "the syncer does not answer"
            if now_s >= again_s:
                again_s = now_s + 2.0
                self.say(Ping(number=number))
                self._send("_bulk", (encode_frame(Begin(transfer_id, 1, b"", 0, 0, 0)),))
            self.poll(0.02)
        self.heard.clear()


class Attack:
    """The attackers of one campaign."""

    def __init__(self, said: dict[str, Any], tally: Tally, seed: int) -> None:
        self.said, self.tally = said, tally
        self.dice = random.Random(seed)
        self.shots = Shots(LEARNER, seed)
        self.module = make_module()
        self.layout = plan_layout(
            self.module, num_fragments=CONFIG.num_fragments, merge=CONFIG.merge, mean_patterns=CONFIG.mean_patterns, include_frozen=False
        )
        self.sizes = tuple(4 * f.num_params for f in self.layout.fragments)
        self.stranger: Intruder | None = None
        self.member: Intruder | None = None
        self.job = Envelope("", "", 0, 0)
        self.large_at: dict[int, int] = {}
        self.number = 0

    def session(self, is_member: bool) -> Intruder:
        """A session of this kind that is not over."""
        held = self.member if is_member else self.stranger
        if held is not None and not held.is_over and (is_member or self.dice.random() > 0.1):
            return held
        if held is not None:
            self.farewell(held)
        fresh = Intruder(self.said["endpoint"], self.said["bulk"], self.module, self.tally)
        self.tally.sessions["member" if is_member else "stranger"] += 1
        if is_member:
            # A few ids, one after the other: the tape's checks look at each of them.
            fresh.join(FIRST_ID + self.tally.sessions["member"] % NUM_IDS)
            fresh.step(3, 3 * TOKENS)
            self.member, self.job = fresh, fresh.envelope
        else:
            fresh.envelope, self.stranger = msgspec.structs.replace(self.job, incarnation=0), fresh
        return fresh

    def farewell(self, intruder: Intruder) -> None:
        """Leave as a learner does: some are members although they were told to go, or without having waited for the answer."""
        intruder.say(Leave(reason="signal", report=Report(inner_step=0, tokens=0)))
        intruder.barrier(self._next())
        intruder.transport.close()

    def _next(self) -> int:
        self.number += 1
        return self.number

    def batch(self, first: int, count: int) -> None:
        """So many shots from one session, or fewer if it is ended, and its answer to a question after them."""
        intruder = self.session(is_member=self.dice.random() < MEMBERS)
        who = "a member" if intruder is self.member else "a stranger"
        world, index = self.world(intruder), first
        while index < first + count and not (intruder.is_over and index > first):
            shot = self.shots.make(world, index)
            if shot.cuts:
                intruder.barrier(self._next())
            self.tally.shot(shot, LEARNER, who)
            intruder.fire(shot)
            index += 1
            if shot.cuts or index % LOOK_EVERY == 0:
                intruder.poll(0.0)
        intruder.barrier(self._next())
        self.tally.settle()

    def world(self, intruder: Intruder) -> World:
        """What this session knows."""
        layout, versions = intruder.layout, intruder.versions
        infos = tuple(FragmentInfo(fragment_id=f.fragment_id, num_params=f.num_params, kind=f.kind) for f in layout.fragments)
        current = [versions.get(i, Version(0, 0)) for i in range(len(infos))]
        config = CONFIG.as_dict()
        hints: dict[str, tuple[Any, ...]] = {
            "fragment_id": tuple(range(len(infos))),
            "version": (*current, *(Version(0, v.n + 1) for v in current), Version(1, 0)),
            "base": (*current, *current, *(Version(0, max(0, v.n - 1)) for v in current), Version(0, 10**6), Version(1, 1)),
            "versions": ((), tuple(v.n for v in current), (0,) * len(infos)),
            "Hello.versions": ((), tuple(current), tuple(current), tuple(current)[:1]),
            "seq": (1, 2, 3, 4, 5),
            "round_id": (1, 2, 50),
            "base_merged_seq": (0, 0, 0, 1),
            "steps": (1, 2, 3, 3, 4),
            "tokens": (1, 16, 48, 48, 49),
            "inner_step": (0, 1, 3, 4, 5),
            "total_tokens": (0, 48, 64),
            "after": (None, None, 1, 2),
            "incarnation": (0, 1),
            "Hello.learner_id": (None, None, 0, 1, 2, 3, 1999, 2000),
            "learner_id": (0, 1, 2),
            "nonce": (intruder.nonce.hex(), "0" * 32, ""),
            "protocol_version": (PROTOCOL_VERSION, PROTOCOL_VERSION, PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1),
            "config": (*2 * (json.dumps(config).encode(),), json.dumps(config | {"outer_lr": 0.1}).encode(), b"{}", b"[" * 60_000, b"\xff"),
            "fingerprint": (layout.fingerprint(), layout.fingerprint(), "0" * 64),
            "lineage": ("", "", self.job.lineage, "other"),
            "unresolved": ((),),
            "token": ("", "x"),
            "layout": (layout.to_bytes(), layout.to_bytes()[:-9], b"{}"),
            "fragments": (infos, infos[:-1]),
            "static_bytes": (sum(s.num_bytes for s in layout.static), 2**60),
            "step_gaps_s": ((), (0.01, 0.01)),
            "batch_size": (16,),
            "merged_through": ({}, {0: (1, 16)}),
            "number": (0, 1),
            "life": (0, 1),
        }
        is_member = intruder is self.member
        if is_member:
            # What would end the session at once comes by the wildness alone, or hardly anything else would be heard of it.
            rejoin = {
                "protocol_version": PROTOCOL_VERSION,
                "config": json.dumps(config).encode(),
                "fingerprint": layout.fingerprint(),
                "data": "shard",
            }
            hints |= {name: (value,) for name, value in rejoin.items()} | {"lineage": (self.job.lineage,), "discarded": ((),)}
            hints |= dict.fromkeys(("first_gap", "before", "again", "samples"), (0, 1))
        return World(
            envelope=intruder.envelope,
            hints=hints,
            wildness=0.03 if is_member else 0.3,
            sizes=self.sizes,
            flaw=lambda *args: self.flaw(current, *args),
            rare=(Leave, Found) if is_member else (),
        )

    def flaw(
        self, current: list[Version], dice: random.Random, index: int, envelope: Envelope, header: Any, values: str
    ) -> tuple[Envelope, Any, str]:
        """What of this contribution the rules must refuse, whatever else is wrong with it."""
        if not isinstance(header, Contribution):
            return envelope, header, values
        fragment_id = min(header.fragment_id, len(current) - 1)
        base = current[fragment_id]
        if dice.random() < 0.8:
            changes = {"base": base, "base_merged_seq": 0, "after": None, "steps": 3, "tokens": 3 * TOKENS, "seq": index + 1}
            header = msgspec.structs.replace(header, **changes)
        if 2**40 < header.seq <= 2**53:
            # Decided once, it would leave no number for the other sessions of this id.
            header = msgspec.structs.replace(header, seq=index + 1)
        is_gated = self.layout.fragments[fragment_id].kind == "parameters"
        if values == "sound" and is_gated and base.n >= self.large_at.get(fragment_id, 2 * LARGE_AFTER):
            self.large_at[fragment_id] = base.n + LARGE_AFTER
            values = "large"
        if dice.random() < 0.8:
            header = msgspec.structs.replace(header, crc=crc32(payload_of(values, self.sizes[fragment_id])))
        if values not in ("sound", "zeros", "noise"):
            return envelope, header, values
        match dice.randrange(6):
            case 0:
                envelope = msgspec.structs.replace(envelope, incarnation=envelope.incarnation + 1)
            case 1:
                envelope = msgspec.structs.replace(envelope, lineage="other")
            case 2:
                envelope = msgspec.structs.replace(envelope, epoch=envelope.epoch + 1)
            case 3:
                header = msgspec.structs.replace(header, base=Version(0, 10**6))
            case 4:
                header = msgspec.structs.replace(header, base_merged_seq=12345)
            case _:
                header = msgspec.structs.replace(header, crc=2**40)
        return envelope, header, values

    def close(self) -> None:
        """The attackers go."""
        for intruder in (self.member, self.stranger):
            if intruder is not None:
                self.farewell(intruder)


@contextmanager
def syncer_process(run_dir: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """The command as a user starts it, and what it says of itself."""
    command = [sys.executable, "-m", "lightning_diloco", "syncer", "--bind", "tcp://127.0.0.1:0", "--run-dir", str(run_dir)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)
    try:
        until(lambda: (run_dir / "syncer.json").exists() or process.poll() is not None, PATIENCE_S)
        yield process, json.loads((run_dir / "syncer.json").read_text())
    finally:
        process.kill()
        process.wait()


def attack_syncer(num_messages: int, seed: int, work_dir: Path) -> Tally:
    """Fire `num_messages` at a syncer, end its job, and look at what is left of it."""
    run_dir, log = work_dir / "run", work_dir / "syncer.log"
    tally = Tally("syncer", num_messages)
    with syncer_process(run_dir, log) as (process, said):
        honest = [Honest(i, said["endpoint"], run_dir) for i in range(2)]
        try:
            until(lambda: all(h.client.figures.merges >= 2 * CONFIG.num_fragments for h in honest), PATIENCE_S)
            attack = Attack(said, tally, seed)
            tally.num_fragments = len(attack.layout.fragments)
            for goal in (num_messages // 10, num_messages):
                while tally.num_fired < goal:
                    attack.batch(tally.num_fired, min(BATCH, goal - tally.num_fired))
                tally.weigh(process.pid)
            attack.close()
        except AssertionError as error:
            tally.faults.append(f"{error} (exit code {process.poll()})")
            tally.rss += [0, 0]
        finally:
            # One after the other: the last one holds the job's last version of everything.
            for learner in honest:
                learner.enough.set()
                learner.life.result(PATIENCE_S)
        with suppress(subprocess.TimeoutExpired):
            process.wait(2 * PATIENCE_S)
        tally.expect(process.returncode == 0, f"the syncer's exit code is {process.returncode}")
    tally.end(log)
    judge(tally, run_dir, honest)
    return tally
