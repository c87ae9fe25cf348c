"""Real runs with `tape_payloads=True`, and `lightning-diloco replay` of them: the same bytes, or a sentence that says where not."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_diloco.config import SyncConfig
from lightning_diloco.runtime import payloads
from lightning_diloco.runtime.client import LearnerClient
from lightning_diloco.runtime.replay import replay_run
from tests.runtime.job_helpers import CONFIG, Background, make_module, running_job, train, until
from tests.runtime.replay_helpers import copy_of, events, flip_bit, merged_contributions, replay

WIDTH = 256
"""A fragment of 65,536 elements: torch computes it with several threads, if it may."""
TAME = replace(CONFIG, outer_lr=0.5, outer_momentum=0.3, outer_momentum_warmup=20)
"""The toy must not run away, however long it takes until every kind of merge was seen."""
KEPT = replace(TAME, tape_payloads=True, grace_fraction=0.0, min_quorum=2)
"""The first learner's merges are of one contribution; with two quick ones the slow one is late and carried, without a grace window."""


def has_merged(run_dir: Path) -> bool:
    return len(events(run_dir, "merge")) >= 12


def has_every_kind(run_dir: Path) -> bool:
    """Merges of one contribution and of more, of every fragment, with a momentum that warms up; contributions in time and late."""
    merges, contributions = events(run_dir, "merge"), events(run_dir, "contribution")
    sizes, outcomes = {len(m["members"]) for m in merges}, {c["outcome"] for c in contributions}
    is_mixed = 1 in sizes and max(sizes) > 1 and {"folded", "carried"} <= outcomes
    return is_mixed and len({m["outer_momentum"] for m in merges}) > 3 and {m["fragment_id"] for m in merges} == set(range(5))


def run_job(run_dir: Path, config: SyncConfig = KEPT, is_enough: Callable[[Path], bool] = has_merged) -> Path:
    """One learner, and when it has merged another one and a slow one; they train until it is enough."""
    run_dir.mkdir()
    is_over = threading.Event()

    def life(client: LearnerClient, sleep_s: float) -> None:
        client.join()
        while not is_over.is_set():
            train(client, 2, sleep_s=sleep_s)
        client.leave("limit")
        client.weights.load_global()
        client.close()

    with running_job(run_dir, config=config) as job:
        clients = [job.client(i, make_module(i, WIDTH)) for i in range(3)]
        runs = []
        try:
            for client, sleep_s in zip(clients, (0.002, 0.003, 0.03), strict=True):
                runs.append(Background(lambda c=client, s=sleep_s: life(c, s)))
                until(lambda: bool(events(run_dir, "merge")), 60)
            until(lambda: is_enough(run_dir), 60)
        finally:
            is_over.set()
        for run in runs:
            run.result()
        job.finish()
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """With all that a merge can be: see `test_the_run_has_merges_of_every_kind`."""
    return run_job(tmp_path_factory.mktemp("job") / "run", is_enough=lambda path: has_merged(path) and has_every_kind(path))


def test_the_run_has_merges_of_every_kind(run_dir):
    merges, contributions = events(run_dir, "merge"), events(run_dir, "contribution")
    assert has_every_kind(run_dir) and any(c["is_final"] for c in contributions)
    assert any(m["last_share"] is not None for m in merges) and any(m["last_share"] is None for m in merges)
    assert [f["kind"] for f in events(run_dir, "job")[0]["fragments"]][-1] == "buffers"


def test_a_run_is_replayed_to_its_bytes(run_dir, capsys):
    code, told = replay(run_dir, capsys)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert code == 0 and told["is_equal"] and told["differences"] == 0 and told["first_difference"] is None
    assert told["global_sha256"] == told["expected_sha256"] == summary["global_sha256"] and told["expected_from"] == "summary.json"
    merges = events(run_dir, "merge")
    assert told["merges"] == len(merges) and told["contributions"] == sum(len(m["members"]) for m in merges)
    assert [f["version"] for f in told["fragments"][:4]] == [[0, f["version"]] for f in summary["fragments"]]


@pytest.mark.parametrize(
    "changes",
    [{"merge": "mean", "wire_dtype": "fp32"}, {"wire_dtype": "int4"}, {"outer_momentum_warmup": 0, "adopt": "overwrite"}],
    ids=str,
)
def test_other_options_are_replayed_too(changes, tmp_path, capsys):
    folder = run_job(tmp_path / "run", replace(KEPT, **changes))
    code, told = replay(folder, capsys)
    assert code == 0 and told["merges"] >= 12


def test_it_works_without_the_publications(run_dir, tmp_path, capsys):
    assert events(run_dir, "publish")
    bare = copy_of(run_dir, tmp_path / "bare", lambda event: event["event"] != "publish")
    assert b'"event":"publish"' not in (bare / "tape.jsonl").read_bytes()
    code, told = replay(bare, capsys)
    assert code == 0 and (code, told) == replay(run_dir, capsys)


def test_the_number_of_threads_does_not_matter(run_dir):
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[threads] = replay_run(run_dir)
    finally:
        torch.set_num_threads(before)
    assert found[1] == found[2] and found[1].is_equal


def flipped(run_dir: Path, folder: Path, *, repairs: bool):
    """The run with the sign of one element of a contribution flipped; the contribution and its merge."""
    copy, place = copy_of(run_dir, folder), 2 * 7 + 1
    data = (run_dir / "payloads.bin").read_bytes()
    contribution, merge = next(
        (c, m)
        for c, m in merged_contributions(run_dir)
        if m["fragment_id"] == 1 and data[c["payload_at"] + payloads.HEADER_BYTES + place] & 0x7F
    )
    flip_bit(copy, contribution, place, 7, repairs=repairs)
    return copy, contribution, merge


def test_one_flipped_bit_changes_the_result(run_dir, tmp_path, capsys):
    copy, _, merge = flipped(run_dir, tmp_path / "flipped", repairs=True)
    code, told = replay(copy, capsys)
    assert code == 1 and not told["is_equal"] and told["global_sha256"] != told["expected_sha256"]
    version = f"({merge['version'][0]}, {merge['version'][1]})"
    assert f"tape.jsonl, line {merge['seq'] + 1}: merge of fragment 1 into version {version}: CRC-32" in told["first_difference"]
    assert [f["differences"] > 0 for f in told["fragments"]] == [False, True, False, False, False]


def test_one_flipped_bit_with_the_old_checksum_is_damage_with_its_place(run_dir, tmp_path, capsys):
    copy, contribution, _ = flipped(run_dir, tmp_path / "flipped", repairs=False)
    code, told = replay(copy, capsys)
    what = f"contribution {contribution['contribution_seq']} of learner {contribution['learner_id']} to fragment 1"
    place = f"payloads.bin, byte {contribution['payload_at']} ({what}): does not have its checksum. The file is damaged."
    assert code == 2 and place in told["error"]


def test_another_end_than_the_summarys_is_a_difference(run_dir, tmp_path, capsys):
    copy = copy_of(run_dir, tmp_path / "copy")
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps({**summary, "global_sha256": "0" * 64}))
    code, told = replay(copy, capsys)
    assert code == 1 and "summary.json: global_sha256 is " in told["first_difference"] and told["differences"] == 1
    (copy / "summary.json").unlink()
    code, told = replay(copy, capsys)
    assert code == 0 and told["expected_from"] == "tape.jsonl" and told["expected_sha256"] == summary["global_sha256"]


def test_a_job_that_has_not_ended_is_compared_as_far_as_it_goes(run_dir, tmp_path, capsys):
    last = events(run_dir, "merge")[10]["seq"]
    begun = copy_of(run_dir, tmp_path / "begun", lambda event: event["seq"] <= last)
    (begun / "summary.json").unlink()
    with (begun / "tape.jsonl").open("a") as file:
        file.write('{"seq": 99999, "half')
    code, told = replay(begun, capsys)
    assert code == 0 and told["merges"] == 11 and told["expected_sha256"] is None


def first(kind: str):
    """Leaves out the first line of a kind."""
    seen = []
    return lambda event: event["event"] != kind or seen or seen.append(event)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("merge", r"tape\.jsonl, line \d+: fragment 0 is merged into version \(0, 2\), and \(0, 1\) is next"), ("job", "no founded job")],
)
def test_a_missing_line_is_named(kind, sentence, run_dir, tmp_path, capsys):
    code, told = replay(copy_of(run_dir, tmp_path / "copy", first(kind)), capsys)
    assert code == 2
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(told["error"])


def test_a_missing_contribution_is_named(run_dir, tmp_path, capsys):
    contribution, _ = merged_contributions(run_dir)[3]
    copy = copy_of(run_dir, tmp_path / "copy", lambda event: event["seq"] != contribution["seq"])
    code, told = replay(copy, capsys)
    what = f"contribution {contribution['contribution_seq']} of learner {contribution['learner_id']} is merged, and was not accepted before"
    assert code == 2 and what in told["error"]


@pytest.mark.parametrize(("length", "sentence"), [(None, "cannot be opened"), (0, "the layout): no payload begins here"), (0.5, "byte ")])
def test_a_file_of_payloads_that_is_missing_or_cut_off_is_a_sentence(length, sentence, run_dir, tmp_path, capsys):
    copy = copy_of(run_dir, tmp_path / "copy")
    path = copy / "payloads.bin"
    if length is None:
        path.unlink()
    else:
        os.truncate(path, int(length * path.stat().st_size))
    code, told = replay(copy, capsys)
    assert code == 2 and "payloads.bin" in told["error"] and sentence in told["error"]


def test_payloads_of_another_run_are_not_taken_for_these(run_dir, tmp_path, capsys):
    other = run_job(tmp_path / "other")
    copy = copy_of(run_dir, tmp_path / "copy")
    (copy / "payloads.bin").write_bytes((other / "payloads.bin").read_bytes())
    assert replay(copy, capsys)[0] in (1, 2)


def test_a_damaged_line_is_named(run_dir, tmp_path, capsys):
    copy = copy_of(run_dir, tmp_path / "copy")
    lines = (copy / "tape.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "tape.jsonl").write_bytes(b"".join([*lines[:20], b'{"seq": 20, "t_s": 1.0, "event": "merge"}\n', *lines[21:]]))
    code, told = replay(copy, capsys)
    assert code == 2 and "tape.jsonl, line 21: not a record" in told["error"]


def test_a_run_without_payloads_says_how_to_keep_them(tmp_path, capsys):
    folder = run_job(tmp_path / "run", TAME)
    assert not (folder / "payloads.bin").exists()
    assert all(e["payload_at"] is None for e in events(folder, "contribution", "job"))
    code, told = replay(folder, capsys)
    assert code == 2 and "ran with tape_payloads=False" in told["error"] and "Pass tape_payloads=True to the strategy" in told["error"]


def test_a_full_disk_does_not_end_the_run_and_the_replay_says_what_is_missing(tmp_path, capsys, caplog, monkeypatch):
    written, real = [], os.pwritev

    def full(fd, parts, at):
        written.append(at)
        # A part of the 30th gets through, and then, for ten payloads, nothing.
        if len(written) == 30:
            return real(fd, [memoryview(parts[0])[:20]], at)
        if 30 < len(written) <= 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, parts, at)

    monkeypatch.setattr(payloads.os, "pwritev", full)
    with caplog.at_level(logging.ERROR):
        folder = run_job(tmp_path / "run", is_enough=lambda path: len(events(path, "contribution")) >= 50)
    assert "payloads.bin could not be written" in caplog.text and "lacks 10 payloads" in caplog.text
    arrived = events(folder, "contribution")
    lost = [e for e in arrived if e["payload_at"] is None]
    assert len(lost) == 10 and arrived[-1]["payload_at"] is not None, "it is tried again"
    code, told = replay(folder, capsys)
    merged = [c for c, _ in merged_contributions(folder) if c["payload_at"] is None]
    assert code == 2 and f"{len(merged)} contributions that were merged have no payload" in told["error"]
    assert f"contribution {merged[0]['contribution_seq']} of learner {merged[0]['learner_id']}" in told["error"]


@pytest.mark.process
def test_the_command_prints_a_sentence_and_does_not_import_lightning(run_dir):
    code = (
        "import sys\nfrom lightning_diloco.cli.main import main\ncode = main(sys.argv[1:])\n"
        "assert 'lightning' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "replay", str(run_dir)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    *fragments, total = done.stdout.splitlines()
    assert len(fragments) == 5 and total.endswith("equals that of summary.json.") and "merges of job" in total
