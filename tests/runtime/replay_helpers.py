"""What tests of the replay do to a run directory: lines left out, bits flipped, and the command's answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_diloco.cli.main import main
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.payloads import HEADER_BYTES, PAYLOADS_NAME, PayloadKey, pack_header
from tests.tape_checker import load_tape

Event = dict[str, Any]


def replay(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, Event]:
    """Run the command; its exit code and what it says (a sentence under "error")."""
    capsys.readouterr()
    code = main(["replay", str(run_dir), "--json"])
    out, err = capsys.readouterr()
    assert (code == 2) == bool(err) and err.count("\n") <= 1
    return code, {"error": err} if err else json.loads(out)


def events(run_dir: Path, *kinds: str) -> list[Event]:
    return [e for e in load_tape(run_dir / "tape.jsonl") if e["event"] in kinds]


def copy_of(run_dir: Path, to: Path, keeps: Callable[[Event], bool] = lambda event: True) -> Path:
    """A copy of what a replay reads, with these lines of the tape."""
    to.mkdir()
    for name in (PAYLOADS_NAME, "summary.json"):
        shutil.copy(run_dir / name, to / name)
    lines = (run_dir / "tape.jsonl").read_text().splitlines(keepends=True)
    (to / "tape.jsonl").write_text("".join(line for line in lines if keeps(json.loads(line))))
    return to


def merged_contributions(run_dir: Path) -> list[tuple[Event, Event]]:
    """(contribution, merge) for every member of every merge of parameters."""
    accepted = {
        (e["learner_id"], e["fragment_id"], e["contribution_seq"]): e
        for e in events(run_dir, "contribution")
        if e["outcome"] in ("folded", "carried")
    }
    return [
        (accepted[m["learner_id"], merge["fragment_id"], m["seq"]], merge) for merge in events(run_dir, "merge") for m in merge["members"]
    ]


def key_of(contribution: Event) -> PayloadKey:
    return PayloadKey(
        kind="contribution",
        fragment_id=contribution["fragment_id"],
        learner_id=contribution["learner_id"],
        incarnation=contribution["incarnation"],
        seq=contribution["contribution_seq"],
    )


def flip_bit(run_dir: Path, contribution: Event, byte: int, bit: int, *, repairs: bool) -> None:
    """Flip one bit of a contribution's payload; `repairs`: and make its checksums those of the new bytes."""
    path, at, size = run_dir / PAYLOADS_NAME, contribution["payload_at"], contribution["payload_bytes"]
    data = bytearray(path.read_bytes())
    start = at + HEADER_BYTES
    data[start + byte] ^= 1 << bit
    if repairs:
        data[at:start] = pack_header(key_of(contribution), size, crc32(bytes(data[start : start + size])))
    path.write_bytes(data)
