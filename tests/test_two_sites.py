"""`docs/two-sites.md`, command by command: two sites are two network namespaces that a virtual cable joins."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import doc_pages as docs
from tests.doc_pages import ROOT
from tests.tape_checker import check_run, load_tape

PAGE = "docs/two-sites.md"
HOST = "10.203.77.1"
PROGRAMS = {".venv/bin/lightning-diloco": [sys.executable, "-m", "lightning_diloco"], ".venv/bin/python": [sys.executable]}


def code(mark: str) -> str:
    (block,) = [block for block in docs.blocks(PAGE) if block.mark == mark]
    return block.code


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode:
        pytest.skip(f"network namespaces cannot be made here: ip {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Joined by a cable; the first one has the address `HOST`."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    names = (f"diloco-a-{os.getpid()}", f"diloco-b-{os.getpid()}")
    ends = (f"dla{os.getpid()}", f"dlb{os.getpid()}")
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "delete", name], timeout=30)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, (HOST, "10.203.77.2"), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", name, "link", "set", device, "up")
        yield names


class Site:
    """A working directory in a namespace."""

    def __init__(self, namespace: str, folder: Path) -> None:
        self.namespace, self.folder = namespace, folder
        folder.mkdir()
        (folder / "my_script.py").write_text(code("script"))

    def command(self, line: str, **words: str) -> list[str]:
        first, *rest = [words.get(word, word.replace("HOST", HOST)) for word in shlex.split(line)]
        return ["ip", "netns", "exec", self.namespace, *PROGRAMS[first], *rest]

    @property
    def options(self) -> dict[str, object]:
        return {"cwd": self.folder, "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}

    def run(self, line: str, **words: str) -> str:
        """Run a command of the page; returns what it printed."""
        done = subprocess.run(self.command(line, **words), capture_output=True, text=True, timeout=60, **self.options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def start(self, line: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a command that goes on; its output is in `log`."""
        with self.log.open("ab") as log, subprocess.Popen(self.command(line), stdout=log, stderr=log, **self.options) as process:
            try:
                yield process
            finally:
                process.kill()

    @property
    def log(self) -> Path:
        return self.folder / "log"


def key_in(text: str) -> str:
    return re.search(r"The public key is ([0-9a-f]{64})\n", text)[1]


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 100.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.1)


def merges(run_dir: Path) -> int:
    tape = run_dir / "tape.jsonl"
    lines = tape.read_bytes().split(b"\n")[:-1] if tape.exists() else []
    return sum(json.loads(line)["event"] == "merge" for line in lines)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(420)
def test_the_page_does_what_it_says(tmp_path):
    with two_namespaces() as (first, second):
        a, b = Site(first, tmp_path / "a"), Site(second, tmp_path / "b")
        syncer_key = key_in(a.run(code("syncer_keys")))
        site_keys = [key_in(site.run(code("site_keys"), SYNCER_KEY=syncer_key)) for site in (a, b)]
        for line in code("admit").splitlines():
            a.run(line, KEY_OF_A=site_keys[0], KEY_OF_B=site_keys[1])
        run_dir = a.folder / "outputs" / "two_sites"
        with ExitStack() as stack:
            syncer = stack.enter_context(a.start(code("syncer")))
            learners = [stack.enter_context(site.start(code(mark))) for site, mark in ((a, "learner_a"), (b, "learner_b"))]
            wait_until(lambda: merges(run_dir) > 20, f"nothing is merged: {a.log.read_text()} {b.log.read_text()}")
            syncer.send_signal(signal.SIGKILL)
            syncer.wait()
            again = stack.enter_context(a.start(code("again")))
            assert [learner.wait(200) for learner in learners] == [0, 0], a.log.read_text() + b.log.read_text()
            assert again.wait(60) == 0, a.log.read_text()
        assert a.run(code("revoke")).startswith("Site b is shut out")
    printed = a.log.read_text()
    assert "Ports 7777 and 7778 (TCP)" in printed and "(admitted: a, b)" in printed
    summary = check_run(run_dir)
    assert summary["status"] == "finished"
    tape = load_tape(run_dir / "tape.jsonl")
    joined_at = {line["learner_id"]: line["job_step"] for line in tape if line["event"] == "join"}  # B may come while A trains
    assert [x["inner_steps"] + joined_at[x["learner_id"]] for x in summary["learners"]] == [5000, 5000]
    assert all(x["rounds_merged"] > 0 for x in summary["learners"]) and (run_dir / "global.safetensors").exists()
    assert any(line["event"] == "restart" for line in tape)


def test_every_command_of_the_page_is_run():
    marked = {block.mark for block in docs.blocks(PAGE)}
    assert marked == {"syncer_keys", "site_keys", "admit", "syncer", "script", "learner_a", "learner_b", "again", "revoke"}
