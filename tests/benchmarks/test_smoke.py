"""Each benchmark of the wire runs, shortly, and says what it claims to say; whether an aim is reached is not asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.wan.net import is_possible
from benchmarks.wan.torchft_packages import TORCHFT_VERSION

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_PARAMS = 854_272
"""Of the model of `wan.py`."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SHORT_RATIO = ["--steps", "24", "--rounds", "1", "--batch", "2", "--ratio", "8", "--ddp-steps", "2", "--no-losses"]
two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
namespaces = pytest.mark.skipif(is_possible() is not None, reason=f"no network namespaces: {is_possible()}")


def run(tmp_path, script, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr[-3000:]
    written = (tmp_path / "rows.json").read_text()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert again.returncode == done.returncode
    # Times: none would be the same to the last digit.
    assert (tmp_path / "rows.json").read_text() == written, "rows that are there are not made again"
    return done.stdout, json.loads(written)


def test_merge(tmp_path):
    said, rows = run(tmp_path, "merge.py", "--mb", "1", "--learners", "1", "2", "3", "4", "--seconds", "0.2")
    assert "| 1 MB, 4 |" in said and len(rows) == 4
    assert all(0.5 < sum(row["stages_s"].values()) / row["stages_of_s"] <= 1.0 for row in rows.values()), "the stages are the merge"


@two_cores
def test_stall(tmp_path):
    said, rows = run(tmp_path, "stall.py", "--params", "1", "--blocks", "3")
    (row,) = rows.values()
    assert "| 1 M, 16 windows, 3 blocks (854,272) |" in said and row["merges"] > 24 and len(row["step_by_block_s"]) == 7
    assert "NOT JUDGED, fewer than 5 ratios on / off: 1 M, 16 windows, 3 blocks\n" in said and "MISSED" not in said
    assert row["parts_s"]["inner state aside"] > 0.0 and row["bytes_per_boundary"] > 0


def test_memory(tmp_path):
    said, rows = run(tmp_path, "memory.py", "--params", "1")
    (row,) = rows.values()
    assert "| 854,272 |" in said and row["learner_training"] > row["plain_training"] and row["syncer_training"] > 0


@two_cores
def test_durability(tmp_path):
    said, rows = run(tmp_path, "durability.py", "--kinds", "payloads", "--params", "1", "--blocks", "3", "--interval", "1")
    (row,) = rows.values()
    assert "| payloads, 1 M, 1 s, 3 blocks |" in said and row["snapshots"] >= 5, "one at the founding, one a block, one at the end"
    assert [block["is_on"] for block in row["blocks"]] == [False, True] * 4 and all(block["delays_s"] for block in row["blocks"][:7])


@two_cores
def test_transport(tmp_path):
    said, rows = run(tmp_path, "transport.py", "--rounds", "1", "--seconds", "0.5", "--mib", "4")
    assert "| up, keys |" in said and len(rows) == 13 and all(row["bytes_per_s"] > 0 for row in rows)


@two_cores
def test_scale(tmp_path):
    sizes = ["--learners", "4", "--processes", "2", "--quorum", "2", "--step-ms", "200", "--seconds", "4"]
    said, rows = run(tmp_path, "scale.py", *sizes)
    (row,) = rows.values()
    assert "| 200 |" in said and row["rounds_per_s"] > 0 and row["answers_s"] and len(row["participation"]) == 4


@two_cores
@namespaces
def test_wan_never_waits(tmp_path):
    said, rows = run(tmp_path, "wan.py", "--part", "never-waits", "--steps", "24", "--batch", "2")
    ours = rows["jobs"]["bf16"]
    assert "| never-waits |" in said and ours["most_on_way"] == [1, 1] and ours["summary"]["tokens_discarded"] == 0
    assert "wan" not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


@two_cores
@namespaces
def test_wan_ratio(tmp_path):
    said, rows = run(tmp_path, "wan.py", *SHORT_RATIO, "--wire", "bf16", "--keys")
    jobs = rows["jobs"]
    assert list(jobs) == ["alone 0", "ddp", "post_local_sgd", "bf16 0", "alone 1"]
    ddp, ours = jobs["ddp"], jobs["bf16 0"]
    # Tokens per second are a sum over learners, the step a mean: their product is the tokens of a step where all are equally fast, as in
    # ddp, and more where they are not.
    tokens = 2 * 2 * 64
    assert ddp["tokens_per_s"] * ddp["step_s"] == pytest.approx(tokens, rel=1e-3), "two learners, two windows of 64 bytes"
    assert tokens * (1 - 1e-6) <= ours["tokens_per_s"] * ours["step_s"] < 1.5 * tokens
    assert 40 < ddp["per_step"]["link_up"] / ours["per_step"]["link_up"] < 60, "bf16, once in 24 steps, against float32 in each"
    assert ours["merges"] >= 20 and ours["summary"]["tokens_discarded"] == 0
    assert "| `ddp` | 1 |" in said and "| ours, bf16 | 1 |" in said and "the ratio of" in said


@two_cores
@namespaces
def test_wan_torchft(tmp_path):
    # A test installs nothing.
    if not (ROOT / "outputs" / f"torchft-{TORCHFT_VERSION}").exists():
        pytest.skip("torchft is not installed; `benchmarks/wan.py --torchft` does that in outputs/")
    said, rows = run(tmp_path, "wan.py", *SHORT_RATIO, "--torchft")
    jobs = rows["jobs"]
    for title, name, num_fragments in (("DiLoCo", "torchft_diloco", 1), ("streaming DiLoCo", "torchft_streaming", 4)):
        row = jobs[name]
        assert f"| torchft's {title} | 1 |" in said and row["val_loss"] < 5.0
        assert row["merges"] == row["due"] == num_fragments, "every exchange was committed"
        up, down = row["per_step"]["link_up"], row["per_step"]["link_down"]
        assert 1.0 < 24 * up / (4 * NUM_PARAMS) < 1.3 and 0.9 < up / down < 1.1, "float32, once in 24 steps, between the learners"
    assert jobs["torchft_diloco"]["val_loss"] != jobs["torchft_streaming"]["val_loss"]
