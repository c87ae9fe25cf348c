"""`python recipes/train.py`, run as a person runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from recipes.train import forget, share_cores

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.process


def train(tmp_path, *options):
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), *options]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)


def test_help_names_the_recipe_and_the_values_and_ends_well(tmp_path):
    done = train(tmp_path, "--help")
    assert done.returncode == 0
    for text in (
        "recipe: ablation, digits, gpt_text, hf_causal_lm, lora_text, moe_text, quality",
        "max_steps:",
        "sync_interval_steps: 24",
        "data.path=FILE_OR_FOLDER",
    ):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        pytest.param(lambda path: None, "there is no such file or folder", marks=pytest.mark.slow),
        pytest.param(lambda path: path.touch(), "the file is empty", marks=pytest.mark.slow),
        (lambda path: path.mkdir(), "the folder has no text file"),
    ],
    ids=["missing", "empty file", "empty folder"],
)
def test_a_path_without_text_gets_one_sentence_and_exit_code_2(tmp_path, make, sentence):
    path = tmp_path / "nothing"
    make(path)
    done = train(tmp_path, f"data.path={path}")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert str(path) in line and sentence in line and "leave data.path out" in line
    assert not (tmp_path / "outputs").exists(), "a run that was refused leaves no folder"


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("trainer.devices=zwei", "trainer.devices='zwei': must be a whole number of at least 1, the number of learners"),
        ("+data.pth=x", "data.pth: there is no such value; did you mean data.path?"),
    ],
)
def test_a_value_that_cannot_be_gets_one_sentence_and_leaves_no_folder(tmp_path, option, sentence):
    done = train(tmp_path, option)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(sentence)
    assert not (tmp_path / "outputs").exists()


def test_of_a_folder_that_is_not_empty_only_the_copy_of_the_configuration_goes(tmp_path):
    for name in ("run/logs/hydra/config.yaml", "run/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    forget(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_an_interrupt_says_where_the_files_are(tmp_path):
    options = ["trainer.max_steps=100000", "model.channels=32", "model.num_layers=1"]
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), *options]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("step ")
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    (run_dir,) = {path.resolve() for path in (tmp_path / "outputs").iterdir()}
    assert out.splitlines()[-1] == f"Stopped. Run directory: outputs/{run_dir.name}"
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "stopped"


def test_an_unknown_option_ends_with_exit_code_2(tmp_path):
    done = train(tmp_path, "trainer.max_stepz=3")
    assert done.returncode == 2
    assert "max_stepz" in done.stderr and "Traceback" not in done.stderr


def test_a_single_process_trains_on_the_users_own_file(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("to be or not to be, that is the question. " * 200, "utf-8")
    small = ["model.channels=32", "model.num_layers=1", "trainer.max_steps=30", "trainer.val_check_interval=20", "sample.num_bytes=20"]
    done = train(tmp_path, "strategy.name=single", f"data.path={text}", *small)
    assert done.returncode == 0, done.stderr
    assert "val_loss" in done.stdout and "20 bytes after 'def '" in done.stdout
    run_dir = (tmp_path / "outputs" / "latest").resolve()
    assert f"Run directory: outputs/{run_dir.name}" in done.stdout
    for name in ("logs/hydra/config.yaml", "logs/metrics/metrics.csv", "checkpoints/last.ckpt"):
        assert (run_dir / name).is_file()
    assert done.stderr == ""


@pytest.mark.slow
def test_ddp_trains_the_same_job_to_compare_with(tmp_path):
    """Two processes of Lightning's own; the last validation is of the whole set, in this process."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text to learn\n" for i in range(3000)))
    small = ("data.context=32", "data.batch_size=4", "model.num_layers=1", "model.channels=32", "trainer.max_steps=40")
    done = train(tmp_path, "strategy.name=ddp", f"data.path={text}", *small)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "outputs" / "latest" / "result.json").read_text())
    assert result["inner_steps"] is None, "counted in processes that have ended"
    assert 0 < result["val"]["val_loss"] < 5.0, "a uniform guess has 5.55"
    assert "val_loss" in done.stdout


def test_every_learner_gets_its_share_of_the_cores_unless_the_caller_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for num_learners, threads in ((2, "4"), (3, "2"), (100, "1"), ("auto", "1")):  # one after the other, as in a sweep
        share_cores(num_learners)
        assert os.environ["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    share_cores(2)
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("devices", [2, 3])
def test_a_merge_waits_for_all_learners_that_the_recipe_starts(devices):
    with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
        cfg = compose("config", ["recipe=gpt_text", f"trainer.devices={devices}"])
    assert cfg.strategy.min_quorum == devices
    assert cfg.model.context == cfg.data.context
