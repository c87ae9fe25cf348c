"""The syncer that a benchmark starts: its address, and its last line where something fails."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks import syncer_process
from benchmarks.syncer_process import running_syncer


def script(tmp_path, monkeypatch, text):
    """Stands for the interpreter, so that its arguments are those of the syncer."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.mark.process
def test_a_syncer_that_refuses_is_quoted_with_what_to_do(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(SystemExit) as raised, running_syncer(tmp_path / "run"):
        pass
    said = str(raised.value)
    assert said.startswith("The syncer ended with exit code 2 and no address; its last line: lightning-diloco syncer: --run-dir "), said
    assert re.search(rf"\nRun it by hand to see more: \S+ -m lightning_diloco syncer --run-dir {tmp_path}/run$", said), said


def test_one_that_says_nothing_is_not_waited_for_without_end(tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, "echo 'still looking' >&2; exec sleep 60")
    monkeypatch.setattr(syncer_process, "READY_S", 0.3)
    with (
        pytest.raises(SystemExit, match=r"did not say its address in 0\.3 s; its last line: still looking"),
        running_syncer(tmp_path / "run"),
    ):
        pass


def test_its_last_line_is_told_when_the_block_ends_with_an_error_and_it_ends_with_the_block(tmp_path, monkeypatch, capsys):
    script(tmp_path, monkeypatch, "echo \"ready: 'tcp://127.0.0.1:4000'.\"; echo first >&2; echo 'the disk is full' >&2; exec sleep 60")
    with pytest.raises(ZeroDivisionError), running_syncer(tmp_path / "run") as (process, endpoint):
        assert endpoint == "tcp://127.0.0.1:4000" and process.poll() is None
        raise ZeroDivisionError
    assert capsys.readouterr().err == "The syncer's last line: the disk is full\n" and process.returncode is not None
