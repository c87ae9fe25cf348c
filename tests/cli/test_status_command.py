"""`lightning-diloco status` and `syncer --metrics-port` as commands, on a job by hand whose learners are here."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from lightning_diloco.cli.main import main
from lightning_diloco.cli.status import interrupts
from lightning_diloco.protocol.observer_messages import Status
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from lightning_diloco.runtime.rundir import lock_run_dir
from lightning_diloco.runtime.shards import shard_dir
from tests.cli.test_command_line import is_one_sentence, refuse
from tests.runtime.job_helpers import CONFIG, Background, make_module, running_job, train, until
from tests.runtime.key_helpers import Keys
from tests.runtime.metrics_reading import assert_equals_summary, samples_of, scrape
from tests.runtime.shard_helpers import sharded_run
from tests.runtime.test_service_process import syncer
from tests.tape_checker import check_run

PORT = 7797
COMMAND = [sys.executable, "-m", "lightning_diloco", "status"]


def status_command(*argv: str, limit_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *argv], capture_output=True, text=True, timeout=limit_s)


@contextmanager
def process(*argv: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen([sys.executable, "-m", "lightning_diloco", *argv], text=True, **options)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()


@dataclass
class Told:
    """What one job told: before, while and after it ran."""

    run_dir: Path
    endpoint: str = ""
    before: str = ""
    by_endpoint: Status | None = None
    by_folder: Status | None = None
    scrapes: list[str] = field(default_factory=list)
    watched: tuple[int, str, str] = (-1, "", "")
    code: int = -1


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """A job by hand with two learners, watched and scraped until its end."""
    told = Told(tmp_path_factory.mktemp("job") / "run")
    with process("syncer", "--run-dir", str(told.run_dir), "--metrics-port", "0", stdout=subprocess.PIPE) as serving:
        told.endpoint = serving.stdout.readline().split("'")[1]
        serving.stdout.readline()
        url = serving.stdout.readline().split()[-1]
        told.before = status_command(told.endpoint).stdout
        with process("status", told.endpoint, "--watch", "0.3", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watching:
            lives = [Background(lambda i=i: _live(told, i)) for i in range(2)]
            until(lambda: samples_of(scrape(url)).get(("diloco_merges_total", ""), 0) > 5, 60)
            _shout(told.endpoint)
            until(lambda: samples_of(scrape(url)).get(("diloco_messages_dropped_total", "reason=malformed_identity")) == 1.0, 20)
            told.by_endpoint = msgspec.json.decode(status_command(told.endpoint, "--json").stdout, type=Status)
            told.by_folder = msgspec.json.decode(status_command(str(told.run_dir), "--json").stdout, type=Status)
            (told.run_dir / "enough").touch()
            while serving.poll() is None:
                try:
                    told.scrapes.append(scrape(url))
                except OSError:
                    break
                time.sleep(0.05)
            told.code = serving.wait(30)
            out, err = watching.communicate(timeout=30)
            told.watched = (watching.returncode, out, err)
            for life in lives:
                life.result()
    return told


def _shout(endpoint: str) -> None:
    """One message of a stranger who does not know how peers are named."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.ROUTING_ID, b"somebody")
        sock.connect(endpoint)
        sock.send(b"hello")
        time.sleep(0.5)


def _live(told: Told, learner_id: int) -> None:
    options = ClientOptions(learner_id=learner_id, endpoint=told.endpoint, config=CONFIG, counters_path=told.run_dir / "counters")
    client = LearnerClient(make_module(learner_id), options)
    client.join()
    while not (told.run_dir / "enough").exists():
        train(client, 1)
    client.leave("limit")
    client.close()


@pytest.mark.process
def test_the_last_scrape_is_the_summary(told):
    summary = check_run(told.run_dir)
    assert told.code == 0 and summary["status"] == "finished" and summary["merges"] > 5
    assert_equals_summary(told.scrapes[-1], summary)


@pytest.mark.process
def test_counters_only_grow_from_scrape_to_scrape(told):
    assert len(told.scrapes) > 1
    for before, after in zip(told.scrapes, told.scrapes[1:], strict=False):
        one, two = samples_of(before), samples_of(after)
        assert [key for key in one if key[0].endswith("_total") and two[key] < one[key]] == []


@pytest.mark.process
def test_a_running_job_is_told_as_it_is(told):
    for status in (told.by_endpoint, told.by_folder):
        assert status.status == "running" and status.merges > 5 and status.num_members == 2
        assert [x.learner_id for x in status.learners] == [0, 1] and all(x.inner_step > 0 for x in status.learners)
        assert status.tokens == status.tokens_merged + status.tokens_pending + status.tokens_discarded
    assert told.before.startswith("job ") and "epoch 0: waiting\n" in told.before


@pytest.mark.process
def test_who_watches_sees_the_end_and_ends_well(told):
    code, out, err = told.watched
    assert (code, err) == (0, "")
    tables = out.split("\njob ")
    assert len(tables) >= 2 and "running" in out and ": finished after " in tables[-1]
    assert out.endswith("The job has ended: finished. Its run directory has the summary.\n")
    assert "\x1b" not in out, "into a pipe there is nothing to clear"


@pytest.mark.process
def test_a_job_that_has_ended_is_a_sentence_and_2(told):
    ended = status_command(told.endpoint, "--timeout", "0.5")
    assert ended.returncode == 2 and ended.stdout == "" and is_one_sentence(ended.stderr)
    assert "No syncer answered at" in ended.stderr


@pytest.mark.slow
@pytest.mark.process
def test_a_local_job_tells_who_can_read_its_folder_and_nobody_else(tmp_path):
    run_dir = tmp_path / "run"
    with syncer(run_dir, supervised=True, num_slots=1) as serving:
        assert (run_dir / "syncer.json").stat().st_mode & 0o777 == 0o600
        refused = status_command(serving.endpoint)
        assert refused.returncode == 2 and refused.stdout == "" and is_one_sentence(refused.stderr)
        assert "RUN_DIR" in refused.stderr
        told = status_command(str(run_dir), "--json")
        assert told.returncode == 0 and msgspec.json.decode(told.stdout, type=Status).status == "waiting"
        serving.tell(command="finish", status="finished")
        assert serving.end() == (0, "")


@pytest.mark.slow
@pytest.mark.process
def test_a_syncer_that_is_killed_and_starts_again_is_watched_on(tmp_path):
    from tests.runtime.test_syncer_restart import Trainer
    from tests.runtime.test_syncer_restart import syncer as by_hand

    with (
        by_hand(tmp_path / "run") as serving,
        process("status", serving.endpoint, "--watch", "0.5", "--json", stdout=subprocess.PIPE) as watching,
    ):
        trainer = Trainer(serving.client(0))
        until(lambda: trainer.steps > 30, 60)
        epochs = [json.loads(watching.stdout.readline())["epoch"]]
        serving.kill()
        serving.resume()
        until(lambda: epochs.append(json.loads(watching.stdout.readline())["epoch"]) or epochs[-1] == 1, 60)
        trainer.is_over = True
        trainer.run.result()
        serving.process.wait(30)
        out, _ = watching.communicate(timeout=30)
    assert epochs[0] == 0 and json.loads(out.splitlines()[-1])["status"] == "finished" and watching.returncode == 0


@pytest.mark.slow
@pytest.mark.process
def test_a_shard_that_is_killed_and_starts_again_is_watched_on_by_its_folder(tmp_path):
    """Between the two there is no address in the folder."""
    run_dir, folder = tmp_path / "run", shard_dir(tmp_path / "run", 1)
    with sharded_run(run_dir) as run:
        with process("status", str(folder), "--watch", "0.3", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watching:
            assert json.loads(watching.stdout.readline())["epoch"] == 0
            os.kill(run.said(1)["pid"], signal.SIGKILL)
            until(lambda: json.loads(watching.stdout.readline())["epoch"] == 1, 60)
            run.process.terminate()
            assert run.end()[0] == 0
            out, err = watching.communicate(timeout=30)
    assert json.loads(out.splitlines()[-1])["status"] == "stopped" and watching.returncode == 0
    assert all(line.startswith("Nothing was heard from the syncer for") for line in err.splitlines())


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_it_is_asked_with_keys_from_another_network_namespace(tmp_path):
    name, ours, theirs = f"ld{os.getpid()}", "10.231.77.1", "10.231.77.2"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True) if shutil.which("ip") else None
    if made is None or made.returncode:
        pytest.skip("network namespaces cannot be made here")
    try:
        link = f"{name}a", f"{name}b"
        for command in (
            f"ip link add {link[0]} type veth peer name {link[1]} netns {name}",
            f"ip addr add {ours}/30 dev {link[0]}",
            f"ip link set {link[0]} up",
            f"ip -n {name} addr add {theirs}/30 dev {link[1]}",
            f"ip -n {name} link set {link[1]} up",
        ):
            subprocess.run(command.split(), check=True)
        keys = Keys(tmp_path / "keys")
        learner, _ = keys.site("learner"), keys.site("watcher")
        serve = ["syncer", "--bind", f"tcp://{ours}:{PORT}", "--keys", str(keys.folder), "--run-dir", str(tmp_path / "run")]
        with process(*serve, stdout=subprocess.PIPE) as serving:
            said = serving.stdout.readline()
            assert f"syncer='tcp://{ours}:{PORT}', keys='DIR'" in said
            options = ClientOptions(
                learner_id=0, endpoint=f"tcp://{ours}:{PORT}", config=CONFIG, counters_path=tmp_path / "counters", keys=learner
            )
            client = LearnerClient(make_module(0), options)
            client.join()
            train(client, 20)
            inside = ["ip", "netns", "exec", name, *COMMAND]
            ask = [*inside, f"tcp://{ours}:{PORT}", "--json", "--timeout", "10"]
            with_keys = [*ask, "--keys", str(keys.site_folder("watcher"))]
            told: list[Status] = []

            def is_told() -> bool:
                seen = subprocess.run(with_keys, capture_output=True, text=True, timeout=60)
                told.append(msgspec.json.decode(seen.stdout, type=Status))
                return told[-1].tokens == 320

            until(is_told, 60)
            assert told[-1].num_members == 1 and told[-1].learners[0].inner_step == 20
            for command, words in (
                (ask, "keys"),
                ([*inside, "tcp://127.0.0.1:7777", "--timeout", "0.5"], "No syncer answered"),
            ):
                unseen = subprocess.run(command, capture_output=True, text=True, timeout=60)
                assert unseen.returncode == 2 and unseen.stdout == "" and words in unseen.stderr
            client.leave("limit")
            client.close()
            assert serving.wait(30) == 0
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.slow
@pytest.mark.process
def test_on_a_terminal_the_table_is_drawn_anew_until_ctrl_c(tmp_path):
    with running_job(tmp_path, "tcp") as job:
        ours, theirs = pty.openpty()
        with process("status", job.endpoint, "--watch", "0.2", stdout=theirs, stderr=subprocess.PIPE) as watching:
            os.close(theirs)
            seen = b""
            while seen.count(b"epoch 0: waiting") < 3:
                seen += os.read(ours, 65536)
            watching.send_signal(signal.SIGINT)
            # A terminal reads on: what is still to be written must not hold up the end.
            with contextlib.suppress(OSError):
                while os.read(ours, 65536):
                    pass
            assert watching.wait(20) == 0 and watching.stderr.read() == ""
        os.close(ours)
    assert seen.startswith(b"\x1b[Hjob ") and seen.count(b"\x1b[J") >= 2


class Interrupted:
    """Destroyed while a signal arrives."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        for _ in range(10):  # the handler runs between two instructions
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_throws_away_is_known_of_all_the_same():
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as came:
        assert came == []
        Interrupted()
        assert came == [signal.SIGINT], "and nothing was raised here"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# ---- wrong use ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["status"], "required: TARGET"),
        (["status", "nowhere"], "nowhere: there is no such folder. Give tcp://HOST:PORT"),
        (["status", "."], "no syncer has said its address there"),
        (["status", "tcp://h"], "tcp://h: the address of a syncer is tcp://HOST:PORT"),
        (["status", "tcp://h:1", "--watch", "0"], "argument --watch: 0: give seconds above 0 and below a million, for example 2"),
        (["status", "tcp://h:1", "--watch", "often"], "argument --watch: often: give seconds above 0"),
        (["status", "tcp://h:1", "--timeout", "nan"], "argument --timeout: nan: give seconds above 0"),
        (["status", "tcp://h:1", "--once", "--watch", "1"], "not allowed with argument --once"),
        (["syncer", "--run-dir", "x", "--metrics-port", "99999"], "99999: Port out of range"),
        (["syncer", "--run-dir", "x", "--metrics-port", "many"], "many: give PORT, which is one of 127.0.0.1, or HOST:PORT"),
        (["syncer", "--run-dir", "x", "--metrics-port", "-1"], "--metrics-port"),
        (["syncer", "--run-dir", "x", "--metrics-port", "http://h:1"], "give PORT"),
        (["syncer", "--run-dir", "x", "--metrics-port", "192.0.2.1:9100"], "cannot listen on 192.0.2.1:9100"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_use_is_one_sentence_and_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refuse(capsys, *argv)
    lock_run_dir(tmp_path / "x").close() if (tmp_path / "x").exists() else None
    assert not (tmp_path / "x" / "tape.jsonl").exists()


def test_without_the_package_a_metrics_port_is_a_sentence_and_a_syncer_without_one_is_no_matter(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "lightning_diloco.runtime.metrics_endpoint", raising=False)
    assert "Install it: pip install prometheus_client" in refuse(capsys, "syncer", "--run-dir", str(tmp_path), "--metrics-port", "0")
    assert not (tmp_path / "tape.jsonl").exists()
    (tmp_path / "tape.jsonl").write_text('{"seq":0}\n')
    assert "holds an earlier job" in refuse(capsys, "syncer", "--run-dir", str(tmp_path))


def test_a_folder_that_is_refused_leaves_no_endpoint_behind(tmp_path, capsys):
    (tmp_path / "tape.jsonl").write_text('{"seq":0}\n')
    assert "holds an earlier job" in refuse(capsys, "syncer", "--run-dir", str(tmp_path), "--metrics-port", "0")


def test_help_of_status_is_0(capsys):
    with pytest.raises(SystemExit) as end:
        main(["status", "--help"])
    assert end.value.code == 0 and "--watch SECONDS" in capsys.readouterr().out
