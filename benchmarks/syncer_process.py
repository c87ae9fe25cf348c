"""A syncer in a process of its own, for the benchmarks that start their learners by hand.

Not a benchmark itself.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["running_syncer"]

ROOT = Path(__file__).resolve().parent.parent
READY_S = 60.0
"""Importing torch on a busy machine is most of it."""


@contextmanager
def running_syncer(run_dir: Path, *, core: int | None = None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start one, hand out its process and its endpoint, and end it with the block.

    What it prints goes to two files beside the run directory; their last line is told where the syncer does not come up, and where the
    block ends with an error, which may be the syncer's.

    Args:
        run_dir: the job's folder; the folder above it has to be there.
        core: pin it to this one; None: it may use all.

    Raises:
        SystemExit: it did not say its address.
    """
    command = [sys.executable, "-m", "lightning_diloco", "syncer", "--run-dir", str(run_dir)]
    pinned = command if core is None else ["taskset", "-c", str(core), *command]
    out, err = run_dir.with_name("syncer.out"), run_dir.with_name("syncer.err")
    with out.open("wb") as out_file, err.open("wb") as err_file:
        process = subprocess.Popen(pinned, stdout=out_file, stderr=err_file, cwd=ROOT)
    try:
        endpoint = _endpoint(process, out)
        if endpoint is None:
            code = process.poll()
            what = f"did not say its address in {READY_S:g} s" if code is None else f"ended with exit code {code} and no address"
            raise SystemExit(f"The syncer {what}; its last line: {_last_line(err)}\nRun it by hand to see more: {shlex.join(command)}")
        try:
            yield process, endpoint
        except BaseException:
            print(f"The syncer's last line: {_last_line(err)}", file=sys.stderr)
            raise
    finally:
        process.kill()
        process.wait()


def _endpoint(process: subprocess.Popen[bytes], out: Path) -> str | None:
    """The address that it prints; None if it has ended without one, or takes too long."""
    end_s = time.monotonic() + READY_S
    while time.monotonic() < end_s:
        has_ended = process.poll() is not None
        found = re.search(r"(tcp://[\d.]+:\d+)\D", out.read_text(errors="replace"))
        if found is not None:
            return found.group(1)
        if has_ended:
            return None
        time.sleep(0.1)
    return None


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "none"
