"""The files in which benchmarks keep their rows: a broken one is told about, one that is written is whole or as it was."""

from __future__ import annotations

import importlib
import json
import re
import signal
import sys
from pathlib import Path

import pytest

from benchmarks.row_file import read_rows, write_rows

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KEPT = (
    "ablation",
    "durability",
    "emulate",
    "main_job",
    "memory",
    "merge",
    "mixed",
    "quality",
    "scale",
    "short_steps",
    "stall",
    "transport",
)


def test_what_was_written_is_read_and_its_folder_is_made(tmp_path):
    path = tmp_path / "folder" / "rows.json"
    assert read_rows(path, {}) == {} and read_rows(path, []) == []
    write_rows(path, {"a": {"loss": 1.5}})
    assert read_rows(path, {}) == {"a": {"loss": 1.5}}
    write_rows(path, [{"loss": 1.5}], indent=None)
    assert path.read_text() == '[{"loss": 1.5}]\n' and [p.name for p in path.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("text", "reason"), [('{"a": {"loss"', "Expecting ':'"), ("[]", "it holds a list, not a dict"), (None, "directory")]
)
def test_a_file_that_holds_no_rows_is_refused_with_the_remedy(tmp_path, text, reason):
    path = tmp_path / "rows.json"
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(
        SystemExit, match=rf"rows\.json is no file of rows \(.*{reason}.*\)\. Mend or delete it, or give another one with --json"
    ):
        read_rows(path, {})


def test_a_process_that_is_killed_while_it_writes_leaves_the_rows_that_were_there(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    write_rows(path, {"a": {}})
    written = Path.write_text

    def half(self, text):
        written(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_rows(path, {"a": {}, "b": {}})
    assert json.loads(path.read_text()) == {"a": {}}


@pytest.mark.parametrize("name", KEPT)
def test_every_benchmark_that_keeps_rows_tells_about_a_broken_file(name, tmp_path, monkeypatch):
    broken = tmp_path / "rows.json"
    broken.write_text('{"1": {"step_on_s"')
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])  # `emulate` has parts beside it
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [name, *(["steps=1"] if name == "emulate" else []), "--json", str(broken)])
    with pytest.raises(SystemExit, match="is no file of rows"):
        importlib.import_module(f"benchmarks.{name}").main()


def test_no_benchmark_reads_or_writes_its_rows_in_another_way():
    for path in BENCHMARKS.glob("*.py"):
        assert not re.search(r"(arguments|args)\.json\.(read|write)_text", path.read_text()), path.name
