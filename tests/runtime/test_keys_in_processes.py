"""A syncer with keys as a process, bound to every interface: ports, a restart, and where its secret is not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.runtime.job_helpers import until
from tests.runtime.key_helpers import Keys
from tests.tape_checker import check_run, load_tape

pytestmark = pytest.mark.process

CONFIG = {"num_fragments": 2, "sync_interval_steps": 4, "heartbeat_s": 0.2, "drain_timeout_s": 60.0, "snapshot_interval_s": 0.2}


def two_free_ports() -> int:
    """The first of two neighbours."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("0.0.0.0", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("0.0.0.0", port + 1))
            except (OSError, OverflowError):
                continue
            return port
    raise AssertionError("no two free ports side by side")


@contextmanager
def process(log: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as file, subprocess.Popen([sys.executable, "-m", *argv], stdout=file, stderr=file) as started:
        try:
            yield started
        finally:
            started.kill()


def syncer(log: Path, port: int, keys: Keys, *argv: str) -> contextmanager:
    return process(log, "lightning_diloco", "syncer", "--bind", f"tcp://0.0.0.0:{port}", "--keys", str(keys.folder), "--verbose", *argv)


def wait_ready(run_dir: Path, pid: int) -> dict[str, object]:
    def said() -> dict[str, object]:
        try:
            return json.loads((run_dir / "syncer.json").read_text())
        except (OSError, ValueError):
            return {}

    until(lambda: said().get("pid") == pid, 60)
    return said()


def about(pid: int) -> bytes:
    return b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))


@pytest.mark.slow
def test_a_syncer_with_keys_goes_on_at_the_same_ports_and_its_secret_is_nowhere(tmp_path):
    keys = Keys(tmp_path / "keys")
    keys.site("paris")
    run_dir, log, learner_log, port = tmp_path / "run", tmp_path / "syncer.log", tmp_path / "learner.log", two_free_ports()
    wish = {
        "endpoint": f"tcp://127.0.0.1:{port}",
        "config": CONFIG,
        "learner_id": 0,
        "width": 8,
        "steps": 500,
        "sleep_s": 0.02,
        "run_dir": str(run_dir),
        "keys": str(keys.site_folder("paris")),
    }
    shown = b""
    with syncer(log, port, keys, "--run-dir", str(run_dir)) as first:
        said = wait_ready(run_dir, first.pid)
        assert (said["endpoint"], said["bulk"]) == (f"tcp://0.0.0.0:{port}", f"tcp://0.0.0.0:{port + 1}")
        with process(learner_log, "tests.runtime.job_learner", json.dumps(wish)) as learner:
            until(lambda: sum(line["event"] == "merge" for line in load_tape(run_dir / "tape.jsonl")) > 20, 60)
            shown += about(first.pid) + about(learner.pid)
            first.kill()
            first.wait()
            with syncer(log, port, keys, "--resume", str(run_dir)) as second:
                assert {**wait_ready(run_dir, second.pid), "pid": 0} == {**said, "pid": 0}
                shown += about(second.pid)
                assert learner.wait(60) == 0, learner_log.read_text()
                assert second.wait(60) == 0, log.read_text()
    summary = check_run(run_dir)
    assert summary["status"] == "finished" and summary["tokens"] == 500 * 16
    assert "restart" in {line["event"] for line in load_tape(run_dir / "tape.jsonl")}
    text = log.read_text()
    assert f"Ports {port} and {port + 1} (TCP)" in text and "keys='DIR')" in text and "(admitted: paris)" in text
    written = shown + b"".join(path.read_bytes() for path in [*run_dir.rglob("*"), log, learner_log] if path.is_file())
    assert len(written) > 10_000 and str(keys.folder).encode() in written
    assert [secret for secret in keys.secrets() if secret in written] == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_site_that_is_revoked_while_the_syncer_is_killed_ends_when_it_goes_on(tmp_path):
    keys = Keys(tmp_path / "keys")
    run_dir, log, port = tmp_path / "run", tmp_path / "syncer.log", two_free_ports()
    logs = {name: tmp_path / f"{name}.log" for name in ("paris", "oslo")}
    wishes = [
        {
            "endpoint": f"tcp://127.0.0.1:{port}",
            "config": CONFIG,
            "learner_id": learner_id,
            "width": 8,
            "steps": steps,
            "sleep_s": 0.02,
            "run_dir": str(run_dir),
            "keys": str(keys.site_folder(name)),
        }
        for learner_id, (name, steps) in enumerate({"paris": 3000, "oslo": 1_000_000}.items())
    ]
    for name in logs:
        keys.site(name)
    with ExitStack() as stack:
        first = stack.enter_context(syncer(log, port, keys, "--run-dir", str(run_dir)))
        wait_ready(run_dir, first.pid)
        paris, oslo = (
            stack.enter_context(process(logs[name], "tests.runtime.job_learner", json.dumps(wish)))
            for name, wish in zip(logs, wishes, strict=True)
        )
        until(lambda: {line["learner_id"] for line in load_tape(run_dir / "tape.jsonl") if line["event"] == "contribution"} == {0, 1}, 60)
        first.kill()
        first.wait()
        revoke = [sys.executable, "-m", "lightning_diloco", "keygen", str(keys.folder), "--revoke", "oslo"]
        assert subprocess.run(revoke, capture_output=True, timeout=60).returncode == 0
        second = stack.enter_context(syncer(log, port, keys, "--resume", str(run_dir)))
        wait_ready(run_dir, second.pid)
        assert oslo.wait(70) != 0
        assert paris.poll() is None
        assert paris.wait(120) == 0, logs["paris"].read_text()
        assert second.wait(60) == 0, log.read_text()
    assert "FencedError: key_revoked: The key of this site was revoked" in logs["oslo"].read_text()
    summary = check_run(run_dir)
    assert [x["learner_id"] for x in summary["learners"]] == [0, 1] and summary["learners"][0]["tokens"] == 3000 * 16


def test_beyond_loopback_without_keys_only_if_it_is_said(tmp_path):
    port, log, run_dir = two_free_ports(), tmp_path / "log", tmp_path / "run"
    refused = [sys.executable, "-m", "lightning_diloco", "syncer", "--bind", f"tcp://0.0.0.0:{port}", "--run-dir", str(run_dir)]
    ended = subprocess.run(refused, capture_output=True, timeout=60, text=True)
    assert ended.returncode == 2 and "or say --insecure" in ended.stderr and not run_dir.exists()
    with process(log, *refused[2:], "--insecure") as started:
        wait_ready(run_dir, started.pid)
        started.terminate()
        assert started.wait(30) == 0
    assert "WARNING: --insecure. Nothing is encrypted" in log.read_text()
