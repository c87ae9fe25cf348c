"""What the tests of `docs/sites.md` share: its commands, a folder to run them in, processes that are ended whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from lightning_diloco.runtime.keys import admit, make_pair, trust_syncer
from tests import doc_pages as docs
from tests.doc_pages import ROOT

PAGE = "docs/sites.md"
PATIENCE_S = 100.0
"""For what must happen, on a machine that is busy with other things."""

PROGRAMS = {
    "python": 'exec {python} "$@"',
    "torchrun": 'exec {python} -m torch.distributed.run "$@"',
    "lightning-diloco": 'exec {python} -m lightning_diloco "$@"',
}

ENDLESS = """
import time
from pathlib import Path
from torch.utils.data import DataLoader
from lightning.pytorch.demos.boring_classes import RandomDataset

class Endless(BoringModel):
    def on_train_batch_end(self, *args):
        time.sleep(0.02)
        self.trainer.should_stop = Path("stop").exists()

"""
"""A module that trains until there is a file; its loader has a worker, which a signal to all processes hits too."""


def code(mark: str) -> str:
    (block,) = [block for block in docs.blocks(PAGE) if block.mark == mark]
    return block.code


def script() -> str:
    """The page's script, with data that come from a worker and without a limit: a test says when it is enough."""
    text = code("script")
    fit = "trainer.fit(BoringModel(), BoringDataModule())"
    assert text.count("max_steps=5000") == text.count(fit) == 1
    text = text.replace("max_steps=5000", "max_steps=-1, logger=False, enable_checkpointing=False, limit_val_batches=0")
    return text.replace(fit, ENDLESS + "trainer.fit(Endless(), DataLoader(RandomDataset(32, 64), num_workers=1))")


def two_ports() -> int:
    """A free port whose successor is free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def make_keys(folder: Path) -> None:
    """`syncer-keys` and `site-keys` in a folder, as step 1 of the other page makes them."""
    public = make_pair(folder / "syncer-keys").hex()
    admit(folder / "syncer-keys", "here", trust_syncer(folder / "site-keys", public).hex())


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Site:
    """A folder with the script and the programs, under the names that the page gives them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack, self.port = folder, stack, two_ports()
        folder.mkdir(exist_ok=True)
        (folder / "my_script.py").write_text(script())
        for name, text in PROGRAMS.items():
            write_program(folder / ".venv" / "bin" / name, text.format(python=sys.executable))
        (folder / "docs").symlink_to(ROOT / "docs")
        self.log = folder / "log"

    def command(self, text: str) -> str:
        """A command of the page, on loopback."""
        return text.replace("tcp://HOST:7777", f"tcp://127.0.0.1:{self.port}").strip()

    def start(self, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own; it is killed with all that is in it when the test ends."""
        bin_ = self.folder / ".venv" / "bin"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{bin_}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **variables}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                words, cwd=cwd or self.folder, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._stack.callback(end, process)
        return process

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end_s, f"{what}\n{self.text()}"
            time.sleep(0.05)

    def exit_code(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{process.args} does not end\n{self.text()}") from None

    def start_syncer(self, run_dir: Path) -> subprocess.Popen[bytes]:
        words = ["lightning-diloco", "syncer", "--bind", f"tcp://127.0.0.1:{self.port}", "--keys", "syncer-keys", "--run-dir", str(run_dir)]
        process = self.start(*words)
        self.wait_until((run_dir / "syncer.json").exists, "the syncer")
        return process

    def stop(self) -> None:
        """Let the learners end."""
        (self.folder / "stop").touch()


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(folder, stack)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what a command has started, in sessions of its own too, and the command."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    for pid in [process.pid, *(child.pid for child in below)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def lines(run_dir: Path) -> list[dict]:
    """The whole lines of a tape."""
    tape = run_dir / "tape.jsonl"
    return [json.loads(line) for line in tape.read_bytes().split(b"\n")[:-1]] if tape.exists() else []


def joins(run_dir: Path) -> list[tuple[int, int]]:
    """(learner id, incarnation) of every join, sorted."""
    return sorted((line["learner_id"], line["incarnation"]) for line in lines(run_dir) if line["event"] == "join")


def leaves(run_dir: Path) -> list[tuple[int, str]]:
    """(learner id, reason) of every leave, in order."""
    return [(line["learner_id"], line["reason"]) for line in lines(run_dir) if line["event"] == "leave"]


def merges_after_last(event: str, run_dir: Path) -> int:
    """Merges since the last event of this kind; 0 if there was none."""
    events = [line["event"] for line in lines(run_dir)]
    last = max((i for i, each in enumerate(events) if each == event), default=len(events))
    return events[last:].count("merge")
