"""One shard's process over its lives, and what the process that looks after all of them makes of their ends."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lightning_diloco.cli.main import main
from lightning_diloco.cli.shards import refuse_shards
from lightning_diloco.errors import ConfigurationError, SyncerUnavailableError
from lightning_diloco.protocol.records import TapeLine, encode_line
from lightning_diloco.runtime import children, shard_process
from lightning_diloco.runtime.shard_process import CANNOT_LISTEN, ShardProcess
from lightning_diloco.runtime.sharded_syncer import ShardedSyncer
from lightning_diloco.runtime.shards import num_shards_of, shard_dir, write_num_shards
from lightning_diloco.runtime.tape import TAPE_NAME
from tests.disk_kit import WAYS, fill, small_disk
from tests.metrics.tape_builder import TapeBuilder
from tests.runtime.job_helpers import until
from tests.runtime.shard_helpers import free_ports

HELLO: dict[str, Any] = {"shard": 1, "num_shards": 2, "bulk": "", "endpoints": []}


@contextmanager
def serving(run_dir: Path):
    """A real process, which serves."""
    shard = ShardProcess(1, run_dir, [], "tcp://127.0.0.1:0", dict(HELLO))
    shard.start()
    try:
        shard.await_ready()
        yield shard
    finally:
        shard.kill()


def looked_after(shard: ShardProcess, is_so: Any) -> bool:
    shard.look_after()
    return bool(is_so())


@pytest.mark.process
def test_sigterm_does_not_end_a_shard_and_its_parents_word_does(tmp_path):
    """Taken for its job's end, it ended the whole job, as `finished`, while learners trained."""
    with serving(tmp_path) as shard:
        pid = shard.pid
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
        end_s = time.monotonic() + 1.0
        until(lambda: looked_after(shard, lambda: time.monotonic() > end_s))
        assert not shard.is_done and shard.pid == pid and shard.restarts == 0 and Path(f"/proc/{pid}").exists()
        shard.finish("stopped")
        until(lambda: looked_after(shard, lambda: shard.is_done))
        assert not shard.has_failed


@pytest.mark.slow
@pytest.mark.process
def test_a_killed_shard_whose_port_is_taken_meanwhile_comes_back_when_it_is_free(tmp_path, caplog):
    with serving(tmp_path) as shard, socket.socket() as taken:
        port = int(shard.endpoints[0].rpartition(":")[2])
        os.kill(shard.pid, signal.SIGKILL)
        until(lambda: looked_after(shard, lambda: "was ended by SIGKILL" in caplog.text))
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        identity = (tmp_path / "snapshots" / "identity.json").read_text()
        until(lambda: looked_after(shard, lambda: f"cannot listen at tcp://127.0.0.1:{port}" in caplog.text), 60)
        assert not shard.is_done and shard.restarts == 0
        assert (tmp_path / "snapshots" / "identity.json").read_text() == identity, "no epoch is spent on a start that is none"
        taken.close()
        until(lambda: looked_after(shard, shard.look_for_ready), 60)
        assert shard.restarts == 1 and shard.endpoints[0].endswith(f":{port}")


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_shard_whose_disk_takes_nothing_comes_back_when_it_does(way, tmp_path, caplog):
    with small_disk(tmp_path / "disk") as disk:
        (disk / "run").mkdir()
        with serving(disk / "run") as shard:
            with WAYS[way](disk):
                os.kill(shard.pid, signal.SIGKILL)
                until(lambda: looked_after(shard, lambda: SAID[way](disk, caplog.text)), 60)
                assert not shard.is_done and shard.restarts == 0
            until(lambda: looked_after(shard, lambda: shard.restarts and shard.look_for_ready()), 60)
            assert shard.restarts == 1


def is_said_of_a_full_disk(disk: Path, text: str) -> bool:
    fill(disk)  # the file in which the dead one has said its address is removed: it could begin in the room of that
    return "could not start, because its disk takes nothing, and is started again" in text


SAID = {"full": is_said_of_a_full_disk, "read_only": lambda disk, text: "Read-only file system" in text}


class Ends:
    """In `start_child`'s place: real child processes that end at once, and what they were started with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *codes: int | OSError) -> None:
        self.codes, self.arguments = list(codes), list[list[str]]()
        monkeypatch.setattr(shard_process, "start_child", self.start)
        monkeypatch.setattr(shard_process, "FIRST_PAUSE_S", 0.02)
        monkeypatch.setattr(shard_process, "LONGEST_PAUSE_S", 0.02)

    def start(self, module: str, arguments: list[str], **options: Any) -> children.Child:
        self.arguments.append(arguments)
        code = self.codes.pop(0)
        if isinstance(code, OSError):
            raise code
        script = Path(arguments[arguments.index("--resume" if "--resume" in arguments else "--run-dir") + 1]) / "ends.py"
        script.write_text(f"import sys; sys.exit({code})")
        return children.start_child("ends", [], log=None, environment={**os.environ, "PYTHONPATH": str(script.parent)})


def shard_that_has_served(run_dir: Path) -> ShardProcess:
    shard = ShardProcess(1, run_dir, [], "tcp://127.0.0.1:7000", {**HELLO, "bulk": "tcp://127.0.0.1:7001"})
    (run_dir / "snapshots").mkdir()
    (run_dir / "snapshots" / "identity.json").write_text("{}")
    shard._was_ready = True
    shard._start_again()
    return shard


def test_a_taken_port_or_a_system_without_processes_is_tried_again_and_an_error_is_the_end(tmp_path, monkeypatch, caplog):
    ends = Ends(monkeypatch, CANNOT_LISTEN, OSError(11, "no process"), CANNOT_LISTEN, 2)
    shard = shard_that_has_served(tmp_path)
    until(lambda: looked_after(shard, lambda: shard.is_done))
    assert shard.has_failed and len(ends.arguments) == 4 and shard.restarts == 1
    assert caplog.text.count("cannot listen at tcp://127.0.0.1:7000 and is started again") == 2
    assert caplog.text.count("could not be started ([Errno 11] no process)") == 1
    assert all(arguments[arguments.index("--bind") + 1] == "tcp://127.0.0.1:7000" for arguments in ends.arguments)


def test_a_shard_that_is_told_the_end_while_its_port_is_taken_takes_any(tmp_path, monkeypatch, caplog):
    """Nobody dials it any more, and its model is wanted."""
    ends = Ends(monkeypatch, CANNOT_LISTEN, 0)
    shard = shard_that_has_served(tmp_path)
    until(lambda: looked_after(shard, lambda: "cannot listen" in caplog.text))
    shard.finish("finished")
    until(lambda: looked_after(shard, lambda: shard.is_done))
    assert not shard.has_failed
    assert [arguments[arguments.index("--bind") + 1] for arguments in ends.arguments] == ["tcp://127.0.0.1:7000", "tcp://127.0.0.1:0"]


def test_a_first_start_at_a_taken_port_fails_at_once(tmp_path, monkeypatch):
    ends = Ends(monkeypatch, CANNOT_LISTEN)
    shard = ShardProcess(1, tmp_path, [], "tcp://127.0.0.1:7000", dict(HELLO))
    shard.start()
    with pytest.raises(SyncerUnavailableError, match="Shard 1 did not begin to serve"):
        shard.await_ready()
    assert len(ends.arguments) == 1


@pytest.mark.process
def test_a_half_made_start_is_made_again_by_the_same_command(tmp_path, capsys):
    """Nobody has founded anything, so nothing of a job can be lost."""
    run_dir, port = str(tmp_path / "run"), free_ports(4)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 2))
        taken.listen()
        for arguments in (["--run-dir", run_dir, "--shards", "2"], ["--run-dir", run_dir, "--shards", "2"], ["--resume", run_dir]):
            assert main(["syncer", *arguments, "--bind", f"tcp://127.0.0.1:{port}"]) == 2
            assert "Shard 1 did not begin to serve" in capsys.readouterr().err
    assert not (shard_dir(tmp_path / "run", 1) / "snapshots").exists(), "a port that is taken leaves nothing of a job"


def arguments(run_dir: Path, *, shards: str | None = None, resume: bool = False) -> argparse.Namespace:
    where = {"run_dir": run_dir, "resume": run_dir if resume else None}
    return argparse.Namespace(**where, shards=shards, rebuild=False, bind="tcp://127.0.0.1:0")


def test_half_made_folders_are_used_and_those_of_a_founded_job_are_not(tmp_path):
    write_num_shards(tmp_path, 2)
    identity = shard_dir(tmp_path, 1) / "snapshots" / "identity.json"
    identity.parent.mkdir(parents=True)
    identity.write_text("{}")
    assert refuse_shards(arguments(tmp_path, shards="2")) == refuse_shards(arguments(tmp_path, resume=True)) == 2
    for other in ("3", "1", None):
        with pytest.raises(ConfigurationError, match="no learner has founded a job. Say --shards 2, or give a new directory"):
            refuse_shards(arguments(tmp_path, shards=other))
    (identity.parent / "founding.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="holds an earlier job"):
        refuse_shards(arguments(tmp_path, shards="2"))
    with pytest.raises(ConfigurationError, match="shards/0: this shard's part of the job is lost"):
        refuse_shards(arguments(tmp_path, resume=True))


def test_a_lost_shards_json_is_noticed(tmp_path, capsys):
    (shard_dir(tmp_path, 1) / "snapshots").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"shards.json: is not there, and .*/shards has folders of shards \(1\). Put it back"):
        num_shards_of(tmp_path)
    for command in (["syncer", "--run-dir", str(tmp_path)], ["export", str(tmp_path), str(tmp_path / "model.ckpt")]):
        assert main(command) == 2
        assert 'Put it back: {"num_shards": S}, with the number that the job has.' in capsys.readouterr().err
    assert not (tmp_path / "snapshots").exists()


def test_the_drain_of_a_job_that_is_over_somewhere_at_once_is_that_of_its_configuration(tmp_path):
    """The summary's fold may have seen nothing of the tapes yet, and its keeper feeds it every few seconds only."""
    syncer = ShardedSyncer(tmp_path, 2, "tcp://127.0.0.1:0", [], 0.0)
    syncer._shards[0].is_done = True
    assert syncer._word(0.0, 0.0) is None and syncer._word(5.1, 0.0) == "finished", "no tape tells of a drain"
    tape = TapeBuilder()
    tape.job()
    (line,) = tape.lines
    line = TapeLine(line.seq, line.t_s, msgspec.structs.replace(line.record, config={"drain_timeout_s": 30.0}))
    shard_dir(tmp_path, 0).mkdir(parents=True)
    (shard_dir(tmp_path, 0) / TAPE_NAME).write_bytes(encode_line(line))
    assert syncer._word(5.1, 0.0) is None and syncer._word(34.9, 0.0) is None and syncer._word(35.1, 0.0) == "finished"
