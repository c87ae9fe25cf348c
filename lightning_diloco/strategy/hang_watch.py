"""Whether a process hangs for good, a learner's or the syncer's, as its supervisor sees it from outside.

It hangs if for `hang_timeout_s` both are true:

* its main thread has given no sign of life (`runtime.life_signs`). A learner: no batch of any stage was begun or computed, and it is not in
  a wait of ours (for the syncer, for the founder of the job, for its last contributions). A syncer: its loop has not begun a turn, of
  which there are four in a second with nothing to do;
* neither that thread nor any process below it (loader workers, compilers) has used the CPU for a hundredth of that time.

The second rule is what keeps long work from being taken for a hang: the first batch, compilation, a validation with an end of its own,
writing a checkpoint, a data set that is prepared use the CPU in the main thread or in processes. What is left are threads that sleep,
deadlocks, loaders whose workers stand still, file systems that do not answer, stopped processes; and, wrongly, a main thread that waits
so long for a pool of threads of its own process. The price: a learner that computes for ever is not found.

Background threads of the process do not count: the one that speaks with the syncer is at work however dead the training is. Time in which
the supervisor itself stood still does not count either: whatever has stopped it may have stopped the other one too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lightning_diloco.runtime.life_signs import read_signs

__all__ = ["HangWatch", "cpu_s"]

_CPU_SHARE = 0.01
"""Polling (a loader's five seconds, a loop that sleeps for 50 ms) uses a few parts in ten thousand of a core."""
_LOOKS = 20
"""In a timeout; a look at a silent process reads all of ``/proc``, a few milliseconds."""
_LONGEST_PERIOD_S = 10.0


@dataclass(slots=True)
class _Process:
    """What ``/proc`` says of one process."""

    parent: int
    cpu_ticks: int


class HangWatch:
    """Watches one process.

    Args:
        pid: of its process.
        path: where it gives signs.
        timeout_s: see the module's docstring.
        now_s: of the monotonic clock.
        spare_dir: where it gives them if the disk of `path` took no file.
    """

    def __init__(self, pid: int, path: Path, timeout_s: float, now_s: float, spare_dir: Path | None = None) -> None:
        self.timeout_s = timeout_s
        self._pid = pid
        self._paths = [path] if spare_dir is None else [path, spare_dir / path.name]
        self._period_s = min(timeout_s / _LOOKS, _LONGEST_PERIOD_S)
        self._looked_s = now_s
        self._signs = 0
        self._cpu_s: float | None = None
        self._silent_s = 0.0

    def is_hung(self, now_s: float) -> bool:
        """Whether it has hung for the timeout; to be asked again and again, looks when it is time."""
        passed_s = now_s - self._looked_s
        if passed_s < self._period_s:
            return False
        self._looked_s = now_s
        if (signs := sum(map(read_signs, self._paths))) != self._signs:
            self._signs, self._cpu_s, self._silent_s = signs, None, 0.0
            return False
        used_s = cpu_s(self._pid)
        if used_s is None:
            # It has ended, or this system does not tell.
            return False
        if self._cpu_s is not None and used_s - self._cpu_s >= _CPU_SHARE * self.timeout_s:
            self._cpu_s, self._silent_s = used_s, 0.0
            return False
        # A worker that has left the family takes its time along.
        self._cpu_s = used_s if self._cpu_s is None else min(self._cpu_s, used_s)
        self._silent_s += min(passed_s, 2 * self._period_s)
        return self._silent_s >= self.timeout_s


def cpu_s(pid: int) -> float | None:
    """Seconds of CPU that a process's main thread and all processes below it have used; None if that cannot be told."""
    own, thread = _stat(f"/proc/{pid}/stat"), _stat(f"/proc/{pid}/task/{pid}/stat")
    if own is None or thread is None:
        return None
    # Of the process: what children had used that it has waited for.
    ticks = _ticks(thread, 11, 13) + _ticks(own, 13, 15)
    processes = _processes()
    below = {pid}
    while more := {child for child, process in processes.items() if process.parent in below} - below:
        ticks += sum(processes[child].cpu_ticks for child in more)
        below |= more
    return ticks / os.sysconf("SC_CLK_TCK")


def _processes() -> dict[int, _Process]:
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (stat := _stat(f"/proc/{entry.name}/stat")) is not None:
            found[int(entry.name)] = _Process(int(stat[1]), _ticks(stat, 11, 15))
    return found


def _stat(path: str) -> list[bytes] | None:
    """The fields of a stat file from the state on (``man 5 proc``): the name before it may hold anything."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return None
    return data[data.rindex(b")") + 1 :].split()


def _ticks(stat: list[bytes], first: int, last: int) -> int:
    """Fields 11 and 12 are the time used, 13 and 14 that of children that were waited for."""
    return sum(int(field) for field in stat[first:last])
