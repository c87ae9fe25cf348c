"""What `benchmarks/stall.py` makes of its blocks: a verdict that one disturbed block does not move."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import stall
from tests.doc_pages import ROOT


def row(blocks_s, **more):
    fixed = {"num_params": 1, "step_off_s": 0.1, "others_s": 0.0, "stall_share": 0.005, "stall_p99_s": 1e-3, "above_3_copies_p99_s": 0.0}
    return fixed | {"merges": 1, "parts_s": {"all": 1e-3}, "bytes_per_boundary": 1.0, "step_by_block_s": blocks_s} | more


def blocks(on_s, *, num_on=5, disturbed_off_s=None):
    """Off and on in turns, a step of 100 ms without; the third block without may be a disturbed one."""
    off = [0.1] * (num_on + 1)
    off[2] = disturbed_off_s or 0.1
    return [value for pair in zip(off, [on_s] * num_on, strict=False) for value in pair] + off[num_on:]


@pytest.mark.parametrize("disturbed_off_s", [None, 0.2])
@pytest.mark.parametrize(("on_s", "code"), [(0.1 / 0.96, 1), (0.1 / 0.98, 0)])
def test_a_block_without_in_which_something_else_ran_changes_no_verdict(disturbed_off_s, on_s, code, capsys):
    values = blocks(on_s, disturbed_off_s=disturbed_off_s)
    ratios = stall.on_over_off(values)
    assert len(ratios) == 5 and sum(ratio > 1.0 for ratio in ratios) == (0 if disturbed_off_s is None else 2)
    assert stall.report({"a": row(values)}) == code
    said = capsys.readouterr().out
    assert f"| a (1) | 100.0 | {0.1 / on_s:.3f} ({0.1 / on_s:.3f}, " in said and ("MISSED: a" in said) == bool(code)


@pytest.mark.parametrize("more", [{"stall_share": 0.011}, {"above_3_copies_p99_s": 1.1e-3}])
def test_the_other_aims_are_missed_too(more, capsys):
    assert stall.report({"a": row(blocks(0.1)), "b": row(blocks(0.1), **more)}) == 1
    assert capsys.readouterr().out.endswith("\nMISSED: b\n")


def test_fewer_than_five_blocks_are_not_judged(capsys):
    assert stall.report({"a": row(blocks(0.2, num_on=4))}) == 1
    assert capsys.readouterr().out.endswith("\nNOT JUDGED, fewer than 5 ratios on / off: a\n")


def test_a_report_runs_nothing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["stall.py", "--report", "--json", str(path)])
    with pytest.raises(SystemExit, match=r"rows\.json has no rows: leave out --report"):
        stall.main()
    path.write_text(json.dumps({"a": row(blocks(0.1))}))
    assert stall.main() == 0 and "| a (1) |" in capsys.readouterr().out


def test_the_page_has_the_table_of_its_rows(capsys):
    stall.report(json.loads((ROOT / "docs" / "benchmarks" / "stall.json").read_text()))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) > 10 and set(table) <= set((ROOT / "docs" / "benchmarks" / "stall.md").read_text().splitlines())
