"""The rows of torchft in `benchmarks/wan.py`, as far as they need no torchft: its absence, the fragments, the host's name, the tables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from benchmarks.wan.jobs import with_hostname
from benchmarks.wan.net import is_possible
from benchmarks.wan.report import ratio
from benchmarks.wan.torchft_learner import fragments_of
from benchmarks.wan.torchft_packages import find_torchft, packages
from recipes.gpt_text.model import GPT


def test_where_pip_finds_nothing_the_reason_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="pip could not install it: .*torchft-nightly"):
        packages(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("num_fragments", [1, 2, 3, 4])
def test_every_parameter_is_in_one_fragment(num_fragments):
    gpt = GPT(num_layers=4, num_heads=2, channels=8, context=4)
    fragments = fragments_of(gpt, num_fragments)
    found = [id(parameter) for fragment in fragments for parameter in fragment.parameters()]
    assert len(fragments) == num_fragments and all(list(fragment.parameters()) for fragment in fragments)
    assert len(set(found)) == len(found) and set(found) == {id(parameter) for parameter in gpt.parameters()}


@pytest.mark.parametrize("num_fragments", [0, 3])
def test_more_fragments_than_blocks_are_refused(num_fragments):
    with pytest.raises(ValueError, match=f"num_fragments={num_fragments}: .* Give 1 to 2"):
        fragments_of(GPT(num_layers=2, num_heads=2, channels=8, context=4), num_fragments)


@pytest.mark.skipif(is_possible() is not None, reason=f"no network namespaces: {is_possible()}")
def test_a_host_name_is_seen_by_its_process_alone():
    before = socket.gethostname()
    command = [*with_hostname("10.77.0.1"), sys.executable, "-c", "import socket; print(socket.gethostname())"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "10.77.0.1" and socket.gethostname() == before


def row(tokens_per_s, loss, steps=72, **more):
    fixed = {"bytes_per_s": None, "step_s": 100.0 / tokens_per_s, "syncer_s_per_step": 0.0, "per_step": {"link_up": 1e5, "link_down": 1e5}}
    return fixed | {"tokens_per_s": tokens_per_s, "val_loss": loss, "max_steps": steps} | more


def test_the_tables_hold_torchft_beside_the_others(capsys):
    alone = {f"alone {name}": row(1000.0, None) for name in ("0", "1", "torchft", "torchft_streaming")} | {
        "alone torchft_diloco": row(600.0, None)
    }
    ddp = {name: row(30.0, loss) for name, loss in (("ddp", 4.0), ("ddp, equal tokens, 1", 2.25), ("ddp, equal time, 1", 3.9))}
    theirs = {
        "torchft_diloco": row(400.0, 2.5, merges=1, due=2),
        "torchft_diloco, equal time": row(1.0, 2.75, 48),
        "torchft_streaming": row(600.0, 2.375, merges=8, due=8),
        "torchft_streaming, equal time": row(1.0, 2.625, 48),
    }
    ours = {"post_local_sgd": row(400.0, 2.6), "bf16 0": row(980.0, 2.125, merges=24, due=24)}
    ratio(alone | ddp | theirs | ours, ["bf16"], 1, 854_272, 2)
    said = capsys.readouterr().out
    assert "| torchft's DiLoCo | 1 | 400 | 13.3 | 0.500 (0.500, 0.500) | 200.0 |" in said
    assert "| torchft's streaming DiLoCo | 1 | 600 | 20.0 | 0.750 (0.750, 0.750) | 200.0 |" in said
    assert "| equal tokens | 2.250 (72 steps) | 2.500 (72 steps) | 2.375 (72 steps) | 2.125 |" in said
    assert "| equal wall time | 3.900 (72 steps) | 2.750 (48 steps) | 2.625 (48 steps) | 2.125 |" in said
    ratio(alone | ddp | ours, ["bf16"], 1, 854_272, 2)
    without = capsys.readouterr().out
    assert "torchft" not in without and "| equal tokens | 2.250 (72 steps) | 2.125 |" in without
    post_local = {"post_local_sgd, equal tokens": row(1.0, 2.4375), "post_local_sgd, equal time": row(1.0, 2.6875, 24)}
    missed = ratio(alone | ddp | theirs | ours | post_local, ["bf16"], 1, 854_272, 2)
    assert not any("equal wall time" in sentence for sentence in missed)
    said = capsys.readouterr().out
    assert "| equal wall time | 3.900 (72 steps) | 2.688 (24 steps) | 2.750 (48 steps) | 2.625 (48 steps) | 2.125 |" in said
    faster = {"torchft_streaming, equal time": row(1.0, 2.0625, 48)}
    missed = ratio(alone | ddp | theirs | ours | faster, ["bf16"], 1, 854_272, 2)
    assert "bf16: a loss of 2.125 at equal wall time, where another row has 2.062" in missed


def test_without_namespaces_the_rows_are_left_out_with_a_sentence(tmp_path, capsys):
    assert find_torchft(tmp_path, "this process is not root") is None
    assert capsys.readouterr().err == "The rows of torchft are left out: they need network namespaces, and this process is not root.\n"
    assert os.listdir(tmp_path) == []
