"""Other users of the machine do not learn from a run directory who speaks in a job: a process's nonce is all that its messages show."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lightning_diloco.runtime.rundir import make_run_dir
from tests.runtime.job_helpers import running_job, train, until


def open_to_others(folder: Path) -> list[Path]:
    """What of a folder, itself included, others can reach by its modes: entries of folders that can be listed, files that can be read."""
    found = [folder]
    if folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) & stat.S_IROTH:
        found += [path for entry in folder.iterdir() for path in open_to_others(entry)]
    return found


def is_readable(path: Path) -> bool:
    return path.is_file() and bool(stat.S_IMODE(path.stat().st_mode) & stat.S_IROTH)


def test_no_session_is_in_a_name_or_a_file_that_others_can_read(tmp_path: Path):
    before = os.umask(0o022)
    try:
        run_dir = make_run_dir(tmp_path / "run")
        with running_job(run_dir, "tcp", token="secret", takeover_token="other", num_slots=1) as job:
            client = job.client(0, token="secret")
            client.join()
            train(client, 5)
            session = client._nonce.hex()
            until(lambda: session in (run_dir / "tape.jsonl").read_text())
            assert (run_dir / "counters" / f"{session}.bin").exists(), "there is something to find"
            seen = open_to_others(run_dir)
            assert run_dir / "logs" in seen and run_dir / "tape.jsonl" in seen
            assert not [path for path in seen if session in path.name]
            assert not [path for path in seen if is_readable(path) and session.encode() in path.read_bytes()]
            client.leave("limit")
            client.weights.load_global()
            client.close()
    finally:
        os.umask(before)
