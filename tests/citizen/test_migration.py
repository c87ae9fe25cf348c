"""The worked migration of `docs/migration.md`: two scripts that differ in what the page says, and both run."""

from __future__ import annotations

import difflib
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
BEFORE, AFTER = ((DOCS / "migration" / f"{name}.py").read_text() for name in ("before", "after"))


def changes() -> list[str]:
    """Lines that are new or gone, with + or - before them; empty lines left out."""
    lines = difflib.unified_diff(BEFORE.splitlines(), AFTER.splitlines(), n=0, lineterm="")
    return [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---") and line[1:].strip()]


def test_one_line_changes_and_one_is_added():
    added, old, new = changes()
    assert added.startswith("+import lightning_diloco")
    assert (old.split(), new.split()) == (["-", 'strategy="ddp",'], ["+", 'strategy="decoupled_diloco",'])


def test_the_page_shows_these_lines():
    page = (DOCS / "migration.md").read_text()
    assert all(line in page for line in changes())


@pytest.mark.process
@pytest.mark.parametrize("text", [pytest.param(text, marks=pytest.mark.slow) for text in (BEFORE, AFTER)], ids=["before", "after"])
def test_the_script_runs(text, tmp_path):
    assert "max_steps=1000" in text and "val_check_interval=500" in text
    script = tmp_path / "script.py"
    script.write_text(text.replace("max_steps=1000", "max_steps=20").replace("val_check_interval=500", "val_check_interval=20"))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("20 steps of each device in ") and "'val_loss': " in line
    assert list((tmp_path / "logs").rglob("*.ckpt")), "what ModelCheckpoint wrote is where it was with ddp"
