"""The faults of a storm. Each kind is a generator: it hurts, waits with `yield` between two looks, and fills in what it saw.

A fault is *confirmed* by what can be seen from outside, not by the call that should have caused it:

| kind | confirmed by |
|---|---|
| `kill` | the process was reaped, ended by SIGKILL |
| `stop` | every thread of the process is in state T (`/proc/PID/task/*/stat`) |
| `partition` | connections were reset and none is open, or bytes are being held and none passed |
| `throttle` | bytes went through the limit, at no more than its rate |
| `corrupt` | bits were turned in the stream |
| `syncer_kill` | as `kill`, of the syncer |
| `join` | a `join` of an id that nobody had before is on the tape |
| `leave` | after SIGTERM a `leave` is on the tape, with the reason `signal` |

The outcome of all is how long it took, from the end of the fault, until the victim was in a merge again (of `leave`: until its process
had ended). A fault waits for that, at most `PATIENCE_S`; if nothing comes it says so (`recovered` is false). `steps` is how many inner
steps the victim did while a link fault lasted: a learner never waits.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.storm.cluster import Cluster, Learner

__all__ = ["KINDS", "Fault", "run_fault"]

PATIENCE_S = 120.0
"""A process that starts needs seconds, and on a machine with other load a minute."""
KINDS = ("kill", "stop", "partition", "throttle", "corrupt", "syncer_kill", "join", "leave")
LINK_KINDS = ("partition", "throttle", "corrupt")
OPEN_WRITERS = 4
"""Of a link on which both channels are connected: while the syncer is down there is nothing to cut."""
MOST_LEARNERS = 5
"""Members and processes that will be members, at most; and `LEAST_LEARNERS` at least."""
LEAST_LEARNERS = 4


@dataclass
class Fault:
    """One fault, as it will stand in `faults.jsonl`."""

    number: int
    kind: str
    at_s: float
    """Monotonic."""
    learner_id: int | None = None
    life: int | None = None
    seconds: float = 0.0
    """How long it lasted, where that was chosen."""
    is_confirmed: bool = False
    evidence: dict[str, Any] = field(default_factory=dict)
    recovered: bool = False
    outcome: dict[str, Any] = field(default_factory=dict)


def can_be_hurt(cluster: Cluster, busy: set[int]) -> list[Learner]:
    """Learners that are members, wanted, and not in another fault."""
    return [
        learner
        for learner in cluster.learners.values()
        if learner.learner_id in cluster.tape.members and learner.ended is None and learner.is_wanted and learner.learner_id not in busy
    ]


def run_fault(cluster: Cluster, kind: str, number: int, busy: set[int], rng: random.Random) -> tuple[Fault, Iterator[None]] | None:
    """Choose a victim.

    Args:
        cluster: of the storm.
        kind: one of `KINDS`.
        number: of the fault.
        busy: learners in other faults; -1 is the syncer.
        rng: of the storm.

    Returns:
        The fault and its course, or None if this kind cannot hit anybody now.
    """
    fault = Fault(number, kind, time.monotonic())
    if kind == "syncer_kill":
        return None if -1 in busy or not is_serving(cluster) else (fault, syncer_kill(cluster, fault))
    wanted = [learner for learner in cluster.learners.values() if learner.is_wanted]
    if kind == "join":
        return None if len(wanted) >= MOST_LEARNERS else (fault, join(cluster, fault))
    victims = can_be_hurt(cluster, busy)
    if kind in LINK_KINDS:
        victims = [learner for learner in victims if len(cluster.link(learner.learner_id).writers) == OPEN_WRITERS]
    if not victims or (kind == "leave" and len(wanted) < LEAST_LEARNERS):
        return None
    learner = rng.choice(victims)
    fault.learner_id, fault.life = learner.learner_id, learner.life
    course = {
        "kill": lambda: kill(cluster, fault, learner),
        "stop": lambda: stop(cluster, fault, learner, rng.uniform(2.0, 5.0)),
        "partition": lambda: partition(cluster, fault, rng.choice(("reset", "hold")), rng.uniform(3.0, 12.0)),
        "throttle": lambda: throttle(cluster, fault, rng.uniform(10e3, 30e3), rng.uniform(5.0, 12.0)),
        "corrupt": lambda: corrupt(cluster, fault, rng.randint(1, 4)),
        "leave": lambda: leave(cluster, fault, learner),
    }[kind]
    return fault, course()


def is_serving(cluster: Cluster) -> bool:
    """Whether the syncer has merged since its last start."""
    epoch = max(cluster.tape.epochs, default=-1)
    return cluster.syncer.is_running and epoch >= cluster.syncer.restarts


# ---- processes --------------------------------------------------------------------------------------------------------------------


def kill(cluster: Cluster, fault: Fault, learner: Learner) -> Iterator[None]:
    """SIGKILL to a learner; it is started again."""
    life = learner.life
    learner.child.signal_group(signal.SIGKILL)
    yield from until(lambda: bool(learner.ends) and learner.ends[-1][0] == life)
    fault.evidence = {"pid": learner.child.pid, "ended_by": learner.ends[-1][1]}
    fault.is_confirmed = learner.ends[-1][1] == "signal SIGKILL"
    yield from recover(cluster, fault, time.monotonic())


def stop(cluster: Cluster, fault: Fault, learner: Learner, seconds: float) -> Iterator[None]:
    """SIGSTOP, later SIGCONT."""
    fault.seconds = seconds
    learner.child.signal_group(signal.SIGSTOP)
    states: set[str] = set()
    begin_s = time.monotonic()
    while states != {"T"} and time.monotonic() < begin_s + 1.0:
        yield
        states = thread_states(learner.child.pid)
    fault.evidence, fault.is_confirmed = {"pid": learner.child.pid, "states": sorted(states)}, states == {"T"}
    yield from sleep(begin_s + seconds)
    learner.child.signal_group(signal.SIGCONT)
    yield from recover(cluster, fault, time.monotonic())


def thread_states(pid: int) -> set[str]:
    """States of all threads of a process, by their letters; empty if it is gone."""
    try:
        texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return set()
    return {text.rpartition(")")[2].split()[0] for text in texts}


def leave(cluster: Cluster, fault: Fault, learner: Learner) -> Iterator[None]:
    """SIGTERM: it hands over what it has, and goes for good."""
    learner.is_wanted = False
    key = (learner.learner_id, cluster.tape.members[learner.learner_id])
    drained = cluster.tape.discarded[learner.learner_id, "drain"]
    os.kill(learner.child.pid, signal.SIGTERM)
    yield from until(lambda: key in cluster.tape.left)
    reason = cluster.tape.left.get(key)
    fault.evidence, fault.is_confirmed = {"pid": learner.child.pid, "reason": reason}, reason == "signal"
    fault.outcome = {"left_s": since(fault)}
    yield from until(lambda: learner.ended is not None)
    fault.recovered = learner.ended is not None
    fault.outcome |= {
        "ended_s": since(fault),
        "ended_by": str(learner.ended),
        "drain_tokens": cluster.tape.discarded[learner.learner_id, "drain"] - drained,
    }


def join(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """A learner with a new id."""
    fault.learner_id, fault.life = max(cluster.learners) + 1, 0
    learner = cluster.add(fault.learner_id)
    yield from until(lambda: fault.learner_id in cluster.tape.members or learner.ended is not None)
    fault.evidence = {"pid": learner.child.pid, "incarnation": cluster.tape.members.get(fault.learner_id)}
    fault.is_confirmed = fault.learner_id in cluster.tape.members
    fault.outcome["joined_s"] = since(fault)
    yield from recover(cluster, fault, time.monotonic())


def syncer_kill(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """SIGKILL to the syncer."""
    child, epoch = cluster.syncer.child, cluster.syncer.restarts
    assert child is not None
    before = all_steps(cluster)
    child.signal_group(signal.SIGKILL)
    yield from until(lambda: child.poll() is not None)
    status = str(child.poll())
    fault.evidence, fault.is_confirmed = {"pid": child.pid, "ended_by": status}, status == "signal SIGKILL"
    yield from until(lambda: max(cluster.tape.epochs, default=0) > epoch)
    fault.recovered = max(cluster.tape.epochs, default=0) > epoch
    fault.outcome = {"merged_s": since(fault), "steps": all_steps(cluster) - before}


# ---- links ------------------------------------------------------------------------------------------------------------------------


def partition(cluster: Cluster, fault: Fault, kind: Literal["reset", "hold"], seconds: float) -> Iterator[None]:
    """Nothing passes between a learner and the syncer."""
    assert fault.learner_id is not None and cluster.job.proxies is not None
    link, fault.seconds = cluster.link(fault.learner_id), seconds
    before, steps = link.snapshot(), victim_steps(cluster, fault)
    cluster.job.proxies.partition(link, kind)
    yield from sleep(fault.at_s + min(seconds, 2.0))
    down, num_open = link.snapshot(), len(link.writers)
    yield from sleep(fault.at_s + seconds)
    after = link.snapshot()
    link.state = "up"
    fault.evidence = {"kind": kind, "open": num_open, **{name: after[name] - before[name] for name in ("reset", "refused", "bytes_held")}}
    is_cut = after["reset"] > before["reset"] and num_open == 0
    is_held = after["bytes_held"] > before["bytes_held"] and after["bytes_passed"] == down["bytes_passed"]
    fault.is_confirmed = is_cut if kind == "reset" else is_held
    fault.outcome["steps"] = victim_steps(cluster, fault) - steps
    yield from recover(cluster, fault, time.monotonic())


def throttle(cluster: Cluster, fault: Fault, bytes_per_s: float, seconds: float) -> Iterator[None]:
    """A link gets slow: less than a learner exchanges."""
    assert fault.learner_id is not None
    link, fault.seconds = cluster.link(fault.learner_id), seconds
    before, steps = link.snapshot(), victim_steps(cluster, fault)
    link.bytes_per_s = bytes_per_s
    yield from sleep(fault.at_s + seconds)
    link.bytes_per_s = None
    slowed = link.snapshot()["bytes_slowed"] - before["bytes_slowed"]
    fault.evidence = {"bytes_per_s": round(bytes_per_s), "bytes_slowed": slowed}
    # Two connections, two directions; the first piece of each may have been read before.
    fault.is_confirmed = 0 < slowed <= 4 * (bytes_per_s * seconds + 65536)
    fault.outcome["steps"] = victim_steps(cluster, fault) - steps
    yield from recover(cluster, fault, time.monotonic())


def corrupt(cluster: Cluster, fault: Fault, bits: int) -> Iterator[None]:
    """Bits are turned in the stream, in both directions and on both channels as it comes."""
    assert fault.learner_id is not None
    link = cluster.link(fault.learner_id)
    before, steps = link.snapshot(), victim_steps(cluster, fault)
    link.bits_to_turn = bits
    yield from until(lambda: link.bits_to_turn <= 0, 5.0)
    link.bits_to_turn = 0
    after = link.snapshot()
    fault.evidence = {"bits_turned": after["bits_turned"] - before["bits_turned"]}
    fault.is_confirmed = after["bits_turned"] > before["bits_turned"]
    # Whether that was noticed shows a little later: a connection that is ended, a payload that is sent again, a process that ends.
    yield from sleep(time.monotonic() + 1.0)
    yield from recover(cluster, fault, time.monotonic())
    fault.outcome |= {"new_connections": link.snapshot()["connections"] - before["connections"]}
    fault.outcome["steps"] = victim_steps(cluster, fault) - steps


# ---- what they share --------------------------------------------------------------------------------------------------------------


def recover(cluster: Cluster, fault: Fault, from_s: float) -> Iterator[None]:
    """Wait until the victim is in a merge that was seen after `from_s`; a victim that ends meanwhile is named."""
    assert fault.learner_id is not None
    learner, life = cluster.learners[fault.learner_id], fault.life

    def merged_s() -> float:
        """When its present incarnation was in a merge last."""
        incarnation = cluster.tape.members.get(learner.learner_id, -1)
        return cluster.tape.merged.get((learner.learner_id, incarnation), 0.0)

    yield from until(lambda: merged_s() > from_s and learner.ended is None)
    fault.recovered = merged_s() > from_s and learner.ended is None
    fault.outcome["merged_s"] = round(merged_s() - from_s, 3) if fault.recovered else None
    if learner.life != life or learner.ended is not None:
        fault.outcome["ended"] = [how for its_life, how in learner.ends if life is None or its_life >= life]
        fault.outcome["last_words"] = cluster.log_end(learner.learner_id)[-300:]


def until(is_so: Any, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Yield until something is so, or for `patience_s`."""
    end_s = time.monotonic() + patience_s
    while not is_so() and time.monotonic() < end_s:
        yield


def sleep(until_s: float) -> Iterator[None]:
    """Yield until a monotonic time."""
    while time.monotonic() < until_s:
        yield


def since(fault: Fault) -> float:
    """Seconds since the fault."""
    return round(time.monotonic() - fault.at_s, 3)


def victim_steps(cluster: Cluster, fault: Fault) -> int:
    """Inner steps of the victim's life so far."""
    assert fault.learner_id is not None and fault.life is not None
    return len(cluster.steps(fault.learner_id, fault.life))


def all_steps(cluster: Cluster) -> int:
    """Inner steps of all lives so far."""
    return sum(len(cluster.steps(i, life)) for i, learner in cluster.learners.items() for life in range(learner.life + 1))
