"""The command line: `--help` is 0, wrong use is one sentence and 2, and never a traceback."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_diloco import __version__
from lightning_diloco.cli.main import main
from lightning_diloco.cli.syncer import _first_line
from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.rundir import lock_run_dir
from lightning_diloco.runtime.shard_process import CANNOT_LISTEN
from lightning_diloco.runtime.shards import write_num_shards
from tests.runtime.job_helpers import until

COMMANDS = ["syncer", "status", "keygen", "replay", "export", "simulate", "plan", "report"]


def run(*argv: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "lightning_diloco", *argv], input=stdin, capture_output=True, timeout=60)


def is_one_sentence(text: str) -> bool:
    return text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text and len(text) > 20


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a wrong use in this process; returns its sentence."""
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and is_one_sentence(err), (code, out, err)
    return err


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)], ids=str)
def test_help_is_0(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and "usage:" in out and err == ""


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("syncer", "simulate", "export", "replay", "keygen", "status")])
def test_a_command_that_is_not_there_yet_says_so_whatever_follows_it(command, capsys):
    says = re.compile(rf"lightning-diloco: {command} \([a-z -]+\) is not there yet\. [A-Z].+\.\n")
    assert says.fullmatch(refuse(capsys, command))
    assert says.fullmatch(refuse(capsys, command, "some/path", "--json"))
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "is not there yet. " in " ".join(capsys.readouterr().out.split())


def test_help_names_the_help_of_a_command_and_what_the_default_is(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "lightning-diloco COMMAND --help" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["syncer", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "usage: lightning-diloco syncer (--run-dir DIR [--rebuild] | --resume RUN_DIR) [--bind ENDPOINT] [--keys DIR |" in words
    assert "(default tcp://127.0.0.1:0, any free port)" in words and "--keys DIR" in words and "issue" not in words


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"lightning-diloco {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["serve"], "invalid choice: 'serve'"),
        (["syncer"], "--run-dir DIR is required: the folder of the job"),
        (["syncer", "--bandwidth", "3"], "lightning-diloco syncer: unrecognized arguments: --bandwidth 3"),
        (["syncer", "--run-dir", "x", "--bandwidth", "3"], "unrecognized arguments: --bandwidth 3"),
        (["syncer", "--run-dir", "x", "--bind", "tcp://0.0.0.0:7777"], "beyond loopback"),
        (["syncer", "--run-dir", "x", "--bind", "tcp://*:7777"], "beyond loopback"),
        (["syncer", "--run-dir", "x", "--bind", "tcp://127.0.0.1:99999"], "99999"),
        (["syncer", "--run-dir", "x", "--bind", "tcp://127.0.0.1:port"], "port"),
        (["syncer", "--run-dir", "x", "--bind", "tcp://127.0.0.1"], "an endpoint is tcp://HOST:PORT"),
        (["syncer", "--run-dir", "x", "--bind", "ipc:///tmp/x"], "an endpoint is tcp://HOST:PORT"),
        (["syncer", "--run-dir", "x", "--bind", "7777"], "an endpoint is tcp://HOST:PORT"),
        (["syncer", "--run-dir", "x", "--keys", "k"], "k: there is no such folder. Make the keys with lightning-diloco keygen k."),
        (["syncer", "--run-dir", "x", "--keys", "k", "--insecure"], "--insecure with --keys k: with keys nobody comes in without"),
        (["syncer", "--run-dir", "x", "--insecure", "--bind", "tcp://0.0.0.0:65535"], "Give a port below 65535"),
        (["syncer", "--run-dir", "x", "--bind", "tcp://[::]:7777"], "beyond loopback"),
        (["syncer", "--run-dir", "x", "--shards", "0"], "--shards 0: must be a whole number from 1 to 64"),
        (["syncer", "--run-dir", "x", "--shards", "65"], "--shards 65: must be a whole number from 1 to 64"),
        (["syncer", "--run-dir", "x", "--shards", "two"], "--shards two: must be a whole number from 1 to 64"),
        (["syncer", "--run-dir", "x", "--shards", "\u0663"], "--shards \u0663: must be a whole number from 1 to 64"),
        (["syncer", "--run-dir", "x", "--shards=-1"], "--shards -1: must be a whole number from 1 to 64"),
        (["syncer", "--run-dir", "x", "--shards", "3", "--bind", "tcp://127.0.0.1:65531"], "Give a port of at most 65530."),
        (["syncer", "--run-dir", "x", "--shards", "2", "--rebuild", "--bind", "tcp://127.0.0.1:7"], "--rebuild --shards 2: a lost folder"),
        (["syncer", "--resume"], "--resume: expected one argument"),
        (["syncer", "--resume", "x"], "--resume x: there is no such folder"),
        (["syncer", "--run-dir", "x", "--resume", "y"], "--run-dir x is another one"),
        (["syncer", "--run-dir", "x", "--rebuild"], "--rebuild --bind tcp://127.0.0.1:0: the job's learners go on dialling the address"),
        (["keygen"], "required: DIR"),
        (["keygen", "k", "--syncer", "17"], "'17': is no public key. It has 64 hexadecimal digits"),
        (["keygen", "k", "--admit", "paris", "0" * 64], "k: there is no such folder"),
        (["keygen", "k", "--admit", "a/b", "0" * 64], "'a/b': is no name of a site"),
        (["keygen", "k", "--revoke", "paris"], "no such site is admitted in k. Admitted: none."),
        (["keygen", "k", "--revoke", "paris", "--syncer", "0" * 64], "not allowed with argument"),
        (["replay"], "required: RUN_DIR"),
        (["replay", "x"], "x: there is no such folder"),
        (["replay", "."], "holds no tape.jsonl"),
        (["simulate", "--learners", "0"], "--learners 0"),
        (["simulate", "--steps", "many"], "invalid int value: 'many'"),
        (["simulate", "--quorum", "0"], "min_quorum=0"),
        (["simulate", "--learners", "1", "--steps", "5", "--tape", "/nowhere/at/all"], "--tape /nowhere/at/all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_use_is_one_sentence_and_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refuse(capsys, *argv)
    assert not (tmp_path / "x").exists() and not (tmp_path / "k").exists()


def test_a_run_directory_that_cannot_be_is_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be created" in refuse(capsys, "syncer", "--run-dir", str(tmp_path / "file"))
    assert "cannot be created" in refuse(capsys, "syncer", "--run-dir", str(tmp_path / "file" / "below"))


def test_a_job_keeps_its_number_of_shards(tmp_path, capsys):
    there = str(tmp_path / "there")
    (tmp_path / "there").mkdir()
    write_num_shards(tmp_path / "there", 3)
    assert "the job in" in refuse(capsys, "syncer", "--resume", there, "--shards", "2")
    assert "has 3, and its fragments stay where they are. Leave --shards out." in refuse(
        capsys, "syncer", "--resume", there, "--shards", "1"
    )
    assert "a syncer of 3 shards was started here" in refuse(capsys, "syncer", "--run-dir", there)
    (tmp_path / "there" / "shards" / "0" / "snapshots").mkdir(parents=True)
    (tmp_path / "there" / "shards" / "0" / "snapshots" / "founding.json").write_text("{}")
    assert "holds an earlier job" in refuse(capsys, "syncer", "--run-dir", there)
    assert "holds an earlier job" in refuse(capsys, "syncer", "--run-dir", there, "--shards", "3")
    (tmp_path / "there" / "shards" / "0" / "snapshots" / "founding.json").unlink()
    (tmp_path / "there" / "shards.json").write_text("{}")
    assert "cannot be read (KeyError('num_shards'))" in refuse(capsys, "syncer", "--resume", there)
    (tmp_path / "there" / "shards.json").write_text('{"num_shards": 1}')
    assert "num_shards=1 must be a whole number of at least 2" in refuse(capsys, "export", there, "model.ckpt")


def test_a_shard_does_not_begin_anew_while_the_others_hold_a_job(tmp_path, capsys):
    write_num_shards(tmp_path, 2)
    (tmp_path / "shards" / "0" / "snapshots").mkdir(parents=True)
    for name in ("identity.json", "founding.json"):
        (tmp_path / "shards" / "0" / "snapshots" / name).write_text("{}")
    assert "1: this shard's part of the job is lost" in refuse(capsys, "syncer", "--resume", str(tmp_path))


def test_a_job_without_shards_gets_none_later(tmp_path, capsys):
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "identity.json").write_text("{}")
    assert "holds an earlier job" in refuse(capsys, "syncer", "--run-dir", str(tmp_path), "--shards", "2")
    assert "has 1, and its fragments stay" in refuse(capsys, "syncer", "--resume", str(tmp_path), "--shards", "2")


def test_a_run_directory_of_another_syncer_is_refused(tmp_path, capsys):
    with lock_run_dir(tmp_path):
        assert "another syncer holds this run directory" in refuse(capsys, "syncer", "--run-dir", str(tmp_path))


@pytest.mark.process
@pytest.mark.parametrize("options", [[], pytest.param(["--shards", "2"], marks=pytest.mark.slow)], ids=["one", "shards"])
def test_a_syncer_in_a_folder_of_outputs_is_the_latest_run(tmp_path, options):
    command = [sys.executable, "-m", "lightning_diloco", "syncer", "--run-dir", "outputs/mine", *options]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        until(lambda: (tmp_path / "outputs" / "latest").is_symlink() or process.poll() is not None, 60)
        assert (tmp_path / "outputs" / "latest").readlink() == Path("mine")
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_a_folder_without_a_job_cannot_be_resumed(tmp_path, capsys):
    assert "holds no job" in refuse(capsys, "syncer", "--resume", str(tmp_path))
    assert not (tmp_path / "tape.jsonl").exists()


def test_a_run_directory_with_a_tape_is_refused(tmp_path, capsys):
    (tmp_path / "tape.jsonl").write_text('{"seq":0}\n')
    sentence = refuse(capsys, "syncer", "--run-dir", str(tmp_path))
    assert f"holds an earlier job. Give a new directory, or go on with that job by --resume {tmp_path}" in sentence
    assert not (tmp_path / "syncer.json").exists()
    lock_run_dir(tmp_path).close()  # it was given free


def test_a_port_that_is_taken_is_refused(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "cannot listen on" in refuse(capsys, "syncer", "--run-dir", str(tmp_path), "--bind", f"tcp://127.0.0.1:{port}")
    assert not (tmp_path / "snapshots").exists() and not (tmp_path / "tape.jsonl").exists(), "the folder is as good as new"
    lock_run_dir(tmp_path).close()


@pytest.mark.parametrize("host", ["no-such-host.example", "nosuch0"])
def test_where_a_hosts_name_stands_for_an_address_it_is_said_what_may_stand_there(tmp_path, capsys, host):
    sentence = refuse(capsys, "syncer", "--run-dir", str(tmp_path), "--insecure", "--bind", f"tcp://{host}:7911")
    assert f"cannot listen on tcp://{host}:7911: {host} is no interface of this machine" in sentence
    assert "Give an IP address of this machine, the name of an interface, or * for all of them." in sentence and "free port" not in sentence
    assert not (tmp_path / "snapshots").exists() and not (tmp_path / "tape.jsonl").exists()


@pytest.mark.parametrize(("host", "code"), [("127.0.0.1", CANNOT_LISTEN), ("198.51.100.1", CANNOT_LISTEN), ("no-such-host", 2)])
def test_of_a_shard_that_cannot_listen_the_exit_code_says_whether_it_may_be_otherwise_in_a_while(tmp_path, capsys, monkeypatch, host, code):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"tcp://{host}:{taken.getsockname()[1]}"
        monkeypatch.setattr("lightning_diloco.cli.syncer._stdin_lines", lambda: iter([b'{"shard": 0, "num_shards": 2}']))
        assert main(["syncer", "--as-shard", "--insecure", "--bind", bind, "--run-dir", str(tmp_path)]) == code
    assert f"cannot listen on {bind}: " in capsys.readouterr().err


@pytest.mark.process
def test_the_real_process_says_one_sentence_too():
    wrong = run("syncer", "--run-dir", "x", "--bind", "tcp://10.0.0.1:7")
    assert wrong.returncode == 2 and wrong.stdout == b"" and is_one_sentence(wrong.stderr.decode())
    right = run("--help")
    assert right.returncode == 0 and right.stdout.startswith(b"usage:") and right.stderr == b""


@pytest.mark.process
def test_supervised_without_a_supervisor_is_a_sentence(tmp_path):
    ended = run("syncer", "--supervised", "--run-dir", str(tmp_path))
    assert ended.returncode == 2 and "for the supervisor of local mode" in ended.stderr.decode()
    assert is_one_sentence(ended.stderr.decode())


@pytest.mark.parametrize("line", [b"", b"[]", b"{", b"17"])
def test_a_first_line_that_is_no_object_is_a_sentence(line):
    with pytest.raises(ConfigurationError, match="one line of JSON"):
        _first_line(iter([line]))


def test_simulate_prints_its_figures(capsys, tmp_path):
    assert main(["simulate", "--learners", "2", "--steps", "30", "--json", "--tape", str(tmp_path / "tape.jsonl")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["merges"] > 0 and len(summary["learners"]) == 2
    assert (tmp_path / "tape.jsonl").stat().st_size > 0
