"""Child processes of the supervisor: starting, watching and ending them, with everything that they have started.

Each child leads a session, and so a process group, of its own: Ctrl-C in a terminal reaches the supervisor alone, and a signal to the
group reaches the child's loader workers too. A child that has ended is first noticed without being reaped: as long as it is a zombie
its group's number cannot be given away, so what it left behind can be ended safely.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

__all__ = ["Child", "ExitStatus", "child_environment", "start_child"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended: `code` of an exit, or the `signal_name` that ended it."""

    code: int | None
    signal_name: str | None

    def __str__(self) -> str:
        return f"signal {self.signal_name}" if self.signal_name is not None else f"exit code {self.code}"


class Child:
    """A child process whose standard input is its life line.

    Args:
        process: leads its own process group; standard input is a pipe.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._status: ExitStatus | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send_line(self, value: dict[str, Any]) -> None:
        """Write one JSON line to its standard input; a child that is gone hears nothing."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError, OSError):
            pass

    def poll(self) -> ExitStatus | None:
        """How it ended, or None while it runs. What it left in its group is ended first."""
        if self._status is None:
            try:
                ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                # Someone else has reaped it (a handler of the user's for SIGCHLD); how it ended is not known.
                self._status = ExitStatus(-1, None)
                return self._status
            if ended is None:
                return None
            self.signal_group(signal.SIGKILL)
            code = self._process.wait()
            self._status = ExitStatus(None, _signal_name(-code)) if code < 0 else ExitStatus(code, None)
            self.close_line()
        return self._status

    def signal_group(self, signum: int) -> None:
        """Send a signal to the child and everything in its group."""
        if self._status is None:
            try:
                os.killpg(self.pid, signum)
            except (ProcessLookupError, PermissionError):
                pass

    def terminate(self) -> None:
        """Ask the child, and only it, to end: its loader workers are its own affair as long as it lives."""
        if self._status is None:
            try:
                os.kill(self.pid, signal.SIGTERM)
            except ProcessLookupError:
                pass

    def close_line(self) -> None:
        """Let go of its life line: it ends itself, if it still runs."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
        except OSError:
            pass


def start_child(module: str, arguments: list[str], *, log: Path | None, environment: dict[str, str]) -> Child:
    """Start ``python -m module arguments``.

    A log that cannot be opened is no reason not to start it: what it says goes to this process's own output instead, and a warning says so.

    Args:
        module: name of the module.
        arguments: its command line.
        log: file for its output, opened for appending; None: this process's own output.
        environment: all of its environment.

    Returns:
        The running child, waiting for its first line.
    """
    output: IO[bytes] | None = None
    if log is not None:
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("ab")
        except OSError as error:
            _log.warning("%s cannot be written to (%s): the process that is started now shows here what it has to say.", log, error)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    finally:
        if output is not None:
            output.close()
    return Child(process)


def child_environment(num_learners: int) -> dict[str, str]:
    """This process's environment, with what a child needs to find our modules, and its share of the cores.

    The number of threads stays the user's if ``OMP_NUM_THREADS`` is set: without it every learner's arithmetic would use all cores.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # Or `-m` would look in the working directory before anything else, which a script's own interpreter does not.
    environment["PYTHONSAFEPATH"] = "1"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_learners)))
    return environment


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
