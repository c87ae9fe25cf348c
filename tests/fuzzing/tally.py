"""What was fired, what came of it, and the memory of who was fired at."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.protocol.messages import Heartbeat, Hello, Leave
from lightning_diloco.runtime.intake import MIN_DECODING
from lightning_diloco.runtime.transport.frames import FRAME_KIND, USER_KIND, Received, Refused, decode_reply, unseal
from tests.fuzzing.shots import Shot, Side

MIB = 1 << 20
MAX_GROWTH_BYTES = 20_000_000
MIN_SHARE = 0.3
AT_THE_DOOR = ("WhoAreYou", "Fenced")
MAX_LOG_BYTES = 200_000
"""What a target may write to its standard error, however much garbage comes."""


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has ended")


@dataclass
class Tally:
    """Counts of one target.

    A message *reaches a rule* if the target's machine decides on it: a control message that the target's decoder takes (the same code is
    asked here, and every batch ends with a question that is answered in its turn, so all before it were taken); a payload that the target
    has acknowledged, for then its header and its measured values are an event of the machine. It is *judged* if that rule is not the first
    one, whether the session that says it may say anything: what is answered by `AT_THE_DOOR` is not.

    Args:
        target: "syncer" or "learner".
        wanted: shots to be fired.
    """

    target: str
    wanted: int
    num_fragments: int = 0
    fired: Counter[str] = field(default_factory=Counter)
    fates: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    sessions: Counter[str] = field(default_factory=Counter)
    rss: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    merges: int = 0
    started_s: float = field(default_factory=time.monotonic)
    wall_s: float = 0.0
    _open: dict[int, str] = field(default_factory=dict)

    @property
    def num_fired(self) -> int:
        return sum(self.fired.values())

    @property
    def num_judged(self) -> int:
        return self.num_reached - sum(self.answers[name] for name in AT_THE_DOOR)

    @property
    def num_reached(self) -> int:
        return sum(n for fate, n in self.fates.items() if fate.startswith("reached"))

    def shot(self, shot: Shot, side: Side, who: str) -> None:
        """It leaves."""
        self.fired[shot.kind] += 1
        if shot.kind.startswith("payload"):
            self._open[shot.transfer_id] = "" if shot.message is None else shot.name
            self.fates["payload offered" if shot.message is not None else "payload with an undecodable header"] += 1
        elif shot.message is not None:
            self.fates["a list too long" if self._is_excessive(shot.message) else f"reached a rule: control message of {who}"] += 1
        else:
            self.fates[f"undecodable: {shot.kind}"] += 1

    def _is_excessive(self, message: Any) -> bool:
        """What the syncer's service keeps from its rules."""
        report = message.report if isinstance(message, Leave) else message
        return isinstance(report, Heartbeat | Hello) and len(report.unresolved) > 2 * max(self.num_fragments, MIN_DECODING)

    def heard(self, data: memoryview | bytes, side: Side) -> None:
        """An answer on control, from the target's side."""
        kind, whole = bytes(data[:1]), unseal(data)
        if kind == FRAME_KIND:
            self._frame(decode_reply(data[1:]))
        elif kind == USER_KIND and whole is not None:
            try:
                self.answers[_name(side.decode(bytes(whole[1:]))[1])] += 1
            except RemoteProtocolError as error:
                self.faults.append(f"the target said what cannot be decoded: {error}")

    def _frame(self, frame: Any) -> None:
        if isinstance(frame, Received | Refused) and frame.transfer_id in self._open:
            name = self._open.pop(frame.transfer_id)
            word = "received" if isinstance(frame, Received) else f"refused, {frame.reason}"
            self.answers[f"payload {word}"] += 1
            if isinstance(frame, Received) and name in ("Contribution", "Publication"):
                self.fates["payload offered"] -= 1
                self.fates[f"reached a rule: {name.lower()}"] += 1

    def settle(self) -> None:
        """Nothing more will be said of the payloads before."""
        self._open.clear()

    def weigh(self, pid: int) -> None:
        """Note the target's memory."""
        self.rss.append(rss_bytes(pid))

    def end(self, log: Path) -> None:
        """The target has ended; look at what it wrote."""
        self.wall_s = time.monotonic() - self.started_s
        said = log.read_bytes()
        if b"Traceback" in said:
            self.faults.append(f"an exception in the target's log: {said[said.index(b'Traceback') :][-1500:].decode(errors='replace')}")
        if len(said) > MAX_LOG_BYTES:
            self.faults.append(f"the target's log has {len(said)} bytes, more than {MAX_LOG_BYTES}")
        if self.num_judged < MIN_SHARE * self.num_fired:
            self.faults.append(f"{self.num_judged} of {self.num_fired} messages were judged by a rule, fewer than {MIN_SHARE:.0%}")
        if self.rss[-1] - self.rss[0] > MAX_GROWTH_BYTES:
            self.faults.append(f"memory grew by {(self.rss[-1] - self.rss[0]) / 1e6:.1f} MB after the first tenth")

    def expect(self, is_so: bool, otherwise: str) -> None:
        """Something that must hold."""
        if not is_so:
            self.faults.append(otherwise)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "target": self.target,
            "messages": self.num_fired,
            "reached_a_rule": self.num_reached,
            "reached_share": self.num_reached / max(1, self.num_fired),
            "judged": self.num_judged,
            "judged_share": self.num_judged / max(1, self.num_fired),
            "rss_bytes": self.rss,
            "merges": self.merges,
            "wall_s": self.wall_s,
            "fired": dict(self.fired.most_common()),
            "fates": dict(self.fates.most_common()),
            "answers": dict(self.answers.most_common()),
            "sessions": dict(self.sessions.most_common()),
            "faults": self.faults,
        }


def _name(message: Any) -> str:
    """A message's type with its outcome and reason, if they are words of a closed list."""
    words = [str(getattr(message, name)) for name in ("role", "outcome", "reason") if getattr(message, name, None) is not None]
    return " ".join([type(message).__name__, *words])
