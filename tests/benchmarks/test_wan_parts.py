"""The parts of `benchmarks/wan.py` that decide what it claims: the formula of bytes, peaks, links, aims."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from benchmarks.merge import bound_s, distances, formula_bytes
from benchmarks.wan.net import SYNCER, Net, is_possible
from benchmarks.wan.progress import ProgressFile, read_progress
from benchmarks.wan.relay import relay
from benchmarks.wan.report import FEWER_BYTES, ddp_bytes, our_bytes, p99, ratio
from benchmarks.wan.sampler import peak_bytes_per_s
from tests.doc_pages import ROOT

NUM_PARAMS = 854_272


def test_the_aims_of_bytes_are_what_the_formula_says_less_what_headers_cost():
    for (wire, num_learners), aim in FEWER_BYTES.items():
        expected = ddp_bytes(NUM_PARAMS, num_learners) / our_bytes(NUM_PARAMS, wire)
        assert 0.9 * expected < aim <= expected, (wire, num_learners, expected)
    assert ddp_bytes(NUM_PARAMS, 2) / our_bytes(NUM_PARAMS, "bf16") == 48


def test_progress_is_readable_from_outside(tmp_path):
    path = tmp_path / "steps.bin"
    assert read_progress(path) == 0
    file = ProgressFile(path)
    assert read_progress(path) == 0
    file.note(7)
    assert read_progress(path) == 7


def test_the_peak_is_the_highest_rate_over_a_second_inside_of_the_window(tmp_path):
    path = tmp_path / "links"
    counts, lines = 0, []
    for look in range(100):
        counts += 1000 if 30 <= look < 40 or look >= 90 else 10
        lines.append(f"{look / 10} v0 {counts} 5")
    path.write_text("\n".join([*lines, "10.0 v0 7"]))  # the last line is half written
    (up, down) = peak_bytes_per_s(path, 0.0, 8.0)["v0"]
    assert up == pytest.approx(10_000) and down == 0


def test_a_relay_delays_both_ways_limits_the_rate_and_ends_with_either_side():
    async def echo(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def run():
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        endpoint = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        routes = await relay([endpoint], delay_s=0.05, bytes_per_s=200_000.0)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(routes[endpoint].rpartition(":")[2]))
        start_s = time.monotonic()
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        there_and_back_s = time.monotonic() - start_s
        payload = bytes(range(256)) * 400
        writer.write(payload)
        assert await reader.readexactly(len(payload)) == payload
        both_s = time.monotonic() - start_s
        writer.close()
        assert await reader.read() == b""
        server.close()
        return there_and_back_s, both_s

    there_and_back_s, both_s = asyncio.run(run())
    assert there_and_back_s >= 0.1 and both_s >= 0.1 + 102_400 / 200_000


SEND = "import socket,sys; s=socket.create_connection((sys.argv[1], 9)); s.sendall(bytes(200_000)); s.shutdown(1); s.recv(1)"
TAKE = (
    "import socket,sys,time; l=socket.create_server((sys.argv[1], 9)); print('up', flush=True); s=l.accept()[0]; t=time.monotonic()\n"
    "while s.recv(65536): pass\n"
    "print(time.monotonic()-t, flush=True)"
)


@pytest.mark.skipif(is_possible() is not None, reason=f"no network namespaces: {is_possible()}")
def test_a_link_is_limited_and_counted_and_namespaces_are_removed_on_an_error():
    with pytest.raises(ZeroDivisionError), Net(1) as net:
        net.limit_all(250_000.0)
        address = net.address(SYNCER)
        with subprocess.Popen([*net.inside(SYNCER), sys.executable, "-c", TAKE, address], stdout=subprocess.PIPE, text=True) as taker:
            assert taker.stdout is not None and taker.stdout.readline() == "up\n"
            subprocess.run([*net.inside(0), sys.executable, "-c", SEND, address], check=True, timeout=30)
            assert float(taker.stdout.readline()) > 0.5, "faster than its link"
        command = [*net.inside(0), "cat", "/sys/class/net/eth0/statistics/tx_bytes"]
        sent = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert 200_000 * 1.02 < sent < 200_000 * 1.1, "frames of at most 1,500 bytes, with their headers"
        assert net.name(0) in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        raise ZeroDivisionError
    assert net.name(0) not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("program", ["ip", "tc"])
def test_a_trial_that_fails_is_the_reason_why_there_are_no_namespaces(program, tmp_path, monkeypatch):
    for name in ("ip", "tc"):
        said = "echo Operation not permitted >&2; echo more >&2; exit 1" if name == program else "exit 0"
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} $1 $2 $3 >> {tmp_path}/said\n{said}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    why = is_possible.__wrapped__()  # not what was found out for this machine
    assert re.fullmatch(rf"a trial failed: {program} .*: Operation not permitted", why)
    said = (tmp_path / "said").read_text().splitlines()
    made, gone = (sum(line.startswith(f"ip netns {word} wan{os.getpid()}") for line in said) for word in ("add", "del"))
    assert (made, gone) == ((1, 0) if program == "ip" else (2, 2)), said


@pytest.mark.skipif(is_possible() is not None or shutil.which("setpriv") is None, reason=f"no root to take rights from: {is_possible()}")
def test_root_without_its_rights_has_no_namespaces_and_is_told_so():
    tell = "from benchmarks.wan.net import is_possible; print(is_possible())"
    command = ["setpriv", "--bounding-set=-sys_admin,-net_admin", sys.executable, "-c", tell]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"a trial failed: ip netns add wan\d+h: .*Operation not permitted\n", done.stdout)


def row(tokens_per_s, step_s, link, **more):
    per_step = {"link_up": link / 2, "link_down": link / 2}
    fixed = {"val_loss": None, "bytes_per_s": None, "max_steps": 10, "syncer_s_per_step": 0.0, "merges": 10, "due": 10}
    return fixed | {"tokens_per_s": tokens_per_s, "step_s": step_s, "per_step": per_step} | more


def jobs(ours_tokens_per_s=980.0, ddp_step_s=3.0, ours_link=2e4, merges=10):
    fixed = {
        "alone 0": row(1000.0, 0.1, 0.0),
        "alone 1": row(1000.0, 0.1, 0.0),
        "bf16 0": row(ours_tokens_per_s, 0.1, ours_link, merges=merges),
    }
    return fixed | {"ddp": row(100.0 / ddp_step_s, ddp_step_s, 1e6), "post_local_sgd": row(500.0, 0.2, 4e4)}


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"ours_tokens_per_s": 960.0}, ["of the learners without communication"]),
        ({"ddp_step_s": 2.0}, ["is not one of those for which the aims hold", "times the tokens per second"]),
        ({"ours_link": 3e4}, ["of ddp's bytes"]),
        ({"merges": 9}, ["of the merges that were due"]),
    ],
)
def test_each_aim_can_be_missed(changed, missed, capsys):
    found = ratio(jobs(**changed), ["bf16"], 1, NUM_PARAMS, 2)
    assert len(found) == len(missed) and all(part in text for part, text in zip(missed, found, strict=True)), found
    assert "| ours, bf16 | 1 |" in capsys.readouterr().out


def test_a_line_is_fitted_from_two_learners_on_and_the_bound_is_every_byte_once():
    rows = [{"learners": m, "merge_s": 1.0 + 2.0 * m} for m in (2, 4, 8)]
    assert max(distances([{"learners": 1, "merge_s": 9.0}, *rows]).values()) < 1e-9
    assert distances([{"learners": 1, "merge_s": 9.0}, *rows[:2]]) == {}
    assert max(distances([*rows, {"learners": 16, "merge_s": 99.0}]).values()) > 0.1
    full = {"learners": 3, "num_params": 100, "payload_bytes": 200, "copy_bytes_per_s": 1000.0}
    assert bound_s(full) == (3 * 200 + 2400) / 1000 and formula_bytes(full) == 2800 + 400
    assert formula_bytes(full | {"learners": 1}) == 2400 + 400


def test_the_99th_percentile_is_exceeded_by_one_of_a_hundred():
    assert p99([float(i) for i in range(100)]) == 98.0 and p99([1.0]) == 1.0
